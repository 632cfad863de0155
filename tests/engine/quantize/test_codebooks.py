"""Codebooks: the optimum of Lloyd and Max for N(0,1), by numerical integration and against published numbers."""

import numpy as np
import pytest

from tq.engine.quantize.codebooks import lloyd_max, mean_square_error, stored_codebook

N_LEVELS = [2, 3, 4, 5, 8, 16, 32, 64, 128, 256]
FAR = 14.0  # N(0,1) has 1e-44 of its mass beyond
# Max 1960, Table I, with more digits from later work; 1 bit is 1 - 2/pi.
PUBLISHED = {2: 0.36338, 3: 0.19017, 4: 0.11748, 8: 0.034548, 16: 0.0095010}


def integrate(function, a, b):
    """Gauss-Legendre on short pieces: 1e-14 for densities like these."""
    nodes, weights = np.polynomial.legendre.leggauss(20)
    edges = np.linspace(a, b, 2 + int(abs(b - a) / 0.1))
    middle, half = (edges[1:] + edges[:-1]) / 2, (edges[1:] - edges[:-1]) / 2
    return float(np.sum(function(middle[:, None] + half[:, None] * nodes) * weights * half[:, None]))


def density(x):
    return np.exp(-x * x / 2) / np.sqrt(2 * np.pi)


def cells(levels):
    return zip(levels, [-FAR, *(levels[1:] + levels[:-1]) / 2], [*(levels[1:] + levels[:-1]) / 2, FAR], strict=True)


@pytest.mark.parametrize(("n_levels", "published"), PUBLISHED.items())
def test_error_is_the_published_one(n_levels, published):
    assert mean_square_error(lloyd_max(n_levels)) == pytest.approx(published, rel=1e-4)


@pytest.mark.parametrize("n_levels", N_LEVELS)
def test_each_level_is_the_centroid_of_its_cell(n_levels):
    for level, a, b in cells(lloyd_max(n_levels)):
        centroid = integrate(lambda x: x * density(x), a, b) / integrate(density, a, b)
        assert level == pytest.approx(centroid, abs=1e-9)


@pytest.mark.parametrize("n_levels", N_LEVELS)
def test_levels_ascend_and_are_antisymmetric(n_levels):
    levels = lloyd_max(n_levels)
    assert levels.shape == (n_levels,)
    assert np.all(np.diff(levels) > 0)
    np.testing.assert_array_equal(levels, -levels[::-1])


def test_one_level_is_the_mean():
    assert lloyd_max(1).tolist() == [0.0]


@pytest.mark.parametrize("levels", [lloyd_max(8), np.array([-2.0, -0.1, 0.3, 5.0]), np.linspace(-3, 3, 16)])
def test_mean_square_error_is_the_integral(levels):
    expected = sum(integrate(lambda x, c=c: (x - c) ** 2 * density(x), a, b) for c, a, b in cells(levels))
    assert mean_square_error(levels) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("bits", range(1, 9))
def test_stored_values_are_exact_in_float16_and_cost_little(bits):
    stored = stored_codebook("lloyd-max", bits)
    assert stored.dtype == np.float32
    assert stored.shape == (2**bits,)
    np.testing.assert_array_equal(stored, stored.astype(np.float16))
    np.testing.assert_allclose(stored, lloyd_max(2**bits), rtol=2**-11)
    assert mean_square_error(stored.astype(np.float64)) < mean_square_error(lloyd_max(2**bits)) * 1.005


def test_ternary_has_a_zero_and_one_magnitude():
    assert stored_codebook("ternary", 0).tolist() == pytest.approx([-1.22401, 0, 1.22401], rel=1e-3)
    assert stored_codebook("ternary", 0)[1] == 0


def test_nobody_can_change_the_codebook_of_others():
    with pytest.raises(ValueError, match="read-only"):
        stored_codebook("lloyd-max", 4)[0] = 0
