"""Rotation: orthonormal, equal to an explicit matrix, and the same in every version, because files depend on it."""

import hashlib

import mlx.core as mx
import numpy as np
import pytest

from tq.engine.quantize.rotation import MAX_POWER_OF_TWO, hadamard_block, random_signs, rotate, unrotate

# Powers of two, m * 2^k, and dimensions rotated in blocks (7: in blocks of one).
DIMENSIONS = [1, 2, 8, 64, 1024, 12, 20, 28, 96, 160, 224, 1536, 7, 100, 576, 2880]


def samples(*shape):
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def sylvester(n):
    matrix = np.ones((1, 1))
    while len(matrix) < n:
        matrix = np.kron(np.array([[1, 1], [1, -1]]), matrix)
    return matrix


def hadamard(n):
    """H of n = m * 2^k in float64: MLX's own table for m, and Sylvester's matrix."""
    m = next(m for m in (1, 12, 20, 28) if n % m == 0 and (n // m).bit_count() == 1)
    factor = np.sign(np.array(mx.hadamard_transform(mx.eye(m)))).T if m > 1 else np.ones((1, 1))
    return np.kron(factor, sylvester(n // m)) / np.sqrt(n)


@pytest.mark.parametrize("n", DIMENSIONS)
def test_rotation_is_the_product_with_an_explicit_orthonormal_matrix(n):
    x, signs, matrix = samples(3, n), random_signs(n), hadamard(hadamard_block(n))
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(len(matrix)), atol=1e-12)
    expected = ((x * signs.astype(np.float64)).reshape(-1, len(matrix)) @ matrix.T).reshape(3, n)
    np.testing.assert_allclose(np.array(rotate(mx.array(x), mx.array(signs))), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("n", DIMENSIONS)
def test_unrotate_is_the_inverse(n):
    x, signs = samples(2, 3, n), mx.array(random_signs(n))
    y = rotate(mx.array(x), signs)
    np.testing.assert_allclose(np.array(unrotate(y, signs)), x, rtol=0, atol=1e-5)
    np.testing.assert_allclose(np.array(rotate(unrotate(mx.array(x), signs), signs)), x, rtol=0, atol=1e-5)


@pytest.mark.parametrize("n", [1536, 576, 100, 7])
def test_products_of_rotated_vectors_are_those_of_the_vectors(n):
    x, w, signs = samples(4, n), samples(5, n)[::-1].copy(), mx.array(random_signs(n))
    product = rotate(mx.array(x), signs) @ rotate(mx.array(w), signs).T
    np.testing.assert_allclose(np.array(product), x @ w.T, rtol=0, atol=1e-3)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16, mx.float32])
@pytest.mark.parametrize("n", [64, 160, 100])
def test_the_type_of_the_activation_is_kept(dtype, n):
    x, signs = samples(2, n), mx.array(random_signs(n)).astype(mx.float16)
    y = rotate(mx.array(x).astype(dtype), signs)
    back = unrotate(y, signs)
    assert (y.dtype, back.dtype) == (dtype, dtype)
    np.testing.assert_allclose(np.array(back.astype(mx.float32)), x, atol={mx.float32: 1e-5}.get(dtype, 0.05))


@pytest.mark.parametrize(
    ("n", "block"),
    [
        *[(1, 1), (2, 2), (7, 1), (12, 12), (36, 12), (64, 64), (100, 20), (576, 192), (896, 896), (960, 320)],
        *[(1536, 1536), (2880, 320), (4864, 256), (8960, 1792), (14336, 14336), (18944, 512), (27648, 3072)],
    ],
)
def test_blocks_are_the_largest_that_divide_the_dimension(n, block):
    assert hadamard_block(n) == block


@pytest.mark.parametrize("m", [1, 12, 20, 28])
def test_the_power_of_two_is_limited_to_what_the_metal_kernel_takes(m):
    assert MAX_POWER_OF_TWO == 8192
    assert hadamard_block(m * 8192) == m * 8192
    assert hadamard_block(m * 8192 * 4) == m * 8192


def test_dimensions_beyond_the_limit_are_rotated_in_blocks():
    n = 2 * MAX_POWER_OF_TWO
    signs = mx.array(random_signs(n))
    spread = np.array(rotate(mx.eye(1, n), signs))[0]
    np.testing.assert_allclose(np.abs(spread[:MAX_POWER_OF_TWO]), MAX_POWER_OF_TWO**-0.5, rtol=1e-5)
    np.testing.assert_array_equal(spread[MAX_POWER_OF_TWO:], 0)


@pytest.mark.parametrize(
    ("n", "digest"), [(64, "800fdd5bca499dcc"), (100, "160fc3cb5badf309"), (576, "a42c27572f275cb6")]
)
def test_signs_never_change(n, digest):
    assert hashlib.sha256(random_signs(n).astype("<f4").tobytes()).hexdigest().startswith(digest)


@pytest.mark.parametrize(
    ("m", "digest"), [(12, "99946ed184700c9f"), (20, "89f6ce3509286523"), (28, "5487022edb4d3467")]
)
def test_the_small_matrices_of_mlx_never_change(m, digest):
    signs = np.array(mx.hadamard_transform(mx.eye(m))).T > 0
    assert hashlib.sha256(np.packbits(signs).tobytes()).hexdigest().startswith(digest)


def test_signs_are_balanced_and_differ_by_dimension_and_seed():
    signs = random_signs(4096)
    assert set(signs.tolist()) == {-1, 1}
    assert abs(signs.mean()) < 0.05
    assert abs(np.mean(signs * random_signs(4096, seed=1))) < 0.05
    assert abs(np.mean(signs * random_signs(8192)[:4096])) < 0.05


def test_nobody_can_change_the_signs_of_others():
    with pytest.raises(ValueError, match="read-only"):
        random_signs(64)[0] = 1
