"""A packed cache gives nearly what an ordinary one gives, however tokens come, and can be cut, copied and restored."""

import copy

import mlx.core as mx
import numpy as np
import pytest
from kv_cases import relative, run, token_ids, vectors
from mlx_lm.models.cache import KVCache, make_prompt_cache
from tiny_models import build, write_checkpoint

from tq.cpu import library
from tq.engine.cache import hook, native_code
from tq.engine.cache.packed import PackedKVCache
from tq.engine.cache.settings import KVSettings
from tq.engine.model.convert import convert
from tq.engine.model.load import load_packed
from tq.engine.model.plan import make_plan
from tq.engine.model.recipe import Recipe
from tq.engine.model.sources import open_source
from tq.errors import TQError

needs_kernels = pytest.mark.skipif(not library.state().active, reason=f"no kernels: {library.state().reason}")
# Distances that codes of so many bits leave (relative RMS): 2^-8 of the largest value, and the Lloyd-Max MSE.
DISTANCE = {8: 0.01, 4: 0.11, 3.5: 0.17, 3: 0.2, 2: 0.37}
SMALL = {"sink": 5, "window": 20}


@pytest.fixture(params=["reference", pytest.param("cpu", marks=needs_kernels)])
def backend(request, monkeypatch):
    monkeypatch.setenv("TQ_BACKEND", request.param)
    return request.param


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    write_checkpoint(folder / "source", "llama")
    plan = make_plan(open_source(str(folder / "source")), Recipe.from_options(bits=8), dtype="float32")
    list(convert(plan, folder / "out"))
    return load_packed(folder / "out")[0]


@pytest.mark.parametrize(("keys", "values"), [(8, 4), (4, 8), (3, 3), (2, 8)])
@pytest.mark.parametrize("dims", [(64, 64), (80, 40), (120, 48)])
def test_decodes_to_what_was_put_in(keys, values, dims, backend):
    cache = PackedKVCache(KVSettings(keys, values, **SMALL))
    k, v = vectors(400, dims[0]), vectors(400, dims[1], seed=1)
    for first, last in ((0, 3), (3, 4), (4, 130), (130, 131), (131, 400)):
        cache.update_and_fetch(k[:, :, first:last], v[:, :, first:last])
        assert (cache.offset, cache.storage.name) == (last, backend)
    got_k, got_v = cache.keys_and_values()
    assert cache.packed == 320
    for got, given, bits in ((got_k, k, keys), (got_v, v, values)):
        assert got.shape == given.shape
        assert relative(got, given) < DISTANCE[bits]
        assert relative(got[:, :, 5:325], given[:, :, 5:325]) > DISTANCE[bits] / 10  # these are codes,
        for exact in (slice(0, 5), slice(325, 400)):  # the others are not
            assert relative(got[:, :, exact], given[:, :, exact]) < 1e-3


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
@pytest.mark.parametrize(
    "settings",
    [KVSettings(3.5, 3.5, **SMALL), KVSettings(4, 3, "affine", "affine", **SMALL), KVSettings(4, 4, "qjl", "polar"),
     KVSettings(8, 2, sink=0, window=0), KVSettings(1, 7, sink=0, window=65)],
)  # fmt: skip
def test_steps_of_any_length_hold_the_same(settings, dtype, reference):
    k, v = vectors(300, 64, batch=2).astype(dtype), vectors(300, 48, batch=2, seed=1).astype(dtype)
    found = []
    for steps in ([300], [1] * 300, [129, 1, 1, 64, 105]):
        cache, at = PackedKVCache(settings), 0
        for n in steps:
            got_k, got_v = cache.update_and_fetch(k[:, :, at : at + n], v[:, :, at : at + n])
            at += n
            assert got_k.shape[2] == got_v.shape[2] == at
            assert mx.array_equal(got_k[:, :, at - n :], k[:, :, at - n : at])  # new tokens see each other as they are
        found.append(cache)
    assert {c.packed for c in found} == {settings.packed_after(300, settings.sink)}
    if settings.key_bits != 3.5:  # which channels are outliers depends on the first tokens that are packed
        first = found[0].keys_and_values()
        for other in found[1:]:
            for a, b in zip(first, other.keys_and_values(), strict=True):
                assert relative(b.astype(mx.float32), a.astype(mx.float32)) < 1e-6


@pytest.mark.parametrize(("bits", "most"), [((8, 3), 0.37), ((8, 4), 0.4), ((4, 4), 0.29), ((2.5, 2.5), 0.24)])
def test_takes_less_memory_than_float16(bits, most, backend):
    cache, plain = PackedKVCache(KVSettings(*bits)), KVCache()
    for c in (cache, plain):
        c.update_and_fetch(vectors(8192, 128).astype(mx.float16), vectors(8192, 128).astype(mx.float16))
    assert cache.nbytes == sum(a.nbytes for a in cache.arrays) + sum(f.nbytes for f in cache.fitted if f is not None)
    assert cache.nbytes < most * plain.nbytes


@needs_kernels
@pytest.mark.parametrize("steps", [[300], [1] * 4 + [295, 1], [257, 40, 1, 1, 1]])
def test_a_model_reads_it_in_native_layers_as_from_its_decoded_form(llama, steps, monkeypatch):
    tokens, settings = token_ids(300, seed=2), KVSettings(8, 4, sink=7, window=30)
    caches = [PackedKVCache(settings) for _ in llama.layers]
    got = run(llama, caches, tokens, steps)
    assert caches[0].packed == 256
    calls = sum(layer.kernel.calls for layer in llama.layers)
    assert calls > 0
    # Without the kernel's way, the model's own attention reads packed arrays.
    others = [PackedKVCache(settings) for _ in llama.layers]
    monkeypatch.setattr(type(llama.layers[0].kernel), "_attend_packed", lambda *_: None)
    expected = run(llama, others, tokens, [1] * 300)
    assert sum(layer.kernel.calls for layer in llama.layers) == calls
    # A prompt attends to tokens before they are packed in one way and after in the other.
    assert relative(got[:, -1], expected[:, -1]) < 0.02
    assert relative(got, run(llama, make_prompt_cache(llama), tokens, steps)) < 0.1


def test_attention_reads_packed_tokens_as_from_their_decoded_form(backend):
    q, k, v = vectors(400, 64, heads=6, seed=5), vectors(400, 64), vectors(400, 48, seed=1)
    cache, at = PackedKVCache(KVSettings(8, 4, **SMALL)), 0
    for n in (3, 1, 200, 100, 1, 95):
        mask = cache.make_mask(n, return_array=False, window_size=None)
        keys, values = cache.update_and_fetch(k[:, :, at : at + n], v[:, :, at : at + n])
        now = q[:, :, at : at + n]
        expected = mx.fast.scaled_dot_product_attention(now, keys, values, scale=0.2, mask=mask)
        assert relative(cache.attend(now, keys, values, scale=0.2, mask=mask), expected) < 1e-5
        at += n


def test_packed_tokens_stand_only_for_the_arrays_that_they_were_given_as(backend):
    cache = PackedKVCache(KVSettings(8, 4, **SMALL))
    keys, values = cache.update_and_fetch(vectors(200, 64), vectors(200, 64, seed=1))
    q = vectors(1, 64, seed=2)
    assert cache.attend(q, keys * 2, values, scale=0.1) is None
    assert cache.attend(q, keys, values * 2, scale=0.1) is None
    assert cache.attend(q, values, keys, scale=0.1) is None
    assert cache.attend(q, keys, values, scale=0.1) is not None
    del keys
    assert cache.attend(q, vectors(200, 64), values, scale=0.1) is None
    assert cache._fetched._held is None  # nobody holds what the next token is written to


def test_trimming_gives_what_was_before(backend):
    model, tokens = build("llama"), token_ids(300, seed=3)
    for keep in (290, 170, 20, 6, 0):
        caches = [PackedKVCache(KVSettings(8, 8, sink=7, window=30)) for _ in model.layers]
        run(model, caches, tokens, [300])
        assert all(c.is_trimmable() and c.trim(300 - keep) == 300 - keep for c in caches)
        assert (caches[0].offset, caches[0].packed) == (keep, min(max(keep - 7, 0) // 64 * 64, 256))
        got = run(model, caches, tokens[:, keep:], [1, 300 - keep - 1])
        fresh = make_prompt_cache(model)
        steps = [keep, 1, 300 - keep - 1] if keep else [1, 299]
        assert relative(got, run(model, fresh, tokens, steps)[:, keep:]) < 0.03
        assert caches[0].trim(1000) == 300
        assert caches[0].empty()


@pytest.mark.parametrize("settings", [KVSettings(8, 4, sink=4, window=16), KVSettings(2.5, 3.5, sink=4, window=16)])
def test_copies_and_restored_states_go_their_own_ways(settings, backend, monkeypatch):
    monkeypatch.setattr(native_code, "SMALLEST_ROTATION", 4)  # heads of this model have 16 numbers
    model, tokens = build("llama"), token_ids(250, seed=4)
    caches = [PackedKVCache(settings) for _ in model.layers]
    run(model, caches, tokens, [200])
    copies = [copy.deepcopy(caches), [c.copy() for c in caches]]
    copies.append([PackedKVCache.from_state(c.state, c.meta_state) for c in caches])
    expected = np.array(run(model, caches, tokens[:, 200:], [50]))
    for others in copies:
        assert others[0].offset == 200
        assert np.array_equal(
            np.array(run(model, others, tokens[:, 200:], [1, 49]))[:, 1:].shape, expected[:, 1:].shape
        )
    again = [run(model, others, tokens[:, 249:], [1]) for others in copies]
    assert all(relative(a, again[0]) < 1e-5 for a in again)
    assert caches[0].offset == 250


def test_empty_caches_have_a_state():
    cache = PackedKVCache(KVSettings(4, 4))
    assert (cache.empty(), cache.size(), cache.nbytes, cache.trim(3)) == (True, 0, 0, 0)
    again = PackedKVCache.from_state(cache.state)
    assert (again.settings, again.offset, again.storage) == (cache.settings, 0, None)


def test_tokens_of_another_form_are_refused(reference):
    cache = PackedKVCache()
    cache.update_and_fetch(vectors(3, 64), vectors(3, 64))
    with pytest.raises(TQError, match=r"\(1, 2, 64, 64\) cannot take \(3, 2, 64, 64\)"):
        cache.update_and_fetch(vectors(3, 64, batch=3), vectors(3, 64, batch=3))


def test_latents_have_the_bits_of_keys(reference):
    cache = PackedKVCache(KVSettings(8, 2, sink=0, window=0))
    cache.update_and_fetch(vectors(128, 96, heads=1), vectors(128, 32, heads=1))
    positions = cache.keys_and_values()[1]
    assert relative(positions, vectors(128, 32, heads=1)) < 0.01


@needs_kernels
@pytest.mark.parametrize(
    ("settings", "dims", "reason"),
    [(KVSettings(4, 4, "polar", "polar"), 64, "codec polar"), (KVSettings(4, 4, "qjl"), 64, "codec qjl"),
     (KVSettings(8, 3.5), 40, "10 numbers"), (KVSettings(), 33, "no Hadamard rotation")],
)  # fmt: skip
def test_what_kernels_cannot_do_is_said_and_done_without_them(settings, dims, reason, monkeypatch):
    def append():
        cache = PackedKVCache(settings)
        cache.update_and_fetch(vectors(3, dims), vectors(3, dims))
        return cache

    cache = append()
    assert cache.storage.name == "reference"
    assert reason in cache.declined
    monkeypatch.setenv("TQ_BACKEND", "cpu")
    with pytest.raises(TQError, match=reason):
        append()


FORMS = [
    KVSettings(4, 8, **SMALL), KVSettings(7, 1, **SMALL), KVSettings(8, 3, group_size=32, **SMALL),
    KVSettings(3, 4, group_size=64, **SMALL), KVSettings(5, 2, group_size=128, **SMALL),
    KVSettings(4, 4, "affine", "affine", **SMALL), KVSettings(8, 3, "affine", "affine", group_size=32, **SMALL),
    KVSettings(3, 6, "lloyd-max", "affine", **SMALL), KVSettings(2.5, 3.5, **SMALL),
]  # fmt: skip


@needs_kernels
@pytest.mark.parametrize("settings", FORMS, ids=KVSettings.label)
def test_storages_agree(settings, monkeypatch):
    """Codes of both are the same, but for a few that lie on a border; and kernels attend to what they decode to."""
    k, v = vectors(460, 64) * mx.linspace(0.5, 4, 64), vectors(460, 128, seed=1)
    q, decoded = vectors(460, 64, heads=6, seed=2), []
    for backend in ("reference", "cpu"):
        monkeypatch.setenv("TQ_BACKEND", backend)
        cache, at = PackedKVCache(settings), 0
        for n in (200, 200, 1, 59):
            keys, values = cache.update_and_fetch(k[:, :, at : at + n], v[:, :, at : at + n])
            part, at = q[:, :, at : at + n], at + n
            mask = "causal" if n > 1 else None
            got = cache.attend(part, keys, values, scale=0.1, mask=mask)
            assert relative(got, mx.fast.scaled_dot_product_attention(part, keys, values, scale=0.1, mask=mask)) < 0.02
        assert cache.storage.name == backend
        decoded.append(cache.keys_and_values())
    for ours, kernels in zip(*decoded, strict=True):
        assert relative(kernels, ours) < 0.02


@needs_kernels
def test_native_layers_go_on_after_other_ways_to_add_and_forget(llama):
    """Between blocks they hand over recent tokens alone; what changes the arrays in between must not be missed."""
    settings, tokens = KVSettings(8, 8, sink=4, window=16), token_ids(330, seed=3)
    caches = [PackedKVCache(settings) for _ in llama.layers]
    run(llama, caches, tokens[:, :170], [100, *[1] * 70])
    for n in (3, 40, 90):  # of recent tokens, across one block, across two
        for cache in caches:
            assert cache.trim(n) == n
        run(llama, caches, tokens[:, 170 - n : 170], [1] * n)
    run(llama, caches, tokens[:, 170:300], [130])
    got = run(llama, caches, tokens[:, 300:], [1] * 30)
    fresh = [PackedKVCache(settings) for _ in llama.layers]
    expected = run(llama, fresh, tokens, [1] * 330)[:, 300:]
    assert (caches[0].offset, caches[0].packed) == (fresh[0].offset, fresh[0].packed)
    assert relative(got, expected) < 0.03


@needs_kernels
def test_native_layers_read_every_form(llama, monkeypatch):
    monkeypatch.setattr(native_code, "SMALLEST_ROTATION", 4)  # heads of this model have 16 numbers
    tokens, steps = token_ids(300, seed=2), [250, *[1] * 50]
    expected = run(llama, make_prompt_cache(llama), tokens, steps)
    kinds = (KVSettings(8, 7, group_size=32, **SMALL), 0.05), (KVSettings(6, 5, "affine", "affine", **SMALL), 0.1)
    for settings, most in (*kinds, (KVSettings(3.5, 3.5, **SMALL), 0.3)):
        caches = [PackedKVCache(settings) for _ in llama.layers]
        before = sum(layer.kernel.calls for layer in llama.layers)
        assert relative(run(llama, caches, tokens, steps), expected) < most
        assert sum(layer.kernel.calls for layer in llama.layers) > before
        assert caches[0].storage.name == "cpu"


def test_hook_is_reversible(reference, monkeypatch):
    model, tokens = build("qwen3"), token_ids(140)
    own = run(model, make_prompt_cache(model), tokens, [140])
    calls = []
    real = PackedKVCache.attend
    monkeypatch.setattr(PackedKVCache, "attend", lambda self, *a, **k: calls.append(1) or real(self, *a, **k))
    assert hook.install(model) == 1
    assert hook.install(model) == 0
    assert mx.array_equal(run(model, make_prompt_cache(model), tokens, [140]), own)
    assert not calls
    run(model, [PackedKVCache() for _ in model.layers], tokens, [139, 1])
    assert len(calls) == 2 * len(model.layers)
    hook.uninstall()
    run(model, [PackedKVCache() for _ in model.layers], tokens, [139, 1])
    assert len(calls) == 2 * len(model.layers)


@pytest.mark.parametrize("hooked", [False, True])
def test_a_long_prompt_needs_less_memory_at_its_peak(hooked, reference):
    def peak(make):
        caches = [make() for _ in range(8)]
        mx.clear_cache()
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        for _ in range(8):
            x = mx.random.normal((1, 1, 256, 64))
            for cache in caches:
                keys, values = cache.update_and_fetch(x, x * 2)
                found = (
                    cache.attend(x, keys, values, scale=0.1, mask="causal") if hooked and make is not KVCache else None
                )
                x = (
                    mx.fast.scaled_dot_product_attention(x, keys, values, scale=0.1, mask="causal")
                    if found is None
                    else found
                )
                del keys, values
            mx.eval(x, [cache.state for cache in caches])
        return mx.get_peak_memory() - before

    assert peak(lambda: PackedKVCache(KVSettings(8, 3))) < peak(KVCache)
