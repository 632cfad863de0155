"""Scales: close to the best that a scan of thousands finds, and sane for zeros, constants, tiny and huge groups."""

import numpy as np
import pytest

from tq.engine.quantize import scales
from tq.engine.quantize.codebooks import stored_codebook
from tq.engine.quantize.nearest import NearestLevel
from tq.engine.quantize.scales import best_scales, inverse, n_threads, row_blocks
from tq.errors import UsageError

TERNARY = 0
pytestmark = pytest.mark.filterwarnings("error")


def nearest_level(bits):
    return NearestLevel(stored_codebook("lloyd-max" if bits else "ternary", bits))


def normal(n_groups, size, seed=0):
    return np.random.default_rng(seed).standard_normal((n_groups, size)).astype(np.float32)


def heavy_tailed(n_groups, size):
    return np.random.default_rng(0).standard_t(3, (n_groups, size)).astype(np.float32)


def squared_error(groups, levels, found, codes):
    decoded = levels[codes].astype(np.float64) * found[:, None]
    return np.sum((groups - decoded) ** 2, axis=1)


def scanned_error(groups, levels, n_scales=2000):
    """The least error over scales from a twentieth to ten times the RMS of each group."""
    middles = (levels[1:] + levels[:-1]) / 2
    rms = np.sqrt(np.mean(groups.astype(np.float64) ** 2, axis=1, keepdims=True))
    best = np.full(len(groups), np.inf)
    for factor in np.geomspace(0.05, 10, n_scales):
        scale = rms * factor
        decoded = levels[np.searchsorted(middles, groups / scale)] * scale
        best = np.minimum(best, np.sum((groups - decoded) ** 2, axis=1))
    return best


@pytest.mark.parametrize("bits", [TERNARY, 1, 2, 3, 4])
@pytest.mark.parametrize(("n_groups", "size"), [(200, 32), (100, 64), (50, 128), (10, 576)])
def test_error_is_that_of_a_scan_of_all_scales(bits, n_groups, size):
    groups, nearest = normal(n_groups, size), nearest_level(bits)
    error = squared_error(groups, nearest.levels, *best_scales(groups, nearest))
    assert error.sum() < 1.02 * scanned_error(groups, nearest.levels).sum()


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 6])
@pytest.mark.parametrize(("n_groups", "size"), [(100, 64), (10, 576)])
def test_groups_with_outliers_get_the_scale_that_they_need(bits, n_groups, size):
    groups, nearest = heavy_tailed(n_groups, size), nearest_level(bits)
    error = squared_error(groups, nearest.levels, *best_scales(groups, nearest))
    assert np.mean(error / scanned_error(groups, nearest.levels)) < 1.06


@pytest.mark.parametrize(("bits", "required", "usual"), [(2, 0.1115, 0.1112), (3, 0.0307, 0.0292), (4, 0.0081, 0.0069)])
def test_error_of_groups_of_64_is_below_the_known_numbers(bits, required, usual):
    groups, nearest = normal(12000, 64, seed=3), nearest_level(bits)
    error = squared_error(groups, nearest.levels, *best_scales(groups, nearest)).mean() / 64
    assert error <= required
    assert error == pytest.approx(usual, rel=0.01)


@pytest.mark.parametrize("bits", [TERNARY, 1, 4, 8])
def test_codes_are_nearest_for_scales_that_float16_holds(bits):
    groups, nearest = normal(20, 64) * 0.01, nearest_level(bits)
    found, codes = best_scales(groups, nearest)
    assert (found.dtype, codes.dtype, codes.shape) == (np.float32, np.uint8, (20, 64))
    np.testing.assert_array_equal(found, found.astype(np.float16))
    np.testing.assert_array_equal(codes, nearest.codes(groups / found[:, None]))


@pytest.mark.parametrize("bits", [TERNARY, 1, 2, 3, 8])
def test_zeros_get_the_scale_zero(bits):
    found, codes = best_scales(np.zeros((3, 32), np.float32), nearest_level(bits))
    assert found.tolist() == [0, 0, 0]
    assert codes.max() < len(nearest_level(bits).levels)


@pytest.mark.parametrize("bits", [TERNARY, *range(1, 9)])
@pytest.mark.parametrize("value", [0.37, -0.02])
def test_a_constant_group_is_met(bits, value):
    groups, nearest = np.full((2, 64), value, np.float32), nearest_level(bits)
    found, codes = best_scales(groups, nearest)
    np.testing.assert_allclose(nearest.levels[codes] * found[:, None], groups, rtol=2e-3)


@pytest.mark.parametrize("bits", [TERNARY, 2, 4, 8])
@pytest.mark.parametrize("magnitude", [1e-45, 1e-38, 1e-30, 1e-20, 1e-9])
def test_groups_too_small_for_float16_become_zeros(bits, magnitude):
    groups, nearest = normal(4, 64) * np.float32(magnitude), nearest_level(bits)
    found, codes = best_scales(groups, nearest)
    np.testing.assert_array_equal(nearest.levels[codes] * found[:, None], 0)


@pytest.mark.parametrize("bits", [TERNARY, 2, 4, 8])
def test_the_scale_ends_where_float16_ends(bits):
    found, _ = best_scales(normal(4, 64) * 1e6, nearest_level(bits))
    assert found.tolist() == [65504] * 4


def test_a_zero_among_normal_groups_changes_no_other():
    groups, nearest = normal(9, 64), nearest_level(3)
    expected, _ = best_scales(groups, nearest)
    groups[4] = 0
    found, _ = best_scales(groups, nearest)
    assert found[4] == 0
    np.testing.assert_array_equal(np.delete(found, 4), np.delete(expected, 4))


@pytest.mark.parametrize("threads", ["1", "5"])
def test_blocks_and_threads_do_not_change_the_result(monkeypatch, threads):
    groups, nearest = normal(301, 32), nearest_level(4)
    expected = best_scales(groups, nearest)
    monkeypatch.setattr(scales, "BLOCK", 100)
    monkeypatch.setenv("TQ_THREADS", threads)
    for found, whole in zip(best_scales(groups, nearest), expected, strict=True):
        np.testing.assert_array_equal(found, whole)


def test_blocks_cover_all_rows_once(monkeypatch):
    monkeypatch.setattr(scales, "BLOCK", 100)
    rows = [row for block in row_blocks(31, 32) for row in range(31)[block]]
    assert rows == list(range(31))
    assert all(block.stop - block.start == 1 for block in row_blocks(3, 1000))


def test_the_number_of_threads_can_be_set(monkeypatch):
    assert n_threads() >= 1
    monkeypatch.setenv("TQ_THREADS", "3")
    assert n_threads() == 3
    monkeypatch.setenv("TQ_THREADS", "many")
    with pytest.raises(UsageError, match="TQ_THREADS"):
        n_threads()


def test_inverse_of_zero_and_of_denormals_is_zero():
    assert inverse(np.array([0, 1e-45, 1e-39, 0.5], np.float32)).tolist() == [0, 0, 0, 2]
