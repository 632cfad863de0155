"""Nearest level: exactly what a search through all levels finds, also beside boundaries and far outside."""

import numpy as np
import pytest

from tq.engine.quantize.codebooks import stored_codebook
from tq.engine.quantize.nearest import CELLS, NearestLevel

CODEBOOKS = {f"{bits} bits": stored_codebook("lloyd-max", bits) for bits in range(1, 9)} | {
    "ternary": stored_codebook("ternary", 0),
    "even spacing": np.arange(-7, 8, dtype=np.float32) / 8,
    "uneven spacing": np.array([-7, -1, -0.95, 0.25, 3, 3.5], np.float32),
    "one sign": np.array([100, 101, 104], np.float32),
}
each_codebook = pytest.mark.parametrize("levels", CODEBOOKS.values(), ids=CODEBOOKS.keys())


def brute_force(values, levels):
    """The lower level where two are equally near. Twice the value against the sum of two levels: exact in float64."""
    levels = levels.astype(np.float64)
    return np.sum(2 * values.astype(np.float64)[:, None] > levels[1:] + levels[:-1], axis=1)


@each_codebook
def test_random_values_get_the_nearest_level(levels):
    spread = levels[-1] - levels[0]
    values = np.random.default_rng(0).uniform(levels[0] - spread, levels[-1] + spread, 4000).astype(np.float32)
    distance = np.abs(values.astype(np.float64)[:, None] - levels)
    np.testing.assert_array_equal(NearestLevel(levels).codes(values), np.argmin(distance, axis=1))


@each_codebook
def test_values_on_and_beside_boundaries_get_the_nearest_level(levels):
    boundaries = (levels[1:] + levels[:-1]) / 2
    below, above = (np.nextafter(boundaries, np.float32(to)) for to in (-np.inf, np.inf))
    values = np.concatenate([boundaries, below, above, levels])
    np.testing.assert_array_equal(NearestLevel(levels).codes(values), brute_force(values, levels))


@each_codebook
def test_values_around_every_table_cell_get_the_nearest_level(levels):
    boundaries = (levels[1:] + levels[:-1]) / 2
    width = max(boundaries[-1] - boundaries[0], 1e-3) / (CELLS - 4)
    values = (boundaries[:, None] + width * np.linspace(-2, 2, 81)).astype(np.float32).ravel()
    np.testing.assert_array_equal(NearestLevel(levels).codes(values), brute_force(values, levels))


@each_codebook
def test_extreme_values_get_the_outer_levels(levels):
    codes = NearestLevel(levels).codes(np.array([-np.inf, -1e30, 1e30, np.inf], np.float32))
    assert codes.tolist() == [0, 0, len(levels) - 1, len(levels) - 1]


@each_codebook
def test_denormals_and_zeros_get_the_level_nearest_to_zero(levels):
    values = np.array([0.0, -0.0, 1e-42, -1e-42, 1e-30, -1e-30], np.float32)
    np.testing.assert_array_equal(NearestLevel(levels).codes(values), brute_force(values, levels))


@each_codebook
def test_nan_gives_a_valid_code(levels):
    assert NearestLevel(levels).codes(np.array([np.nan], np.float32))[0] < len(levels)


def test_codes_keep_the_shape_of_the_values():
    codes = NearestLevel(CODEBOOKS["4 bits"]).codes(np.zeros((2, 3, 5), np.float32))
    assert codes.shape == (2, 3, 5)
    assert codes.dtype == np.uint8


@each_codebook
def test_rough_levels_are_nearest_but_for_a_sliver_beside_boundaries(levels):
    values = np.random.default_rng(1).uniform(levels[0] - 1, levels[-1] + 1, (200, 100)).astype(np.float32)
    inverse = np.random.default_rng(2).uniform(0.5, 2, 200).astype(np.float32)
    nearest = NearestLevel(levels)
    out, cell = np.full_like(values, np.nan), np.empty(values.shape, np.int32)
    rough = nearest.rough_levels(values, inverse, out, cell)
    values = values * inverse[:, None]
    exact = levels[nearest.codes(values)]
    assert rough is out
    assert np.mean(rough != exact) < 0.02
    sliver = 2 * max(levels[-1] - levels[0], 1e-3) / CELLS
    assert np.all(np.abs(values - rough) <= np.abs(values - exact) + 2 * sliver)
