"""The native rotation against the one of the engine, which defines it, and against float64 NumPy."""

import mlx.core as mx
import numpy as np
import pytest
from hadamard import Rotation
from packed_matrix import operate, relative_error

from tq.cpu import library
from tq.engine.quantize.rotation import hadamard_block, rotate, unrotate

# Odd: signs alone. 2 to 24: blocks smaller than a vector. Then each factor, one block and several, and powers of two.
DIMENSIONS = [
    1,
    5,
    2,
    6,
    8,
    12,
    20,
    24,
    28,
    40,
    56,
    64,
    112,
    192,
    320,
    448,
    576,
    640,
    896,
    1024,
    1536,
    2880,
    3584,
    8192,
]
LARGER_THAN_A_BLOCK = [16384, 12 * 16384]


def call(x: np.ndarray, rotation: Rotation, *, inverse: bool) -> np.ndarray:
    return operate(library.library().tq_rotate, library.RotateParams(rotation.rotation, inverse), [x], x.shape)


@pytest.mark.parametrize("n", [*DIMENSIONS, *LARGER_THAN_A_BLOCK])
def test_rotates_as_the_engine_does(n):
    rotation = Rotation(n)
    x = np.random.default_rng(n).standard_normal((3, n)).astype(np.float32)
    signs = mx.array(rotation.signs)
    assert relative_error(call(x, rotation, inverse=False), np.array(rotate(mx.array(x), signs))) < 1e-6
    assert relative_error(call(x, rotation, inverse=True), np.array(unrotate(mx.array(x), signs))) < 1e-6


@pytest.mark.parametrize("n", [n for n in DIMENSIONS if n <= 1536])
def test_is_the_product_with_an_orthogonal_matrix(n):
    rotation = Rotation(n)
    x = np.random.default_rng(n).standard_normal((2, n)).astype(np.float32)
    y = call(x, rotation, inverse=False)
    assert relative_error(y, x.astype(np.float64) @ rotation.dense.T) < 1e-6
    assert relative_error(call(y, rotation, inverse=True), x) < 1e-6


def test_large_and_tiny_values_keep_their_relative_error():
    rotation = Rotation(576)
    x = np.random.default_rng(0).standard_normal((1, 576))
    for size in (1e30, 1e-30):
        rows = (x * size).astype(np.float32)
        assert relative_error(call(rows, rotation, inverse=False), rows.astype(np.float64) @ rotation.dense.T) < 1e-6


@pytest.mark.parametrize("inverse", [False, True])
def test_nan_fills_its_block_and_no_other(inverse):
    n = 576
    x = np.ones((2, n), np.float32)
    x[1, 200] = np.nan
    y = call(x, Rotation(n), inverse=inverse)
    block = hadamard_block(n)
    expected = np.zeros((2, n), bool)
    expected[1, 200 // block * block :][:block] = True
    assert np.array_equal(np.isnan(y), expected)


@pytest.mark.parametrize("n", [64, 576])
def test_many_rows_are_shared_out_over_threads(n):
    loaded, rotation = library.library(), Rotation(n)
    before = loaded.tq_get_threads()
    x = np.random.default_rng(1).standard_normal((1001, n)).astype(np.float32)
    one_by_one = np.concatenate([call(row[None], rotation, inverse=False) for row in x])
    try:
        for threads in (1, 2, 3, 7):
            loaded.tq_set_threads(threads)
            assert np.array_equal(call(x, rotation, inverse=False), one_by_one)
    finally:
        loaded.tq_set_threads(before)


def test_no_rows_and_no_rotation():
    assert call(np.zeros((0, 64), np.float32), Rotation(64), inverse=False).shape == (0, 64)
    x = np.random.default_rng(2).standard_normal((2, 3, 10)).astype(np.float32)
    params = library.RotateParams(library.Rotation(), False)
    assert np.array_equal(operate(library.library().tq_rotate, params, [x], x.shape), x)
