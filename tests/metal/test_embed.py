"""embed.metal against the rows that codes stand for."""

import mlx.core as mx
import numpy as np
import pytest
from metal.emulator import emulated

from tq.engine.quantize.codebooks import stored_codebook
from tq.metal.embed import embed, variants
from tq.metal.variants import Codes, random_matrix

# Levels come from a table or exact arithmetic: what is left is the rounding of the result.
ALLOWED = {mx.float16: 3e-4, mx.bfloat16: 2.5e-3, mx.float32: 1e-6}


def codes(bits: int, group_size: int) -> Codes:
    return Codes(bits, group_size, stored_codebook("lloyd-max" if bits else "ternary", bits))


@pytest.mark.usefixtures("metal")
@pytest.mark.parametrize(
    ("bits", "group", "dtype", "shape"),
    [
        (0, 32, mx.float16, (3, 11, 96)),
        (0, 0, mx.float32, (2, 4, 33)),
        (1, 0, mx.bfloat16, (1, 9, 100)),
        (2, 64, mx.float16, (5, 7, 64)),
        (3, 32, mx.bfloat16, (4, 6, 96)),
        (4, 0, mx.float32, (2, 5, 7)),
        (5, 128, mx.float16, (3, 5, 128)),
        (8, 0, mx.float32, (2, 3, 50)),
    ],
)
def test_equals_float64(bits, group, dtype, shape):
    (variant,) = variants([codes(bits, group)], [dtype], [shape])
    case = variant.prepare(np.random.default_rng(2))
    assert case.launch().dtype == dtype
    assert case.error() < ALLOWED[dtype]


def test_slices_lie_anywhere_in_memory(emulator):
    with emulated(misalign=1):
        (variant,) = variants([codes(3, 32)], [mx.bfloat16], [(4, 6, 96)])
        assert variant.prepare(np.random.default_rng(0)).error() < ALLOWED[mx.bfloat16]


@pytest.mark.usefixtures("metal")
def test_ids_are_signed_or_not_and_those_beyond_the_last_row_read_it():
    matrix = random_matrix(np.random.default_rng(0), codes(4, 32), (6, 32))
    ids = np.array([5, 0, 3, 6, 1 << 20])
    for dtype in (mx.int32, mx.uint32):
        got = embed(mx.array(ids, dtype=dtype), *matrix.stored, 32, mx.float32)
        np.testing.assert_allclose(np.array(got), matrix.dense[np.minimum(ids, 5)], rtol=1e-6)
