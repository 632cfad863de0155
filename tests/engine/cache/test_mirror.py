"""A cache that keeps its tokens decoded as well gives what it would give if it decoded them, and costs what it says."""

import copy

import mlx.core as mx
import pytest
from kv_cases import relative, run, token_ids, vectors
from mlx_lm.models.cache import make_prompt_cache
from tiny_models import build

from tq.engine.cache import mirror, native
from tq.engine.cache.convert import convert_cache
from tq.engine.cache.packed import PackedKVCache
from tq.engine.cache.settings import KVSettings
from tq.engine.cache.window import PackedRotatingKVCache

AFFINE = KVSettings(4, 3, "affine", "affine", sink=5, window=20)
EACH = [AFFINE, KVSettings(4, 4, "qjl", "polar", sink=0, window=0), KVSettings(3.5, 2.5, sink=3, window=1),
        KVSettings(4, 4, group_size=32, sink=5, window=0)]  # fmt: skip


@pytest.fixture(autouse=True)
def on_a_cpu(monkeypatch):
    monkeypatch.delenv("TQ_BACKEND", raising=False)
    monkeypatch.setattr(native, "declines", lambda *_: "not here")
    if mx.default_device() != mx.Device(mx.cpu):
        pytest.skip("a GPU decodes fast enough")


def without(monkeypatch, make):
    with monkeypatch.context() as patch:
        patch.setattr(mirror, "LIMIT_BYTES", -1)
        return make()


@pytest.mark.parametrize("settings", EACH)
def test_tokens_are_those_that_would_be_decoded(settings, monkeypatch):
    k, v = vectors(700, 64, batch=2), vectors(700, 48, batch=2, seed=1)

    def fill():
        cache, at, seen = PackedKVCache(settings), 0, []
        for n in (3, 1, 130, 1, 64, 300, 1, 200):
            seen.append(cache.update_and_fetch(k[:, :, at : at + n], v[:, :, at : at + n]))
            at += n
        return cache, seen

    cache, seen = fill()
    other, expected = without(monkeypatch, fill)
    assert cache.mirror is not None and other.mirror is None
    assert cache.packed == other.packed > 0
    for a, b in zip(seen, expected, strict=True):
        for got, right in zip(a, b, strict=True):
            assert got.shape == right.shape
            assert relative(got, right) < 1e-6
    assert all(mx.array_equal(a, b) for a, b in zip(cache.arrays[2:-2], other.arrays[2:-2], strict=True))
    assert cache.nbytes == other.nbytes  # of what is packed


@pytest.mark.parametrize("model_type", ["qwen3", "deepseek_v3"])
def test_a_model_says_the_same(model_type, monkeypatch):
    model, tokens = build(model_type), token_ids(300)

    def logits():
        caches = convert_cache(make_prompt_cache(model), AFFINE, model)
        return run(model, caches, tokens, [64, 64, 100, 70, 1, 1]), caches

    got, caches = logits()
    expected, others = without(monkeypatch, logits)
    assert any(cache.mirror is not None for cache in caches) and all(cache.mirror is None for cache in others)
    assert relative(got, expected) < 1e-4


def test_it_is_given_up_where_it_would_be_too_large(monkeypatch):
    row = 2 * (64 + 48) * 4
    monkeypatch.setattr(mirror, "LIMIT_BYTES", 300 * row)
    cache = PackedKVCache(AFFINE)
    cache.update_and_fetch(vectors(300, 64), vectors(300, 48))
    assert cache.mirror is not None
    assert sum(side.nbytes for side in cache.mirror) == mirror.LIMIT_BYTES  # though rows come in steps
    got = cache.update_and_fetch(vectors(1, 64), vectors(1, 48))
    assert cache.mirror is None
    assert got[0].shape[2] == 301
    assert cache.attend(vectors(1, 64, heads=4), *got, scale=0.1) is not None  # from packed tokens
    cache.trim(50)
    cache.update_and_fetch(vectors(1, 64), vectors(1, 48))
    assert cache.mirror is not None  # it fits again, and is decoded once
    assert relative(cache.keys_and_values()[0][:, :, :250], vectors(300, 64)[:, :, :250]) < 0.2


def test_it_has_room_in_steps_and_no_more():
    made = mirror.Mirror(mx.ones((1, 2, 0, 8)), mx.ones((1, 2, 0, 4)))
    for tokens, rows in ((1, 256), (256, 256), (257, 512), (2049, 2304), (2305, 2816)):
        made = mirror.with_room(made, tokens)
        assert made.keys.shape == (1, 2, rows, 8) and made.values.shape == (1, 2, rows, 4)
    new = mx.ones((1, 2, 1, 8)), mx.ones((1, 2, 1, 4))
    assert mirror.written(made, new, 300).keys[0, 0, 299:302, 0].tolist() == [0, 1, 0]


def test_copies_go_their_own_ways_and_states_leave_it_behind():
    k, v = vectors(400, 64), vectors(400, 48, seed=1)
    cache = PackedKVCache(AFFINE)
    cache.update_and_fetch(k, v)
    restored = PackedKVCache.from_state(cache.state)
    assert restored.mirror is None
    others = [cache.copy(), copy.deepcopy(cache), restored]
    for n, other in enumerate(others):
        other.trim(100 + n)
        other.update_and_fetch(k[:, :, :70] + n, v[:, :, :70])
        assert other.mirror is not None
    for n, other in enumerate(others):
        left = 300 - n
        got = other.keys_and_values()[0]
        assert got.shape[2] == left + 70
        assert relative(got[:, :, left + 50 :], k[:, :, 50:70] + n) < 1e-6
        assert relative(got[:, :, :left], cache.keys_and_values()[0][:, :, :left]) < 1e-6
    assert cache.keys_and_values()[0].shape[2] == 400


def test_windows_and_forced_backends_have_none(monkeypatch):
    cache = PackedRotatingKVCache(AFFINE, 256)
    cache.update_and_fetch(vectors(100, 64), vectors(100, 48))
    assert cache.mirror is None
    monkeypatch.setenv("TQ_BACKEND", "reference")
    cache = PackedKVCache(AFFINE)
    cache.update_and_fetch(vectors(100, 64), vectors(100, 48))
    assert cache.mirror is None
