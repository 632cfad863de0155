"""Second moments of inputs, and of the inputs of experts, against float64 NumPy."""

import mlx.core as mx
import numpy as np
import pytest

from tq.engine.quantize import moments as moments_module
from tq.engine.quantize.feedback import Feedback
from tq.engine.quantize.moments import ROWS, expert_moments_of, moments_of


def inputs(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def products(rows):
    return rows.T.astype(np.float64) @ rows


@pytest.mark.parametrize("shape", [(1, 1, 5), (3, 7, 33), (ROWS + 3, 4)])
def test_moments_are_those_of_all_rows(shape):
    x = inputs(*shape)
    found = moments_of(mx.array(x))
    rows = x.reshape(-1, shape[-1])
    assert (found.count, found.total.dtype) == (len(rows), np.float32)
    np.testing.assert_allclose(found.mean(), products(rows) / len(rows), atol=1e-5)


def test_half_precision_inputs_are_summed_in_float32():
    x = mx.array(inputs(3000, 6) + 10).astype(mx.float16)
    np.testing.assert_allclose(moments_of(x).total, products(np.array(x).astype(np.float64)), rtol=1e-4)


def by_expert(rows, experts, n_experts):
    return np.stack([products(rows[experts == e]) for e in range(n_experts)])


@pytest.mark.parametrize("layout", ["a row for every choice", "a row for every token", "one choice for all tokens"])
def test_moments_of_experts(layout):
    n_experts, n = 5, 12
    rng = np.random.default_rng(3)
    if layout == "a row for every choice":  # as mlx-lm sorts them by expert
        experts = np.sort(rng.integers(0, 4, 40))
        x, rows, flat = inputs(40, 1, n), inputs(40, n), experts
    elif layout == "a row for every token":
        experts = rng.integers(0, 4, (2, 10, 3))
        x = inputs(2, 10, 1, 1, n)
        rows, flat = np.repeat(x.reshape(-1, n), 3, axis=0), experts.reshape(-1)
    else:
        experts = np.array([[2, 0]])
        x = inputs(7, 2, 1, n)
        rows, flat = x.reshape(-1, n), np.tile([2, 0], 7)
    found = expert_moments_of(mx.array(x), mx.array(experts), n_experts)
    own = by_expert(rows.reshape(-1, n), flat, n_experts)
    np.testing.assert_allclose(found.own, own, atol=1e-4)
    np.testing.assert_allclose(found.total, own.sum(axis=0), atol=1e-4)
    np.testing.assert_array_equal(found.counts, np.bincount(flat, minlength=n_experts))
    assert found.count == len(flat)


def test_an_expert_that_saw_little_takes_the_moments_of_all():
    n, n_experts = 8, 3
    x = np.concatenate([inputs(4000, 1, n) * np.linspace(0.1, 3, n, dtype=np.float32), inputs(2, 1, n, seed=1)])
    experts = np.array([0] * 4000 + [1] * 2)
    found = expert_moments_of(mx.array(x), mx.array(experts), n_experts)
    often, seldom, never = (feedback.moments for feedback in found.feedback())
    own = by_expert(x[:, 0], experts, n_experts)
    common = own.sum(axis=0) / 4002
    np.testing.assert_allclose(never, common, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(seldom, (own[1] + n * common) / (2 + n), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(often, own[0] / 4000, rtol=0.01, atol=0.01)


def test_experts_share_moments_that_would_not_fit(monkeypatch):
    monkeypatch.setattr(moments_module, "OWN_MOMENTS_BYTES", 4 * 3 * 16**2 - 1)
    x, experts = inputs(30, 1, 16), np.random.default_rng(0).integers(0, 3, 30)
    found = expert_moments_of(mx.array(x), mx.array(experts), 3)
    assert found.own is None
    np.testing.assert_array_equal(found.counts, np.bincount(experts, minlength=3))
    assert isinstance(found.feedback(), Feedback)
    np.testing.assert_allclose(found.feedback().moments, products(x[:, 0]) / 30, atol=1e-5)
