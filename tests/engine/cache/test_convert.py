"""Caches of every kind of attention are packed where they can be, and kept with a reason where they cannot."""

import copy

import mlx.core as mx
import numpy as np
import pytest
from kv_cases import relative, run, token_ids, vectors
from mlx_lm.models.cache import (
    ArraysCache,
    BatchKVCache,
    CacheList,
    ChunkedKVCache,
    KVCache,
    QuantizedKVCache,
    RotatingKVCache,
    make_prompt_cache,
)
from tiny_models import build

import tq
from tq.engine.cache import hook
from tq.engine.cache.convert import pack, summary
from tq.engine.cache.packed import PackedKVCache
from tq.engine.cache.settings import KVSettings
from tq.engine.cache.window import PackedRotatingKVCache
from tq.errors import TQError

SETTINGS = KVSettings(8, 8, sink=4, window=16)
KINDS = {
    "llama": "grouped queries",
    "gpt_neox": "a head for each query",
    "gpt_oss": "attention sinks",
    "deepseek_v3": "latent attention",
    "deepseek_v32": "latent attention with an index",
    "longcat_flash": "two latent attentions in a layer",
    "gemma2": "soft caps",
    "gemma3n": "layers that share keys",
    "gemma4_text": "layers that are given keys",
    "llama4_text": "chunked attention",
    "qwen3_next": "linear attention",
    "falcon_h1": "a state space beside attention",
    "jamba": "state spaces between attention",
    "phi": "a part of a head with positions",
    "minimax_m3_vl": "blocks chosen by an index",
    "mpt": "biases of positions",
}


@pytest.mark.parametrize("model_type", [name for name in KINDS if name in __import__("tiny_models").CONFIGS])
def test_a_model_reads_packed_caches(model_type, reference):
    model, tokens, steps = build(model_type), token_ids(150), [100, 1, 46, 1, 1, 1]
    plain = run(model, make_prompt_cache(model), tokens, steps)
    results = []
    for hooked in (True, False):
        caches = make_prompt_cache(model)
        events = tq.upgrade_cache(caches, SETTINGS, model=model if hooked else None, model_family=model_type)
        assert any(event.action == "packed" for event in events)
        assert {event.layer for event in events} == set(range(len(caches)))
        assert all(event.action == "packed" or event.reason for event in events)
        results.append(run(model, caches, tokens, steps))
        hook.uninstall()
    assert relative(results[0], results[1]) < 1e-3
    assert relative(results[0], plain) < 0.05  # an index may choose other tokens


def test_soft_caps_sinks_and_latents_are_read_packed(reference, monkeypatch):
    read = []
    real = PackedKVCache.attend

    def attend(self, queries, *rest, **how):
        found = real(self, queries, *rest, **how)
        if found is not None:
            read.append((queries.shape[2], how["sinks"] is not None))
        return found

    monkeypatch.setattr(PackedKVCache, "attend", attend)
    for model_type, expected in (("gpt_oss", {(100, True), (1, True)}), ("deepseek_v3", {(1, False)})):
        read.clear()
        model, caches = build(model_type), None
        caches = tq.convert_cache(make_prompt_cache(model), SETTINGS, model)
        run(model, caches, token_ids(101), [100, 1])
        assert set(read) == expected


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text", "deepseek_v3", "qwen3_next"])
def test_conversion_after_the_prompt(model_type, reference):
    model, tokens = build(model_type), token_ids(320)
    own = make_prompt_cache(model)
    run(model, own, tokens[:, :310], [310])
    converted = tq.convert_cache(copy.deepcopy(own), KVSettings(8, 8, window=0))
    assert any(isinstance(c, PackedKVCache) and c.packed for c in converted)
    expected = run(model, own, tokens[:, 310:], [1, 8, 1])
    assert relative(run(model, converted, tokens[:, 310:], [1, 8, 1]), expected) < 0.03


@pytest.mark.parametrize("steps", [[250], [700], [1] * 3 + [500, 1, 1], [600, 1, 1]])
def test_a_rotating_cache_with_tokens(steps, reference):
    own = RotatingKVCache(300)
    k, v = vectors(800, 32), vectors(800, 32, seed=1)
    at = 0
    for n in steps:
        own.update_and_fetch(k[:, :, at : at + n], v[:, :, at : at + n])
        at += n
    (ours,) = tq.convert_cache([own], KVSettings(8, 8, window=0))
    assert type(ours) is PackedRotatingKVCache
    for n in (1, 1, 30, 1):
        assert (ours.offset, ours.size()) == (own.offset, own.size())
        mask = ours.make_mask(n), own.make_mask(n)
        new = k[:, :, at : at + n], v[:, :, at : at + n]
        q = vectors(n, 32, seed=at)
        got, expected = (
            mx.fast.scaled_dot_product_attention(q, *c.update_and_fetch(*new), scale=0.3, mask=m)
            for c, m in zip((ours, own), mask, strict=True)
        )
        assert relative(got, expected) < 0.02
        at += n


def test_a_batch_cache_with_tokens(reference):
    own = BatchKVCache([0, 60])
    k, v = vectors(200, 32, batch=2), vectors(200, 32, batch=2, seed=1)
    own.update_and_fetch(k[:, :, :150], v[:, :, :150])
    (ours,) = tq.convert_cache([own], SETTINGS)
    assert ours.offset.tolist() == own.offset.tolist() == [150, 90]
    q, mask = vectors(50, 32, batch=2, seed=2), (ours.make_mask(50), own.make_mask(50))
    got, expected = (
        mx.fast.scaled_dot_product_attention(q, *c.update_and_fetch(k[:, :, 150:], v[:, :, 150:]), scale=0.3, mask=m)
        for c, m in zip((ours, own), mask, strict=True)
    )
    assert relative(got, expected) < 0.02


def test_what_is_kept_has_a_reason(reference):
    caches = [KVCache(), RotatingKVCache(64), ChunkedKVCache(8), ArraysCache(2), QuantizedKVCache()]
    caches += [CacheList(ArraysCache(2), KVCache()), CacheList(KVCache(), KVCache()), PackedKVCache()]
    caches += [RotatingKVCache(4096)]
    kept = list(caches)
    events = tq.upgrade_cache(caches, SETTINGS)
    found = [(e.layer, e.part, e.cache, e.action) for e in events]
    assert found == [
        (0, None, "KVCache", "packed"), (1, None, "RotatingKVCache", "kept"), (2, None, "ChunkedKVCache", "kept"),
        (3, None, "ArraysCache", "kept"), (4, None, "QuantizedKVCache", "kept"), (5, 0, "ArraysCache", "kept"),
        (5, 1, "KVCache", "packed"), (6, 0, "KVCache", "kept"), (6, 1, "KVCache", "kept"),
        (7, None, "PackedKVCache", "kept"), (8, None, "RotatingKVCache", "packed"),
    ]  # fmt: skip
    reasons = [e.reason for e in events]
    for i, part in (
        (1, "64 tokens"),
        (2, "chunks"),
        (3, "recurrent"),
        (4, "mlx-lm"),
        (7, "model type"),
        (9, "already"),
    ):
        assert part in reasons[i]
    assert all(caches[i] is kept[i] for i in (1, 2, 3, 4, 7))
    assert summary(events)[0].startswith("1 of 11 caches stay unpacked: a window of 64 tokens")


def test_packing_can_wait(reference):
    own = KVCache()
    own.update_and_fetch(vectors(99, 32), vectors(99, 32))
    caches = [own]
    (event,) = tq.upgrade_cache(caches, SETTINGS, start=100)
    assert (event.action, event.reason) == ("kept", "it holds 99 tokens, packing starts at 100")
    own.update_and_fetch(vectors(1, 32), vectors(1, 32))
    (event,) = tq.upgrade_cache(caches, SETTINGS, start=100)
    assert event.action == "packed"
    assert (caches[0].offset, caches[0].packed) == (100, 64)


def test_defaults_are_the_recommended_ones():
    (cache,) = tq.convert_cache([KVCache()])
    assert cache.settings == KVSettings(8, 3)


def test_nothing_to_pack_is_an_error():
    with pytest.raises(TQError, match="no cache of this model can be packed: a recurrent state"):
        pack([ArraysCache(2)], SETTINGS)


def test_a_sequence_of_odd_dimensions(reference):
    for dim in (33, 40, 56, 72, 112):
        cache = PackedKVCache(KVSettings(4, 4, sink=0, window=0))
        cache.update_and_fetch(vectors(64, dim), vectors(64, dim, seed=1))
        assert relative(cache.keys_and_values()[0], vectors(64, dim)) < np.sqrt(0.0095)
