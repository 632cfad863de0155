"""Attention over packed segments is attention over what they decode to, in float64, step by step as at once."""

import mlx.core as mx
import numpy as np
import pytest
from kv_cases import relative, vectors

from tq.engine.cache import attention
from tq.engine.cache.attention import Packed, Plain, attend, decoded
from tq.engine.cache.codecs import make


def segments(counts=(5, 130, 37), heads=2, key_dim=64, value_dim=64, batch=1, first=3, codecs=None):
    """Sink, packed and recent tokens, each in arrays with garbage around them."""
    made, seed = [], 0
    for i, count in enumerate(counts):
        k, v = (vectors(count + first + 4, d, heads, batch, seed + s) for s, d in enumerate((key_dim, value_dim)))
        seed += 2
        if i != 1:
            spoiled = [
                mx.concatenate([x[:, :, :count], mx.full(x[:, :, count:].shape, mx.nan)], axis=2) for x in (k, v)
            ]
            made.append(Plain(*spoiled, count))
            continue
        pair = codecs or (make("lloyd-max", 8, key_dim, 0), make("lloyd-max", 3, value_dim, 0))
        fitted = tuple(codec.fit(x) for codec, x in zip(pair, (k, v), strict=True))
        arrays = [codec.encode(codec.rotate(x, f)) for codec, x, f in zip(pair, (k, v), fitted, strict=True)]
        made.append(Packed(*arrays, count, first, pair, fitted))
    return made


def expected(q, keys, values, scale, mask=None, sinks=None, softcap=0.0):
    q, keys, values = (np.array(x, np.float64) for x in (q, keys, values))
    group, (length, total) = q.shape[1] // keys.shape[1], (q.shape[2], keys.shape[2])
    scores = q @ np.repeat(keys, group, 1).swapaxes(2, 3) * scale
    if softcap:
        scores = softcap * np.tanh(scores / softcap)
    if isinstance(mask, str):
        mask = np.arange(total) <= np.arange(total - length, total)[:, None]
    if mask is not None:
        mask = np.array(mask)
        scores = np.where(mask, scores, -1e300) if mask.dtype == bool else scores + mask
    if sinks is not None:
        scores = np.concatenate([scores, np.broadcast_to(np.array(sinks)[:, None, None], (*scores.shape[:3], 1))], 3)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return (weights / weights.sum(-1, keepdims=True))[..., :total] @ np.repeat(values, group, 1)


MASKS = {
    "none": lambda n, total: None,
    "causal": lambda n, total: "causal",
    "bool": lambda n, total: mx.array(np.random.default_rng(7).random((n, total)) > 0.3),
    "bool of each head": lambda n, total: mx.array(np.random.default_rng(7).random((2, 6, n, total)) > 0.3),
    "bool of all rows": lambda n, total: mx.arange(total) > 20,
    "bias of each head": lambda n, total: vectors(n, total, heads=6, seed=9),
    "minus infinity": lambda n, total: mx.where(mx.arange(total) > 20, 0.0, -mx.inf)[None, None, None],
}


@pytest.mark.parametrize("step", [1 << 22, 1])
@pytest.mark.parametrize("mask", MASKS)
def test_masks(mask, step, monkeypatch):
    monkeypatch.setattr(attention, "STEP_NUMBERS", step)
    view = segments(batch=2)
    keys, values = decoded(view, mx.float32)
    q, made = vectors(9, 64, heads=6, batch=2, seed=20), MASKS[mask](9, 172)
    got = attend(q, view, 0.2, made)
    assert got.dtype == mx.float32
    assert relative(got, expected(q, keys, values, 0.2, made)) < 1e-5


@pytest.mark.parametrize("counts", [(0, 0, 1), (5, 0, 0), (0, 64, 0), (4, 64, 1), (0, 1, 70)])
@pytest.mark.parametrize("length", [1, 7])
def test_parts_may_be_empty(counts, length):
    view = segments(counts)
    q, total = vectors(length, 64, heads=4, seed=20), sum(counts)
    if length > total:
        pytest.skip("more queries than tokens")
    assert relative(attend(q, view, 0.1, "causal"), expected(q, *decoded(view, mx.float32), 0.1, "causal")) < 1e-5


@pytest.mark.parametrize("dims", [(64, 32), (40, 120), (33, 17), (192, 128)])
def test_values_of_another_dimension(dims):
    view = segments(key_dim=dims[0], value_dim=dims[1])
    q = vectors(2, dims[0], heads=2, seed=20)
    assert relative(attend(q, view, 0.1), expected(q, *decoded(view, mx.float32), 0.1)) < 1e-5


def test_latent_attention_has_one_array_for_both():
    view = segments(heads=1, key_dim=96, value_dim=32)
    keys, _ = decoded(view, mx.float32)
    q = vectors(1, 96, heads=8, seed=20)
    got = attend(q, view, 0.1, values_are_keys=True)
    assert got.shape == (1, 8, 1, 96)
    assert relative(got, expected(q, keys, keys, 0.1)) < 1e-5


@pytest.mark.parametrize("mask", ["none", "causal"])
def test_sinks_and_soft_caps(mask):
    view = segments()
    q, sinks = vectors(5, 64, heads=4, seed=20), mx.array([3.0, -2.0, 0.0, 30.0])
    how = {"sinks": sinks, "softcap": 2.0, "mask": None if mask == "none" else mask}
    assert relative(attend(q, view, 0.4, **how), expected(q, *decoded(view, mx.float32), 0.4, **how)) < 1e-5


def test_fitted_codecs():
    view = segments(codecs=(make("lloyd-max", 2.5, 64, 0), make("lloyd-max", 3.5, 64, 0)))
    q = vectors(3, 64, heads=6, seed=20)
    assert relative(attend(q, view, 0.1), expected(q, *decoded(view, mx.float32), 0.1)) < 1e-5


def test_half_precision_comes_back_as_it_came():
    view = segments()
    q = vectors(2, 64, heads=2, seed=20)
    for dtype in (mx.bfloat16, mx.float16):
        got = attend(q.astype(dtype), view, 0.1)
        assert got.dtype == dtype
        assert relative(got.astype(mx.float32), attend(q, view, 0.1)) < 0.02


def test_queries_that_see_nothing_give_no_nan():
    view = segments()
    mask = mx.zeros((3, 172), mx.bool_)
    assert mx.isfinite(attend(vectors(3, 64, heads=2), view, 0.1, mask)).all()


def test_a_mask_of_another_length_is_refused():
    with pytest.raises(ValueError, match="over 171 tokens does not fit a cache of 172"):
        attend(vectors(1, 64), segments(), 0.1, mx.ones((1, 171), mx.bool_))


def test_memory_is_bounded(monkeypatch):
    """What is decoded at once does not grow with the number of tokens."""
    monkeypatch.setattr(attention, "STEP_NUMBERS", 1 << 18)
    tokens, made = 1 << 14, []
    (view,) = [part for part in segments((0, tokens, 0), first=0) if part.count]
    mx.eval(view.keys, view.values)
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    made.append(attend(vectors(1, 64, heads=2), [view], 0.1))
    mx.eval(made)
    decoded_bytes = tokens * 2 * (64 + 64) * 4
    assert mx.get_peak_memory() - before < 0.7 * decoded_bytes
