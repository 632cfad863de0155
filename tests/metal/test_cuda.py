"""Kernels without 8x8 matrices also compile as CUDA. Nothing runs: MLX's CUDA backend is for machines that have one."""

import mlx.core as mx
import numpy as np
import pytest
from metal import nvrtc

from tq.engine.quantize.codebooks import stored_codebook
from tq.metal import attend, embed, kv_encode, matvec, rotate
from tq.metal.attend_variants import Setting
from tq.metal.attend_variants import variants as of_attention
from tq.metal.expert_variants import Layer
from tq.metal.expert_variants import variants as of_experts
from tq.metal.variants import Codes


def codes(bits: int) -> Codes:
    return Codes(bits, 32, stored_codebook("lloyd-max" if bits else "ternary", bits))


@pytest.fixture(autouse=True)
def compiled(monkeypatch):
    if reason := nvrtc.unavailable():
        pytest.skip(reason)
    monkeypatch.setattr(mx.fast, "metal_kernel", nvrtc.CompiledKernel)


def launch(variants) -> None:
    for variant in variants:
        mx.eval(variant.prepare(np.random.default_rng(0)).launch())


@pytest.mark.parametrize(
    ("bits", "dtype", "rows"), [(0, mx.float16, 1), (3, mx.float16, 1), (4, mx.bfloat16, 4), (8, mx.float32, 1)]
)
def test_matrices_times_rows(bits, dtype, rows):
    launch(matvec.variants([codes(bits)], [dtype], [(rows, 300, 992)], bias=True))


def test_rows_of_embeddings():
    launch(embed.variants([codes(3)], [mx.float16], [(2, 5, 96)]))


def test_experts():
    layer = Layer(codes(3), mx.bfloat16, (3, 5, 96), (0, 1, 1, 2), 2, True, True)
    launch(variant for variant in of_experts(layer) if variant.kernel != "gather_matmul")


def test_keys_and_values():
    mx.eval(kv_encode.encode(mx.zeros((1, 2, 5, 64), mx.float16), attend.Codes(3, mx.zeros(8), mx.eye(64))))
    launch(of_attention([Setting((8, 3), (64, 64), mx.float16, (6, 2), (5, 0, 128, 37), 1)]))


@pytest.mark.parametrize("features", [64, 28 * 64])
def test_rotations(features):
    mx.eval(rotate.rotate(mx.zeros((2, features), mx.float16), mx.ones(features, mx.float16), features))


def test_what_does_not_compile_is_an_error():
    with pytest.raises(RuntimeError, match="undefined"):
        nvrtc.compile_cuda(nvrtc.MLX_HEADER + "__global__ void f(float* y) { y[0] = missing; }")
