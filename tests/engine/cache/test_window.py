"""A packed sliding window computes what mlx-lm's rotating cache computes."""

import copy
import json

import mlx.core as mx
import pytest
from kv_cases import relative, run, token_ids, vectors
from mlx_lm.models.cache import RotatingKVCache, make_prompt_cache
from tiny_models import write_checkpoint

from tq.cpu import library
from tq.engine.cache.convert import convert_cache
from tq.engine.cache.settings import KVSettings
from tq.engine.cache.window import PackedRotatingKVCache, worth_packing
from tq.engine.model.convert import convert
from tq.engine.model.load import load_packed
from tq.engine.model.native_layers import Kernel
from tq.engine.model.plan import make_plan
from tq.engine.model.recipe import Recipe
from tq.engine.model.sources import open_source

needs_kernels = pytest.mark.skipif(not library.state().active, reason=f"no kernels: {library.state().reason}")
SETTINGS = KVSettings(8, 8, window=16)


@pytest.fixture(params=["reference", pytest.param("cpu", marks=needs_kernels)])
def backend(request, monkeypatch):
    monkeypatch.setenv("TQ_BACKEND", request.param)


def attend(cache, q, k, v, window_size=None, packed=False):
    mask = cache.make_mask(q.shape[2], window_size=window_size, return_array=False)
    keys, values = cache.update_and_fetch(k, v)
    if packed:
        return cache.attend(q, keys, values, scale=0.3, mask=mask)
    return mx.fast.scaled_dot_product_attention(q, keys, values, scale=0.3, mask=mask)


STEPS = [[1] * 500, [100] * 7, [600, 1, 1, 50, 1, 47], [249, 1, 1, 1, 248, 1, 199], [700]]


# mlx-lm's mask of a chunk takes the tokens that it keeps for old ones: with them, one token at a time.
@pytest.mark.parametrize(("steps", "keep"), [*((steps, 0) for steps in STEPS), (STEPS[0], 4)])
@pytest.mark.parametrize("max_size", [250, 256])
def test_agrees_with_a_rotating_cache(steps, max_size, keep, backend):
    own, ours, packed = (
        RotatingKVCache(max_size, keep),
        PackedRotatingKVCache(SETTINGS, max_size, keep),
        PackedRotatingKVCache(SETTINGS, max_size, keep),
    )
    q, k, v = vectors(700, 32, heads=2, seed=2), vectors(700, 32, heads=1), vectors(700, 32, heads=1, seed=1)
    at = 0
    for n in steps:
        new = [x[:, :, at : at + n] for x in (q, k, v)]
        expected = attend(own, *new)
        if n > 1 or at % 7 == 0:
            assert relative(attend(ours, *new), expected) < 0.02
            assert relative(attend(packed, *new, packed=True), expected) < 0.02
        else:
            for cache in (ours, packed):
                cache.update_and_fetch(*new[1:])
        shared = ours.keys_and_values()  # what a layer without keys of its own gets
        assert shared[0].shape[2] == min(at, max_size - 1) + n
        assert relative(shared[0][:, :, -n:], new[1]) < 0.02
        at += n
        assert (ours.offset, ours.size(), ours.is_trimmable()) == (own.offset, own.size(), own.is_trimmable())
    ours.update_and_fetch(k[:, :, :1], v[:, :, :1])
    held = ours.offset - ours.dropped
    assert max_size - 1 <= held <= max_size + 64
    assert ours.packed >= 128


def test_a_window_smaller_than_the_cache(backend):
    own, ours = RotatingKVCache(300), PackedRotatingKVCache(SETTINGS, 300)
    q, k, v = vectors(500, 32, heads=1, seed=2), vectors(500, 32, heads=1), vectors(500, 32, heads=1, seed=1)
    at = 0
    for n in (150, 1, 1, 200, 1, 140, 1, 1):
        new = [x[:, :, at : at + n] for x in (q, k, v)]
        assert relative(attend(ours, *new, window_size=100), attend(own, *new, window_size=100)) < 0.02
        at += n


def test_memory_stays_what_the_window_needs(backend):
    cache, sizes = PackedRotatingKVCache(KVSettings(), 512), []
    for _ in range(12):
        cache.update_and_fetch(vectors(200, 64), vectors(200, 64))
        sizes.append(cache.nbytes)
    own = RotatingKVCache(512)
    own.update_and_fetch(vectors(512, 64), vectors(512, 64))
    assert max(sizes) < 0.5 * own.nbytes


def test_trim_and_restore(backend):
    cache = PackedRotatingKVCache(SETTINGS, 400)
    k, v = vectors(600, 32), vectors(600, 32, seed=1)
    cache.update_and_fetch(k[:, :, :300], v[:, :, :300])
    assert cache.trim(120) == 120
    cache.update_and_fetch(k[:, :, 180:300], v[:, :, 180:300])
    assert relative(cache.keys_and_values()[0], k[:, :, :300]) < 0.01
    cache.update_and_fetch(k[:, :, 300:], v[:, :, 300:])
    assert not cache.is_trimmable()
    assert cache.trim(5) == 0
    again = PackedRotatingKVCache.from_state(cache.state)
    for other in (again, copy.deepcopy(cache)):
        assert (other.max_size, other.offset, other.dropped) == (400, 600, cache.dropped)
        keys, values = other.keys_and_values()
        assert keys.shape[2] == 600  # 399 before the first of the last 300 tokens, but there were only 300
        assert relative(keys, k) < 0.01
        assert relative(values, v) < 0.01
        other.update_and_fetch(k[:, :, :1], v[:, :, :1])
        assert relative(other.keys_and_values()[0], mx.concatenate([k[:, :, 201:], k[:, :, :1]], axis=2)) < 0.01


def test_small_windows_are_not_worth_it():
    assert not worth_packing(KVSettings(), 128, 0)
    assert worth_packing(KVSettings(), 512, 0)


@needs_kernels
@pytest.mark.parametrize("model_type", ["gemma3_text", "gpt_oss"])
def test_windows_of_native_layers(model_type, tmp_path, monkeypatch):
    """Full and sliding layers, with attention sinks and without, past the end of the window."""
    write_checkpoint(tmp_path / "source", model_type)
    path = tmp_path / "source" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"sliding_window": 300}))
    plan = make_plan(open_source(str(tmp_path / "source")), Recipe.from_options(bits=8), dtype="float32")
    list(convert(plan, tmp_path / "out"))
    model = load_packed(tmp_path / "out")[0]
    tokens, steps = token_ids(520, seed=2), [200, 240, *[1] * 70, 7, 1, 1, 1]

    def logits(packed):
        caches = make_prompt_cache(model)
        if packed:
            caches = convert_cache(caches, KVSettings(8, 8, window=0, sink=4), model)
            assert {type(c).__name__ for c in caches} == {"PackedKVCache", "PackedRotatingKVCache"}
        found = run(model, caches, tokens, steps)
        if packed:
            assert {c.storage.name for c in caches} == {"cpu"}
            window = next(c for c in caches if type(c) is PackedRotatingKVCache)
            assert (window.offset, window.limit) == (520, 300)
            assert window.dropped >= 128
        return found

    got, expected = logits(True), logits(False)
    assert relative(got, expected) < 0.03
    calls = sum(layer.kernel.calls for layer in model.layers)
    monkeypatch.setattr(Kernel, "_attend_packed", lambda *_: None)
    other = logits(True)  # by the model's own attention, which the hook lets read packed tokens
    assert sum(layer.kernel.calls for layer in model.layers) == calls
    assert relative(got, other) < 0.01
