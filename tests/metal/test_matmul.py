"""matmul.metal against float64: tiles with tails in every direction, all widths and types."""

import mlx.core as mx
import numpy as np
import pytest
from metal.emulator import device_requested, emulated

from tq.engine.quantize.codebooks import stored_codebook
from tq.metal import matmul
from tq.metal.variants import Codes

pytestmark = pytest.mark.usefixtures("metal")

LIMIT = {mx.float16: 2e-3, mx.bfloat16: 3e-3, mx.float32: 1e-5}


def lloyd_max(bits: int, group: int) -> Codes:
    return Codes(bits, group, stored_codebook("lloyd-max" if bits else "ternary", bits))


def foreign(bits: int, group: int) -> Codes:
    """Levels that no polynomial fits."""
    return Codes(bits, group, np.sort(np.random.default_rng(0).standard_normal(2**bits if bits else 3)))


def check(codes: Codes, dtype: mx.Dtype, shape: tuple[int, int, int], bias: bool) -> None:
    (variant,) = matmul.variants([codes], [dtype], [shape], bias)
    assert variant.prepare(np.random.default_rng(1)).error() < LIMIT[dtype]


@pytest.mark.parametrize(
    ("codes", "dtype", "shape", "bias"),
    [
        (lloyd_max(0, 0), mx.float16, (17, 33, 130), False),
        (lloyd_max(0, 32), mx.float32, (40, 5, 160), True),
        (foreign(0, 64), mx.float16, (9, 10, 64), True),
        (lloyd_max(1, 128), mx.bfloat16, (33, 40, 256), False),
        (lloyd_max(2, 64), mx.float16, (9, 31, 64), True),
        (lloyd_max(3, 64), mx.float16, (65, 70, 192), False),
        (lloyd_max(3, 0), mx.float32, (20, 33, 45), True),
        (lloyd_max(4, 64), mx.bfloat16, (70, 65, 128), True),
        (lloyd_max(4, 32), mx.float32, (10, 1, 32), True),  # arrays of fewer than 8 elements are in constant memory
        (foreign(6, 32), mx.bfloat16, (12, 34, 96), False),
        (lloyd_max(8, 128), mx.float16, (16, 36, 128), True),
    ],
)
def test_equals_float64(codes, dtype, shape, bias):
    check(codes, dtype, shape, bias)


@pytest.mark.parametrize("rows", [20, 70])
def test_large_tiles_equal_float64(rows, monkeypatch):
    monkeypatch.setattr(matmul, "ENOUGH", 1)
    assert matmul.tile_shape(rows, 70)[1] == 64
    check(lloyd_max(3, 32), mx.float16, (rows, 70, 96), False)


@pytest.mark.skipif(device_requested(), reason="an emulator puts arrays where it likes")
def test_inputs_need_no_alignment():
    with emulated(misalign=1):
        check(lloyd_max(3, 32), mx.float16, (10, 9, 96), True)
