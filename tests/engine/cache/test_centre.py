"""Keys with a large constant are packed less their mean, and attention is what it would be with all of them."""

import copy

import mlx.core as mx
import numpy as np
import pytest
from kv_cases import relative, run, token_ids, vectors
from mlx_lm.models.cache import make_prompt_cache
from tiny_models import build

from tq.cpu import library
from tq.engine.cache.batch import BatchPackedKVCache
from tq.engine.cache.convert import convert_cache, has_key_biases
from tq.engine.cache.native import View
from tq.engine.cache.packed import PackedKVCache
from tq.engine.cache.settings import KVSettings
from tq.engine.cache.window import PackedRotatingKVCache

needs_kernels = pytest.mark.skipif(not library.state().active, reason=f"no kernels: {library.state().reason}")
CENTRED = KVSettings(4, 8, sink=5, window=20, centre=True)
STEPS = (3, 1, 200, 100, 1, 1, 94)


@pytest.fixture(params=["reference", "auto", pytest.param("cpu", marks=needs_kernels)])
def backend(request, monkeypatch):
    monkeypatch.setenv("TQ_BACKEND", request.param)
    return request.param


def biased(n, heads=2, seed=0):
    """Keys of which nearly all is the same in all tokens, as Qwen2's in channels that turn slowly."""
    bias = np.zeros((1, heads, 1, 64), np.float32)
    bias[..., [29, 31, 61]] = [[[[100.0, -50.0, 80.0]], [[-60.0, 100.0, 70.0]]]]
    return vectors(n, 64, heads=heads, seed=seed) + mx.array(bias)


def filled(settings, k, v, steps=STEPS):
    cache, at = PackedKVCache(settings), 0
    for n in steps:
        cache.update_and_fetch(k[:, :, at : at + n], v[:, :, at : at + n])
        at += n
    return cache


@pytest.mark.parametrize("codec", ["lloyd-max", "affine"])
def test_codes_spend_no_bits_on_what_all_keys_share(codec, backend):
    k, v = biased(400), vectors(400, 64, seed=1)
    off = {}
    for centre in (False, True):
        cache = filled(KVSettings(4, 8, codec, sink=5, window=20, centre=centre), k, v)
        got = cache.keys_and_values()[0]
        off[centre] = float(mx.square(got - k).mean())
        assert (cache.centre is not None) is centre
        assert relative(cache.keys_and_values()[1], v) < 0.01
    assert off[True] < 0.02 < 10 * off[True] < off[False]


def test_attention_is_that_over_the_keys_with_what_they_share(backend):
    q, k, v = vectors(400, 64, heads=6, seed=5), biased(400), vectors(400, 64, seed=1)
    cache, at, packed = PackedKVCache(CENTRED), 0, 0
    for n in STEPS:
        mask = cache.make_mask(n, return_array=False, window_size=None)
        keys, values = cache.update_and_fetch(k[:, :, at : at + n], v[:, :, at : at + n])
        now = q[:, :, at : at + n]
        expected = mx.fast.scaled_dot_product_attention(now, keys, values, scale=0.2, mask=mask)
        got = cache.attend(now, keys, values, scale=0.2, mask=mask)
        packed += got is not None
        # Scores are in the thousands: float32 keeps four digits of what they differ in.
        assert got is None or relative(got, expected) < 3e-3
        at += n
    assert packed == (0 if backend == "auto" and cache.mirror is not None else len(STEPS))


def test_where_a_constant_counts_keys_are_whole(backend):
    """A sink takes part in the softmax without a key."""
    k, v = biased(200), vectors(200, 64, seed=1)
    q = vectors(1, 64, heads=4, seed=2)
    for settings, reads in ((CENTRED, False), (KVSettings(4, 8, sink=5, window=20), True)):
        cache = PackedKVCache(settings)
        keys, values = cache.update_and_fetch(k, v)
        found = cache.attend(q, keys, values, scale=0.1, sinks=mx.array([1.0, 2.0, 3.0, 4.0]))
        assert (found is not None) is reads
        assert relative(keys[:, :, -20:], k[:, :, -20:]) < 1e-3


def test_trim_copy_and_restore(backend):
    k, v = biased(400), vectors(400, 64, seed=1)
    cache = filled(CENTRED, k, v)
    others = [copy.deepcopy(cache), cache.copy(), PackedKVCache.from_state(cache.state)]
    more = biased(3, seed=9), vectors(3, 64, seed=8)
    for other in others:
        for one in (cache.copy(), other):
            one.trim(150)
            one.update_and_fetch(*more)
        assert mx.array_equal(one.keys_and_values()[0], other.keys_and_values()[0])
        got = other.keys_and_values()[0]
        assert got.shape[2] == 253
        assert relative(got[:, :, -3:], more[0]) < 1e-3
        assert relative(got[:, :, :250], k[:, :, :250]) < 0.01
    assert cache.offset == 400
    cache.trim(400)
    keys, _ = cache.update_and_fetch(k, v)  # what is taken from keys stays what it was
    assert relative(keys, k) < 0.01


def test_windows_and_latents_stay_as_they_are(monkeypatch):
    """The kernels and all rows of a batch go on at once, though the model's other layers are centred."""
    window = PackedRotatingKVCache(CENTRED, 300)
    window.update_and_fetch(biased(200), vectors(200, 64, seed=1))
    latent = PackedKVCache(CENTRED)
    k, v = biased(200)[:, :1], vectors(200, 32, heads=1, seed=1)
    latent.update_and_fetch(k, v)
    assert window.packed > 0 and latent.packed > 0
    assert window.centre is None and latent.centre is None
    monkeypatch.setenv("TQ_BACKEND", "reference")
    latent = PackedKVCache(CENTRED)
    keys, _ = latent.update_and_fetch(k, v)
    assert (
        latent.attend(vectors(1, 64, heads=4), keys, keys, scale=0.1) is not None
    )  # keys are values, as they are packed


@needs_kernels
def test_windows_of_centred_models_run_on_the_kernels(monkeypatch):
    monkeypatch.setenv("TQ_BACKEND", "cpu")
    window = PackedRotatingKVCache(CENTRED, 300)
    assert window.native(1, 2, 64, 64) is not None
    assert PackedKVCache(CENTRED).native(1, 2, 64, 64) is None
    batch = BatchPackedKVCache([PackedRotatingKVCache(CENTRED, 300) for _ in range(2)])
    k = mx.concatenate([biased(200), biased(200, seed=1)])
    keys, values = batch.update_and_fetch(k, k)
    assert batch.attend(vectors(200, 64, batch=2), keys, values, scale=0.1, mask=None).shape == (2, 2, 200, 64)
    assert type(batch._fetched.take(keys, values)[0]) is View  # of one call


def test_models_with_biases_in_their_keys_have_it(reference):
    found = {kind: has_key_biases(build(kind)) for kind in ("gemma3_text", "qwen2", "gpt_oss", "qwen3", "gpt2")}
    assert found == {"gemma3_text": False, "qwen2": True, "gpt_oss": False, "qwen3": False, "gpt2": True}
    model, tokens = build("qwen2"), token_ids(300)
    for layer in model.layers:
        bias = np.array(layer.self_attn.k_proj.bias)
        bias[::16] = 60
        layer.self_attn.k_proj.bias = mx.array(bias)
    expected = run(model, make_prompt_cache(model), tokens, [299, 1])
    off = {}
    for centre in (None, False):
        caches = convert_cache(make_prompt_cache(model), KVSettings(4, 8, sink=4, window=0, centre=centre), model)
        assert all(c.settings.centre is (True if centre is None else False) for c in caches)
        off[centre] = relative(run(model, caches, tokens, [64] * 4 + [43, 1]), expected)
    assert off[None] < off[False]
