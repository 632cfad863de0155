"""Scores of logits against float64 NumPy, and their means."""

import math

import mlx.core as mx
import numpy as np
import pytest

from tq.engine.run import scores


def log_softmax(x):
    x = x.astype(np.float64)
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


@pytest.mark.parametrize("shape", [(1, 1, 7), (2, 13, 101), (3, 70, 33)])
@pytest.mark.parametrize("chunk", [2**24, 200])
def test_scores_are_those_of_numpy(shape, chunk, monkeypatch):
    monkeypatch.setattr(scores, "_CHUNK_ELEMENTS", chunk)
    rng = np.random.default_rng(3)
    p, q = (rng.normal(0, 4, shape).astype(np.float32) for _ in range(2))
    targets = rng.integers(0, shape[-1], shape[:2])
    found = scores.score(mx.array(p), mx.array(targets), mx.array(q))
    log_p, log_q = log_softmax(p), log_softmax(q)
    np.testing.assert_allclose(
        found["nll"], -np.take_along_axis(log_p, targets[..., None], -1)[..., 0], rtol=1e-4, atol=1e-5
    )
    np.testing.assert_allclose(
        found["reference_nll"], -np.take_along_axis(log_q, targets[..., None], -1)[..., 0], rtol=1e-4, atol=1e-5
    )
    np.testing.assert_allclose(found["kl"], (np.exp(log_q) * (log_q - log_p)).sum(-1), rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(found["same_top1"], p.argmax(-1) == q.argmax(-1))


def test_without_a_reference_there_is_only_the_likelihood():
    found = scores.score(mx.zeros((1, 3, 5)), mx.zeros((1, 3), mx.int32), None)
    assert list(found) == ["nll"]
    np.testing.assert_allclose(found["nll"], math.log(5), rtol=1e-6)


def test_what_both_exclude_is_no_divergence():
    logits = mx.array([[[0.0, 1.0, -math.inf]]])
    found = scores.score(logits, mx.array([[1]]), logits)
    assert found["kl"].item() == 0


def test_the_summary_takes_windows_as_samples():
    rng = np.random.default_rng(0)
    nll, kl = rng.random((4, 9)) * 3, rng.random((4, 9))
    same = rng.random((4, 9)) < 0.8
    found = scores.summary({"nll": nll, "reference_nll": nll / 2, "kl": kl, "same_top1": same})
    assert found["perplexity"] == pytest.approx(math.exp(nll.mean()))
    assert found["perplexity_error"] == pytest.approx(math.exp(nll.mean()) * nll.mean(1).std(ddof=1) / 2)
    assert found["kl_p99"] == pytest.approx(np.percentile(kl, 99))
    assert found["top1_agreement"] == same.mean()
    assert scores.summary({"nll": nll[:1]}) == {
        "perplexity": pytest.approx(math.exp(nll[0].mean())),
        "perplexity_error": None,
    }
