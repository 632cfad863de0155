"""The sketch of the residual: unbiased over random signs, and added to what the codes decode to."""

import math

import mlx.core as mx
import numpy as np
import pytest

from tq.engine.quantize import QuantSpec, decode, decode_rotated, encode, qjl
from tq.engine.quantize.packing import unpack
from tq.engine.quantize.rotation import random_signs, rotate

N = 512


def residuals(rows, n=N):
    return (0.01 * np.random.default_rng(0).uniform(-1, 1, (rows, n))).astype(np.float32)


def estimates(residual, monkeypatch, n_draws):
    """Estimates (n_draws, rows, n) with independent sign vectors."""
    found = []
    for draw in range(n_draws):
        monkeypatch.setattr(qjl, "SEED", 1000 + draw)
        n = residual.shape[1]
        found.append(np.array(qjl.decode(qjl.encode(residual) | qjl.shared(n), n, mx.float32)))
    return np.stack(found)


def test_inner_products_are_unbiased_over_random_signs(monkeypatch):
    residual = residuals(4)
    x = np.random.default_rng(1).standard_normal((6, N)).astype(np.float32)
    products = estimates(residual, monkeypatch, 1500) @ x.T  # (draws, rows, 6)
    expected = residual @ x.T
    standard_error = products.std(axis=0) / math.sqrt(len(products))
    assert np.abs((products.mean(axis=0) - expected) / standard_error).max() < 4
    assert np.all(standard_error < 0.05 * np.linalg.norm(residual) / 2 * np.linalg.norm(x) / math.sqrt(N))


def test_the_mean_of_many_estimates_is_the_residual(monkeypatch):
    residual = residuals(2)
    mean = estimates(residual, monkeypatch, 600).mean(axis=0)
    slope = np.sum(mean * residual) / np.sum(residual**2)
    assert slope == pytest.approx(1, abs=0.01)
    assert np.linalg.norm(mean - residual) < 0.05 * np.linalg.norm(residual)


def test_the_error_of_one_estimate_is_that_of_one_bit(monkeypatch):
    residual = residuals(8)
    error = np.mean((estimates(residual, monkeypatch, 20) - residual) ** 2) / np.mean(residual**2)
    assert error == pytest.approx(math.pi / 2 - 1, rel=0.02)


def test_signs_and_norms_are_those_of_the_projected_residual():
    residual = residuals(3, 100)
    arrays = qjl.encode(residual)
    projected = np.array(rotate(mx.array(residual), mx.array(random_signs(100, qjl.SEED))))
    np.testing.assert_array_equal(np.array(unpack(arrays["qjl_packed"], 1, 100)), projected >= 0)
    np.testing.assert_allclose(np.array(arrays["qjl_norms"]), np.linalg.norm(residual, axis=1), rtol=1e-3)


@pytest.mark.parametrize("shape", [(5, 100), (2, 3, 64)])
def test_layout_states_the_exact_arrays(shape):
    arrays = qjl.encode(residuals(math.prod(shape[:-1]), shape[-1]))
    for name, array in qjl.layout(shape).items():
        assert array.dtype == arrays[name].dtype
        assert math.prod(array.shape) == arrays[name].size
    assert qjl.layout(shape).keys() == arrays.keys()


def test_a_residual_of_zeros_is_zeros():
    arrays = qjl.encode(np.zeros((2, 64), np.float32)) | qjl.shared(64)
    assert np.array_equal(np.array(qjl.decode(arrays, 64, mx.float32)), np.zeros((2, 64)))


def test_projection_and_rotation_use_different_signs():
    assert qjl.SEED != 0
    assert not np.array_equal(np.array(qjl.shared(N)["qjl_signs"]), random_signs(N))


@pytest.mark.parametrize("rotation", ["hadamard", "none"])
def test_the_sketch_describes_what_the_codes_left(rotation):
    weight = mx.array(residuals(6, 256))
    plain = encode(weight, QuantSpec("lloyd-max", 2, 64, rotation))
    both = encode(weight, QuantSpec("lloyd-max", 2, 64, rotation, qjl=True))
    for name in plain.arrays:
        np.testing.assert_array_equal(np.array(both.arrays[name]), np.array(plain.arrays[name]))
    left = np.array(weight - decode(plain))
    np.testing.assert_allclose(np.array(both.arrays["qjl_norms"]), np.linalg.norm(left, axis=1), rtol=2e-3)
    sketch = qjl.decode(both.arrays, 256, mx.float32)
    np.testing.assert_allclose(np.array(decode_rotated(plain) + sketch), np.array(decode_rotated(both)), atol=1e-7)
    # The estimate leans towards the residual: their cosine is sqrt(2/pi).
    estimate = np.array(decode(both) - decode(plain))
    cosine = np.sum(estimate * left, axis=1) / np.linalg.norm(estimate, axis=1) / np.linalg.norm(left, axis=1)
    np.testing.assert_allclose(cosine, math.sqrt(2 / math.pi), atol=0.06)
