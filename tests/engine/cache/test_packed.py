"""A packed cache gives nearly what an ordinary one gives, however tokens come, and can be cut, copied and restored."""

import copy

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.cache import KVCache, RotatingKVCache, make_prompt_cache
from tiny_models import write_checkpoint

from tq.cpu import library
from tq.engine.cache import packed
from tq.engine.cache.packed import KVBits, PackedKVCache, pack_caches
from tq.engine.model.convert import convert
from tq.engine.model.load import load_packed
from tq.engine.model.plan import make_plan
from tq.engine.model.recipe import Recipe
from tq.engine.model.sources import open_source
from tq.errors import TQError, UsageError

if not library.state().active:
    pytest.skip(f"no kernels: {library.state().reason}", allow_module_level=True)

# Distances that codes of so many bits leave (relative RMS): 2^-8 of the largest value, and the Lloyd-Max MSE.
DISTANCE = {8: 0.01, 4: 0.11, 3: 0.2, 2: 0.37}


def vectors(tokens, dim, heads=2, seed=0):
    rng = np.random.default_rng(seed)
    return mx.array(rng.standard_normal((1, heads, tokens, dim)).astype(np.float32))


def relative(got, expected):
    got, expected = np.array(got, np.float64), np.array(expected, np.float64)
    return np.linalg.norm(got - expected) / np.linalg.norm(expected)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    write_checkpoint(folder / "source", "llama")
    plan = make_plan(open_source(str(folder / "source")), Recipe.from_options(bits=8), dtype="float32")
    list(convert(plan, folder / "out"))
    return load_packed(folder / "out")[0]


@pytest.mark.parametrize(("keys", "values"), [(8, 4), (4, 8), (3, 3), (2, 8)])
@pytest.mark.parametrize("dims", [(64, 64), (80, 40), (33, 17)])
def test_decodes_to_what_was_put_in(keys, values, dims):
    cache = PackedKVCache(KVBits(keys, values), sink=5, window=20)
    k, v = vectors(400, dims[0]), vectors(400, dims[1], seed=1)
    for first, last in ((0, 3), (3, 4), (4, 130), (130, 131), (131, 400)):
        got_k, got_v = cache.update_and_fetch(k[:, :, first:last], v[:, :, first:last])
    assert (cache.offset, cache.packed) == (400, 320)
    for got, given, bits in ((got_k, k, keys), (got_v, v, values)):
        assert got.shape == given.shape
        assert relative(got, given) < DISTANCE[bits]
        assert relative(got[:, :, 5:325], given[:, :, 5:325]) > DISTANCE[bits] / 10  # these are codes,
        for exact in (slice(0, 5), slice(325, 400)):  # the others are not
            assert relative(got[:, :, exact], given[:, :, exact]) < 1e-3


def test_takes_less_memory_than_float16():
    cache, plain = PackedKVCache(KVBits(8, 3)), KVCache()
    for c in (cache, plain):
        c.update_and_fetch(vectors(8192, 128).astype(mx.float16), vectors(8192, 128).astype(mx.float16))
    assert cache.nbytes < 0.4 * plain.nbytes


def run(model, caches, tokens, steps):
    parts, at = [], 0
    for n in steps:
        parts.append(model(tokens[:, at : at + n], cache=caches))
        mx.eval(parts[-1])
        at += n
    return mx.concatenate(parts, axis=1)


@pytest.mark.parametrize("steps", [[300], [1] * 4 + [295, 1], [257, 40, 1, 1, 1]])
def test_a_model_reads_it_in_native_layers_as_from_its_decoded_form(llama, steps, monkeypatch):
    tokens = mx.array(np.random.default_rng(2).integers(0, 100, (1, 300)))
    caches = [PackedKVCache(KVBits(8, 4), sink=7, window=30) for _ in llama.layers]
    got = run(llama, caches, tokens, steps)
    assert caches[0].packed == 256
    calls = sum(layer.kernel.calls for layer in llama.layers)
    assert calls > 0
    # Without the kernel's way, the model's own attention gets all keys and values decoded.
    others = [PackedKVCache(KVBits(8, 4), sink=7, window=30) for _ in llama.layers]
    monkeypatch.setattr(type(llama.layers[0].kernel), "_attend_packed", lambda *_: None)
    expected = run(llama, others, tokens, [1] * 300)
    assert sum(layer.kernel.calls for layer in llama.layers) == calls
    # A prompt attends to tokens before they are packed in one way and after in the other.
    assert relative(got[:, -1], expected[:, -1]) < 0.02
    assert relative(got, run(llama, make_prompt_cache(llama), tokens, steps)) < 0.1


def test_trimming_gives_what_was_before(llama):
    tokens = mx.array(np.random.default_rng(3).integers(0, 100, (1, 400)))
    for keep in (390, 290, 131, 20, 6, 0):
        caches = [PackedKVCache(KVBits(8, 8), sink=7, window=30) for _ in llama.layers]
        run(llama, caches, tokens, [400])
        assert all(c.trim(400 - keep) == 400 - keep for c in caches)
        assert (caches[0].offset, caches[0].packed) == (keep, min(max(keep - 7, 0) // 64 * 64, 320))
        got = llama(tokens[:, keep : keep + 1] if keep < 400 else tokens[:, :1], cache=caches)
        fresh = make_prompt_cache(llama)
        if keep:
            llama(tokens[:, :keep], cache=fresh)
        assert relative(got, llama(tokens[:, keep : keep + 1], cache=fresh)) < 0.02


def test_copies_and_restored_states_go_their_own_ways(llama):
    tokens = mx.array(np.random.default_rng(4).integers(0, 100, (1, 250)))
    caches = [PackedKVCache(KVBits(8, 4), sink=4, window=16) for _ in llama.layers]
    run(llama, caches, tokens, [200])
    copied = copy.deepcopy(caches)
    restored = [PackedKVCache.from_state(c.state, c.meta_state) for c in caches]
    expected = run(llama, caches, tokens[:, 200:], [50])
    for others in (copied, restored):
        assert others[0].offset == 200
        assert np.array_equal(np.array(run(llama, others, tokens[:, 200:], [50])), np.array(expected))


def test_only_whole_caches_are_packed():
    caches = pack_caches([KVCache(), RotatingKVCache(max_size=32), KVCache()], KVBits(8, 4))
    assert [type(c) for c in caches] == [PackedKVCache, RotatingKVCache, PackedKVCache]
    with pytest.raises(TQError, match="no layer of this model"):
        pack_caches([RotatingKVCache(max_size=32)], KVBits(8, 4))


def test_without_kernels_it_says_so(monkeypatch):
    monkeypatch.setattr(packed.cpu, "unavailable", lambda: "there is no compiler")
    with pytest.raises(TQError, match="there is no compiler"):
        pack_caches([KVCache()], KVBits(8, 4))


def test_one_sequence():
    with pytest.raises(TQError, match="one sequence, not 3"):
        PackedKVCache(KVBits(8, 4)).update_and_fetch(mx.zeros((3, 1, 2, 64)), mx.zeros((3, 1, 2, 64)))


@pytest.mark.parametrize(("text", "bits"), [("8,4", (8, 4)), ("4", (4, 4)), ("8, 3", (8, 3))])
def test_bits_are_read(text, bits):
    assert KVBits.parse(text) == KVBits(*bits)


@pytest.mark.parametrize("text", ["", "9", "8,4,2", "8,", "x", "7", "1,4", "-4"])
def test_other_bits_are_refused(text):
    with pytest.raises(UsageError, match="not one or two of 2, 3, 4, 5, 6, 8"):
        KVBits.parse(text)
