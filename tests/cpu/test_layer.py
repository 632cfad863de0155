"""A decoder layer as one kernel against float64 NumPy, which decodes the same codes and keeps its own cache."""

from typing import Any

import numpy as np
import pytest
from packed_matrix import relative_error
from reference_layer import ATTENTION, FEED_FORWARD, Layer, caches, tokens

KINDS: dict[str, dict[str, Any]] = {
    "llama": {},
    "without norms": {"norms": ()},
    "all norms": {
        "norms": ("before_attention", "after_attention", "before_feed_forward", "after_feed_forward"),
        "residual": 0.3,
        "activation": 1,
    },
    "norms afterwards": {"norms": ("after_attention", "after_feed_forward"), "head_norm": "whole"},
    "norms of heads": {"head_norm": "head"},
    "norms after the embedding": {"head_norm": "head", "norm_after_rope": True},
    "fused": {"fused": True},
    "biases": {"bias": True},
    "biases, fused": {"bias": True, "fused": True},
    "rotations apart": {"rotations": "apart"},
    "no rotation": {"rotations": "none"},
    "interleaved": {"interleaved": True, "rope_dims": 12},
    "scaled embedding": {"position_scale": 0.25, "multiplier": 1.3, "rope_dims": 8},
    "no embedding": {"rope_dims": 0},
    "soft cap": {"softcap": 1.5, "scale": 2.0},
    "sinks": {"sinks": True},
    "gated": {"gated": True, "head_norm": "head"},
    "gated, fused": {"gated": True, "fused": True},
    "long values": {"value_dim": 36},
    "one head": {"n_heads": 1, "n_kv_heads": 1, "head_dim": 64, "value_dim": 64},
    "gelu": {"activation": 2},
    "relu": {"activation": 3},
    "squared relu": {"activation": 4},
    "bare": {"bare": True, "norms": ()},
}
MIXTURES: dict[str, dict[str, Any]] = {
    "softmax": {},
    "normalized": {"router": {"normalize": True}},
    "one": {"k": 1},
    "all": {"k": 12, "router": {"factor": 2.5}},
    "sigmoid": {"router": {"sigmoid": True, "normalize": True, "factor": 1.5}, "correction": True},
    "biased": {"router_bias": True, "router": {"normalize": True}},
    "groups": {"router": {"sigmoid": True, "groups": 4, "kept_groups": 2}, "correction": True},
    "packed": {"packed_router": True},
    "shared": {"shared": "plain", "router": {"normalize": True}},
    "shared, gated": {"shared": "gated"},
    "without norms": {"norms": ()},
    "other activation": {"activation": 1, "bare": True},
    "an odd number": {"experts": 13, "k": 4, "router_bias": True},
}


@pytest.mark.parametrize("n", [1, 5])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_layer_matches_float64(kind, n):
    layer = Layer(**KINDS[kind])
    x = tokens(layer, n)
    ours, theirs = caches(layer, 11, 20), [a.astype(np.float64) for a in caches(layer, 11, 20)]
    y = layer.run(x, ours, position=11, row=11)
    assert relative_error(y, layer.expected(x, theirs, position=11, row=11)) < 1e-5
    for got, expected in zip(ours, theirs, strict=True):
        assert relative_error(got[:, :, : 11 + n], expected[:, :, : 11 + n]) < 1e-5
        assert np.isnan(got[:, :, 11 + n :]).all()


@pytest.mark.parametrize("n", [2, 16, 257, 600])
def test_prompts_of_any_length_match_float64(n):
    layer = Layer()
    x = tokens(layer, n)
    ours, theirs = caches(layer, 7, 7 + n), [a.astype(np.float64) for a in caches(layer, 7, 7 + n)]
    y = layer.run(x, ours, position=7, row=7)
    assert relative_error(y, layer.expected(x, theirs, position=7, row=7)) < 1e-5
    assert relative_error(ours[0], theirs[0]) < 1e-5


@pytest.mark.parametrize("n", [1, 9, 300])
def test_without_a_cache_the_prompt_is_all_there_is(n):
    layer = Layer()
    x = tokens(layer, n)
    assert relative_error(layer.run(x), layer.expected(x)) < 1e-5


@pytest.mark.parametrize("parts", [ATTENTION, FEED_FORWARD])
@pytest.mark.parametrize("n", [1, 300])
def test_either_half_alone(parts, n):
    layer = Layer()
    x = tokens(layer, n)
    cache, wide = caches(layer, 3, 310), [a.astype(np.float64) for a in caches(layer, 3, 310)]
    if parts == FEED_FORWARD:
        cache = wide = None
    y = layer.run(x, cache, parts=parts, position=3, row=3)
    assert relative_error(y, layer.expected(x, wide, parts=parts, position=3, row=3)) < 1e-5


@pytest.mark.parametrize("n", [1, 2, 150])
@pytest.mark.parametrize("kind", MIXTURES)
def test_mixtures_of_experts_match_float64(kind, n):
    layer = Layer(**{"experts": 12, **MIXTURES[kind]})
    x = tokens(layer, n)
    y = layer.run(x, parts=FEED_FORWARD)
    assert relative_error(y, layer.expected(x, parts=FEED_FORWARD)) < 1e-5
    assert relative_error(layer.run(x), layer.expected(x)) < 1e-5


def test_experts_of_a_token_that_is_not_a_number():
    layer = Layer(experts=12)
    x = tokens(layer, 3)
    x[1, 5] = np.nan
    y = layer.run(x, parts=FEED_FORWARD)
    assert np.isnan(y[1]).all()
    assert relative_error(y[[0, 2]], layer.expected(x[[0, 2]], parts=FEED_FORWARD)) < 1e-5


def test_a_ring_is_seen_whole_wherever_the_token_goes():
    layer = Layer()
    x = tokens(layer, 1)
    where = {"position": 40, "row": 4, "rows": 12, "causal": False}
    ours, theirs = caches(layer, 12, 12), [a.astype(np.float64) for a in caches(layer, 12, 12)]
    y = layer.run(x, ours, **where)
    assert relative_error(y, layer.expected(x, theirs, **where)) < 1e-5
    assert relative_error(ours[1], theirs[1]) < 1e-5


def test_without_causality_every_token_sees_all():
    layer = Layer()
    x = tokens(layer, 280)
    y = layer.run(x, causal=False)
    assert relative_error(y, layer.expected(x, causal=False)) < 1e-5
    assert relative_error(y, layer.expected(x)) > 0.01


@pytest.mark.parametrize("shape", [(300, 310), (1, 310), (310,), (6, 300, 310), (1, 6, 1, 310), (1, 1, 300, 310)])
@pytest.mark.parametrize("dtype", [bool, np.float32])
def test_masks_of_any_shape(shape, dtype):
    layer = Layer()
    x = tokens(layer, 300)
    random = np.random.default_rng(3)
    mask = random.random(shape) < 0.5 if dtype is bool else random.normal(0, 2, shape).astype(np.float32)
    mask[..., 0] = True  # nobody sees nothing
    ours, theirs = caches(layer, 10, 310), [a.astype(np.float64) for a in caches(layer, 10, 310)]
    where = {"position": 10, "row": 10, "causal": False}
    y = layer.run(x, ours, mask=mask, **where)
    wide = mask.reshape(mask.shape[-3:]) if mask.ndim == 4 else mask
    assert relative_error(y, layer.expected(x, theirs, mask=wide, **where)) < 1e-5


def test_factors_of_the_queries():
    layer = Layer()
    x = tokens(layer, 270)
    factors = np.random.default_rng(1).uniform(0.5, 2, (270, 1)).astype(np.float32)
    assert relative_error(layer.run(x, factors=factors), layer.expected(x, factors=factors)) < 1e-5


def test_half_precision_caches_round_what_they_hold_and_nothing_else():
    layer = Layer()
    x = tokens(layer, 4)
    ours = caches(layer, 9, 16, np.float16)
    theirs = [a.astype(np.float64) for a in ours]
    y = layer.run(x, ours, position=9, row=9)
    expected = layer.expected(x, theirs, position=9, row=9)
    assert relative_error(y, expected) < 1e-3
    for got, wanted in zip(ours, theirs, strict=True):
        assert got.dtype == np.float16
        assert np.array_equal(got[:, :, :9], wanted[:, :, :9])
        np.testing.assert_allclose(got[:, :, 9:13], wanted[:, :, 9:13], rtol=2**-11, atol=1e-5)
        assert np.isnan(got[:, :, 13:]).all()


@pytest.mark.parametrize("n", [1, 40])
def test_int8_activations_are_close(n):
    layer = Layer(hidden=192, inner=320, n_heads=6, n_kv_heads=2, head_dim=32, value_dim=32, rope_dims=32)
    x = tokens(layer, n)
    expected = layer.expected(x)
    assert relative_error(layer.run(x, exact=False), expected) < 0.04  # four products in a row
    assert relative_error(layer.run(x), expected) < 1e-5


def test_not_a_number_reaches_those_that_see_it():
    layer = Layer()
    x = tokens(layer, 6)
    x[3, 17] = np.nan
    for exact in (True, False):
        ours = caches(layer, 0, 6)
        assert np.isnan(layer.run(x, ours, exact=exact)[3:]).all()
        assert np.isfinite(ours[0][:, :, :3]).all()
        assert np.isnan(ours[0][:, :, 3]).all()


def test_positions_far_away_turn_as_in_float32():
    """The angle is position times frequency rounded to float32, as in MLX: a float64 angle would be another one."""
    layer = Layer(norms=())
    x = tokens(layer, 3)
    ours, there = caches(layer, 0, 3), 100_003
    layer.run(x, ours, position=there)
    keys = layer.qkv[1](x.astype(np.float64)).reshape(3, 2, 20).swapaxes(0, 1)
    angles = (np.float32(there) + np.arange(3, dtype=np.float32))[:, None] * layer.frequencies
    a, b = np.split(keys, 2, -1)
    cos, sin = np.cos(angles.astype(np.float64)), np.sin(angles.astype(np.float64))
    expected = np.concatenate([a * cos - b * sin, a * sin + b * cos], -1)
    assert relative_error(ours[0][0], expected) < 1e-5


def test_layers_with_other_embeddings_alternate():
    """Tables of angles are kept between calls, and must not be taken for others."""
    layers = [Layer(rope_dims=dims, multiplier=m) for dims in (20, 12) for m in (1.0, 1.5, 2.0)]
    for n, position in ((1, 5), (3, 5), (1, 6), (1, 5)):
        for layer in layers:
            x = tokens(layer, n)
            got = layer.run(x, position=position)
            assert relative_error(got, layer.expected(x, position=position)) < 1e-5
