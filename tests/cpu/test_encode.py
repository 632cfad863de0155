"""The compiled search for scales finds what the NumPy search finds, as well and as exactly."""

import numpy as np
import pytest

from tq.cpu import library
from tq.engine.quantize import scales
from tq.engine.quantize.codebooks import stored_codebook
from tq.engine.quantize.nearest import NearestLevel

pytestmark = pytest.mark.skipif(not library.state().active, reason=library.state().reason)


def both(groups, nearest, monkeypatch):
    compiled = scales.best_scales(groups, nearest)
    inactive = library.LibraryState(False, "switched off by the test")
    with monkeypatch.context() as patch:
        patch.setattr(scales.library, "state", lambda: inactive)
        return compiled, scales.best_scales(groups, nearest)


def groups_of(size, n=301, outliers=False):
    rng = np.random.default_rng(size)
    groups = rng.standard_normal((n, size)).astype(np.float32) * rng.uniform(1e-4, 50, (n, 1)).astype(np.float32)
    if outliers:
        groups[:, 0] *= 12
    groups[7] = 0
    return groups


@pytest.mark.parametrize("outliers", [False, True])
@pytest.mark.parametrize("size", [1, 3, 32, 64, 100, 577])
@pytest.mark.parametrize("bits", [0, 1, 2, 3, 4, 5, 8])
def test_compiled_scales_are_as_good_and_codes_the_nearest(bits, size, outliers, monkeypatch):
    nearest = NearestLevel(stored_codebook("lloyd-max" if bits else "ternary", bits))
    groups = groups_of(size, outliers=outliers)
    (got, codes), (expected, _) = both(groups, nearest, monkeypatch)
    assert np.array_equal(got, got.astype(np.float16).astype(np.float32))
    assert got[7] == 0
    assert np.array_equal(codes, nearest.codes(groups * scales.inverse(got)[:, None]))

    def error(scale):
        levels = nearest.levels[nearest.codes(groups * scales.inverse(scale)[:, None])] * scale[:, None]
        return ((levels.astype(np.float64) - groups) ** 2).sum(axis=1) / np.maximum((groups**2).sum(axis=1), 1e-30)

    # Sums in another order may lead to another of two equally good scales, not to a worse one.
    assert error(got).mean() <= error(expected).mean() * 1.001 + 1e-7
    assert np.isclose(got, expected, rtol=2e-3).mean() > 0.75


def test_values_at_the_ends_of_float16(monkeypatch):
    nearest = NearestLevel(stored_codebook("lloyd-max", 4))
    groups = np.array([[65504.0, -65504.0] * 8, [6e-8, -6e-8] * 8, [1e-30, 0.0] * 8, [np.nan, 1.0] * 8], np.float32)
    (got, codes), (expected, _) = both(groups, nearest, monkeypatch)
    assert np.allclose(got[:3], expected[:3], rtol=2e-3)
    assert codes.max() < 16
