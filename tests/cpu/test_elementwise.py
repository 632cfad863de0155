"""Norms, activations and exponentials at every instruction set of this processor, against float64 NumPy."""

import math

import numpy as np
import pytest
from native_harness import LEVELS, harness

SILU, GELU_TANH, GELU, RELU, RELU2, SWIGLU_OAI = range(6)
SIZES = [1, 3, 16, 17, 100, 576]


@pytest.fixture(params=LEVELS, ids=lambda level: level.name)
def kernels(request):
    return harness(request.param)


def exps(kernels, x: np.ndarray) -> np.ndarray:
    x = np.asarray(x, np.float32)
    y = np.full(x.size, 7, np.float32)
    kernels.exps(x.ctypes.data, y.ctypes.data, x.size)
    return y


def gated(kernels, activation: int, gate: np.ndarray, up: np.ndarray, alpha: float = 0, limit: float = 0) -> np.ndarray:
    y = gate.copy()  # in place
    kernels.gated(activation, alpha, limit, y.ctypes.data, up.ctypes.data, y.ctypes.data, y.size)
    return y


def test_exp_has_a_small_relative_error(kernels):
    x = np.linspace(-87.3, 88.7, 300_001, dtype=np.float32)
    exact = np.exp(x.astype(np.float64))
    assert (np.abs(exps(kernels, x) - exact) / exact).max() < 3e-7
    assert exps(kernels, [0.0, -0.0])[0] == 1


def test_exp_at_the_ends_of_its_range(kernels):
    tiny = exps(kernels, [-90, -100, -103])
    assert np.allclose(tiny, np.exp([-90.0, -100.0, -103.0]), rtol=0, atol=2e-45)
    assert np.array_equal(exps(kernels, [-105, -1e30, -np.inf, 89, 1e30, np.inf]), [0, 0, 0] + [np.inf] * 3)
    assert np.isnan(exps(kernels, [np.nan, -np.nan])).all()


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("activation", [SILU, GELU_TANH, GELU, RELU, RELU2, SWIGLU_OAI])
def test_activations(kernels, activation, n):
    random = np.random.default_rng(n)
    gate, up = (random.normal(0, 4, n).astype(np.float32) for _ in range(2))
    g, u = gate.astype(np.float64), up.astype(np.float64)
    alpha, limit = np.float32(1.702), np.float32(7)
    clamped = np.minimum(g, limit)
    expected = {
        SILU: g / (1 + np.exp(-g)) * u,
        GELU_TANH: g / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (g + 0.044715 * g**3))) * u,
        GELU: g / 2 * np.vectorize(math.erfc)(-g / math.sqrt(2)) * u,
        RELU: np.maximum(g, 0) * u,
        RELU2: np.maximum(g, 0) ** 2 * u,
        SWIGLU_OAI: clamped / (1 + np.exp(-float(alpha) * clamped)) * (np.clip(u, -limit, limit) + 1),
    }[activation]
    y = gated(kernels, activation, gate, up, alpha, limit)
    assert (np.abs(y - expected) <= 1e-6 * np.abs(expected) + 3e-7 * np.abs(g * u)).all()


@pytest.mark.parametrize("activation", [SILU, GELU_TANH, GELU, RELU, RELU2, SWIGLU_OAI])
def test_activations_of_unusual_values(kernels, activation):
    values = np.array([0, 100, -100, 1e30, np.nan, 1, 1e-40, 2], np.float32)
    ones = np.ones_like(values)
    y = gated(kernels, activation, values, ones, 1, 1e38)
    assert y[0] == 0 and y[1] == (1e4 if activation == RELU2 else 200 if activation == SWIGLU_OAI else 100)
    assert abs(y[2]) < 1e-20
    assert y[3] > 9e29
    assert np.array_equal(np.isnan(y), np.isnan(values))
    assert np.isnan(gated(kernels, activation, ones, ones * np.nan, 1, 1e38)).all()


@pytest.mark.parametrize("n", SIZES)
def test_norms(kernels, n):
    random = np.random.default_rng(n)
    x, weight = (random.normal(0.5, 2, n).astype(np.float32) for _ in range(2))
    wide = x.astype(np.float64)
    y = np.full(n, np.nan, np.float32)
    root = wide / np.sqrt((wide**2).mean() + 1e-5)
    kernels.rms_norm(x.ctypes.data, weight.ctypes.data, 1e-5, n, y.ctypes.data)
    assert np.allclose(y, root * weight, rtol=1e-5, atol=1e-6)
    kernels.rms_norm(x.ctypes.data, None, 1e-5, n, y.ctypes.data)
    assert np.allclose(y, root, rtol=1e-5, atol=1e-6)


def test_norms_keep_nan_and_bear_zeros(kernels):
    x = np.zeros(37, np.float32)
    kernels.rms_norm(x.ctypes.data, None, 1e-5, x.size, x.ctypes.data)
    assert np.array_equal(x, np.zeros(37))
    x[20] = np.nan
    kernels.rms_norm(x.ctypes.data, None, 1e-5, x.size, x.ctypes.data)
    assert np.isnan(x).all()


@pytest.mark.parametrize("n", SIZES)
def test_softmax(kernels, n):
    x = np.random.default_rng(n).normal(0, 30, n).astype(np.float32)
    if n > 1:
        x[n // 2] = -np.inf
    wide = np.exp(x.astype(np.float64) - x.max())
    total = kernels.softmax(x.ctypes.data, n)
    assert np.allclose(x, wide, rtol=1e-5, atol=1e-38)  # the difference from the largest is rounded
    assert math.isclose(total, wide.sum(), rel_tol=1e-5)


@pytest.mark.parametrize("at", range(5))
def test_softmax_of_nan_is_nan(kernels, at):
    x = np.arange(5, dtype=np.float32)
    x[at] = np.nan
    assert math.isnan(kernels.softmax(x.ctypes.data, 5))
