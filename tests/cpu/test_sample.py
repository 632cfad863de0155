"""The compiled sampler keeps what mlx-lm's samplers keep, draws in proportion, and its log-probabilities are right."""

import mlx.core as mx
import numpy as np
import pytest

from tq.cpu import lazy, library

pytestmark = pytest.mark.skipif(not library.state().active, reason=library.state().reason)


def sample(logits, uniform, temperature=1.0, top_p=1.0, min_p=0.0, top_k=0):
    params = library.SampleParams(temperature, top_p, min_p, top_k)
    inputs = [mx.array(logits, mx.float32)[None], mx.array([float(uniform)])]
    token, logprob = lazy.call("tq_sample", params, inputs, [((1,), mx.uint32), ((1,), mx.float32)])
    return token.item(), logprob.item()


def random_logits(size, seed=0, spread=3.0):
    return np.random.default_rng(seed).standard_normal(size).astype(np.float32) * np.float32(spread)


def log_softmax(logits):
    logits = logits.astype(np.float64)
    return logits - np.log(np.exp(logits - logits.max()).sum()) - logits.max()


@pytest.mark.parametrize("size", [1, 2, 255, 256, 257, 5003])
def test_greedy_is_the_first_largest_and_its_log_probability_exact(size):
    logits = random_logits(size, size)
    logits[size // 2 :] = np.minimum(logits[size // 2 :], logits[: size // 2 + 1].max())  # ties come later
    token, logprob = sample(logits, 0.0, temperature=0.0)
    assert token == int(mx.argmax(mx.array(logits)).item())
    assert logprob == pytest.approx(log_softmax(logits)[token], abs=1e-5)


def kept_by_mlx_lm(logits, top_p, min_p, top_k):
    """The tokens that mlx-lm's filters leave, in its order."""
    from mlx_lm.sample_utils import apply_min_p, apply_top_k, apply_top_p

    logprobs = mx.array(log_softmax(logits).astype(np.float32))[None]
    if top_p < 1:
        logprobs = apply_top_p(logprobs, top_p)
    if min_p > 0:
        logprobs = apply_min_p(logprobs, min_p)
    if top_k > 0:
        logprobs = apply_top_k(logprobs, top_k)
    return np.isfinite(np.array(logprobs[0]))


@pytest.mark.parametrize("spread", [0.1, 4.0])
@pytest.mark.parametrize(
    ("top_p", "min_p", "top_k"),
    [(1, 0, 0), (0.9, 0, 0), (0.02, 0, 0), (1, 0.1, 0), (1, 0, 7), (1, 0, 300), (0.8, 0.05, 20), (0.999, 0, 290)],
)
def test_filters_and_proportions_are_those_of_mlx_lm(top_p, min_p, top_k, spread):
    logits = random_logits(301, 3, spread)
    kept = kept_by_mlx_lm(logits, top_p, min_p, top_k if top_k < 301 else 0)
    # Equally spaced draws meet every kept token as often as its probability says.
    draws = 500
    tokens = [sample(logits, (i + 0.5) / draws, 0.7, top_p, min_p, top_k)[0] for i in range(draws)]
    expected = np.where(kept, np.exp((logits.astype(np.float64) - logits.max()) / 0.7), 0)
    expected *= draws / expected.sum()
    counts = np.bincount(tokens, minlength=301)
    assert not counts[~kept].any()
    assert np.abs(counts - expected).max() <= 1.01


@pytest.mark.parametrize("uniform", [0.0, 0.5, np.nextafter(np.float32(1), np.float32(0))])
def test_the_ends_of_the_unit_interval_give_tokens_that_can_be(uniform):
    logits = random_logits(1000, 5)
    logits[[0, 1, 998, 999]] = -np.inf
    token, logprob = sample(logits, uniform, temperature=2.0)
    assert np.isfinite(logits[token])
    assert logprob == pytest.approx(log_softmax(logits)[token], abs=1e-5)


def test_one_certain_token_among_impossible_ones():
    logits = np.full(700, -np.inf, np.float32)
    logits[333] = 4.0
    for options in ({}, {"top_p": 0.5}, {"min_p": 0.3}, {"top_k": 5}, {"temperature": 0.0}):
        assert sample(logits, 0.999, **options) == (333, pytest.approx(0, abs=1e-6))


def test_not_a_number_gives_a_token_of_the_vocabulary_and_no_probability():
    logits = random_logits(64)
    logits[5] = np.nan
    for options in ({}, {"top_p": 0.5}, {"temperature": 0.0}, {"top_k": 3}):
        token, logprob = sample(logits, 0.4, **options)
        assert 0 <= token < 64
        assert np.isnan(logprob)
