"""Kernels keep the arrays of a thread in registers: every loop over one is unrolled."""

import mlx.core as mx
import numpy as np
import pytest
from metal.emulator import Kernel
from metal.emulator.registers import arrays_in_memory

from tq.engine.quantize.codebooks import stored_codebook
from tq.metal import attend_variants, embed, expert_variants, kv_encode, matmul, matvec, rotate
from tq.metal.attend import Codes as CacheCodes
from tq.metal.attend_variants import Setting
from tq.metal.expert_variants import Layer
from tq.metal.variants import Codes

pytestmark = pytest.mark.usefixtures("emulator")
HALF = [mx.float16]
SUMS = "float sums[4];\nfor (int i = 0; i < 4; ++i) { sums[i] = a[i]; }\n"
OUT = "for (int i = 0; i < 4; ++i) { o[i] = exp(sums[i]) * exp(a[i]) + sin(sums[i]) * exp(a[i + 1]) / tanh(sums[i]); }"


def test_arrays_that_are_indexed_by_variables_are_in_memory():
    body = SUMS + "int i = int(a[8]) & 3; o[0] = sums[i];"
    assert arrays_in_memory(Kernel("k", ["a"], ["o"], body).variant([np.zeros(9, np.float32)], ["float32"])) == {"sums"}
    body = SUMS + "#pragma unroll\n" + OUT
    assert arrays_in_memory(Kernel("k", ["a"], ["o"], body).variant([np.zeros(9, np.float32)], ["float32"])) == set()


def codes(bits: int, group_size: int = 64) -> Codes:
    return Codes(bits, group_size, stored_codebook("lloyd-max" if bits else "ternary", bits))


def encode(bits: int, dim: int, group_size: int) -> None:
    codebook = mx.array(stored_codebook("lloyd-max", bits)).astype(mx.float16)
    kv_encode.encode(mx.zeros((1, 2, 8, dim), mx.float16), CacheCodes(bits, codebook, mx.eye(dim), group_size))


def settings():
    for length in (1, 32):
        yield Setting((8, 3), (128, 64), mx.float16, (8, 2), (16, 0, 64, 16), length=length)
        yield Setting((4, 4), (96, 96), mx.float16, (8, 2), (16, 0, 64, 16), length=length, groups=(32, 32))


@pytest.mark.parametrize(
    "variants",
    [
        lambda: matvec.variants([codes(0), codes(3)], HALF, [(1, 64, 640), (8, 64, 640)]),
        lambda: matmul.variants([codes(0), codes(3)], HALF, [(64, 64, 640)]),
        lambda: embed.variants([codes(0), codes(5)], HALF, [(2, 64, 640)]),
        lambda: rotate.variants(HALF, [(1, n) for n in (768, 8192, 14336)]),
        lambda: expert_variants.variants(Layer(codes(3), mx.float16, (4, 32, 640), [3, 1, 0, 3], pairs_per_x=4)),
        lambda: attend_variants.variants(settings()),
    ],
)
def test_arrays_of_kernels_are_in_registers(variants, monkeypatch):
    launched = recorded(monkeypatch)
    for variant in variants():
        variant.prepare(np.random.default_rng(0)).launch()
    assert launched and {each: names for each in launched if (names := arrays_in_memory(each))} == {}


@pytest.mark.parametrize("call", [(4, 128, 0), (3, 128, 64), (2, 256, 32)])
def test_arrays_of_the_encoder_are_in_registers(call, monkeypatch):
    launched = recorded(monkeypatch)
    encode(*call)
    assert launched and {each: names for each in launched if (names := arrays_in_memory(each))} == {}


def recorded(monkeypatch) -> dict:
    """What is launched from now on; nothing runs, results are zeros."""
    launched = {}

    class Recorder(Kernel):
        def __call__(self, *, inputs, template, output_shapes, output_dtypes, **others):
            launched[self.variant(inputs, output_dtypes, template)] = True
            return [mx.zeros(shape, dtype) for shape, dtype in zip(output_shapes, output_dtypes, strict=True)]

    monkeypatch.setattr(mx.fast, "metal_kernel", Recorder)
    return launched
