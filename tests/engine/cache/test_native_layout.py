"""What the CPU kernels keep is read by the reference, and the other way round, with the same codes."""

import json

import mlx.core as mx
import numpy as np
import pytest
from kv_cases import relative, vectors

import tq
from tq.cpu import library
from tq.engine.cache import native_layout
from tq.engine.cache.native_code import Part
from tq.engine.cache.packed import PackedKVCache
from tq.engine.cache.settings import KVSettings
from tq.engine.cache.window import PackedRotatingKVCache
from tq.errors import TQError

SMALL = {"sink": 5, "window": 20}
needs_kernels = pytest.mark.skipif(not library.state().active, reason=f"no kernels: {library.state().reason}")
FORMS = [
    *(KVSettings(b, 9 - b, **SMALL) for b in range(1, 9)),
    KVSettings(8, 3, group_size=32, **SMALL), KVSettings(4, 5, "affine", "lloyd-max", group_size=64, **SMALL),
    KVSettings(3.5, 2.5, **SMALL),
]  # fmt: skip


@pytest.mark.parametrize("values", [False, True])
@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("dim", [7, 40, 64, 96, 130])
def test_packing_and_unpacking(bits, dim, values):
    codes = np.random.default_rng(bits).integers(0, 1 << bits, (2, 3, 128, dim)).astype(np.uint8)
    part = Part(dim, bits)
    blocks = native_layout.pack(codes, part, values)
    assert blocks.shape == (2, 3, 2, native_layout.block_bytes(part, values))
    np.testing.assert_array_equal(native_layout.unpack(blocks, part, values), codes)


def held(settings, tokens, dims):
    cache, at = PackedKVCache(settings), 0
    k, v = vectors(tokens, dims[0], batch=2), vectors(tokens, dims[1], batch=2, seed=1)
    while at < tokens:
        n = min(250, tokens - at)
        cache.update_and_fetch(k[:, :, at : at + n], v[:, :, at : at + n])
        at += n
    return cache


@needs_kernels
@pytest.mark.parametrize("settings", FORMS, ids=KVSettings.label)
@pytest.mark.parametrize(("tokens", "dims"), [(300, (64, 128)), (20, (64, 64)), (150, (96, 80))])
def test_both_ways(settings, tokens, dims, monkeypatch):
    if settings.key_bits == 3.5 and 96 in dims:
        pytest.skip("parts of 24, 72, 20 and 60 numbers are rotated in blocks")
    for there, back in (("cpu", "reference"), ("reference", "cpu")):
        monkeypatch.setenv("TQ_BACKEND", there)
        cache = held(settings, tokens, dims)
        expected = cache.keys_and_values()
        mx.eval(expected)
        for name in (back, there):  # and home again
            monkeypatch.setenv("TQ_BACKEND", name)
            cache = PackedKVCache.from_state(cache.state)
            assert (cache.storage.name, cache.offset) == (name, tokens)
            got = cache.keys_and_values()
            for a, b in zip(got, expected, strict=True):
                # Sink and recent tokens are float16 in the one.
                assert relative(a, b) < 1e-3
                packed = slice(5, 5 + cache.packed)
                assert not cache.packed or relative(a[:, :, packed], b[:, :, packed]) < 1e-6
        more = vectors(100, dims[0], batch=2, seed=2), vectors(100, dims[1], batch=2, seed=3)
        assert cache.update_and_fetch(*more)[0].shape[2] == tokens + 100


@needs_kernels
def test_dimensions_that_are_rotated_in_blocks_are_coded_again(monkeypatch):
    for there, back in (("cpu", "reference"), ("reference", "cpu")):
        monkeypatch.setenv("TQ_BACKEND", there)
        cache = held(KVSettings(8, 4, **SMALL), 200, (120, 120))
        expected = cache.keys_and_values()
        mx.eval(expected)
        monkeypatch.setenv("TQ_BACKEND", back)
        got = PackedKVCache.from_state(cache.state).keys_and_values()
        assert relative(got[0], expected[0]) < 0.01
        assert relative(got[1], expected[1]) < 0.12  # the error of 4 bits once more


@needs_kernels
def test_files_of_kernels_are_read_without_them(monkeypatch, tmp_path):
    path = tmp_path / "caches.safetensors"
    caches = [held(KVSettings(8, 3, **SMALL), 300, (64, 64)), PackedRotatingKVCache(KVSettings(4, 4), 400)]
    caches[1].update_and_fetch(vectors(700, 64), vectors(700, 64, seed=1))
    caches[1].update_and_fetch(vectors(1, 64, seed=2), vectors(1, 64, seed=3))
    assert [c.storage.name for c in caches] == ["cpu", "cpu"]
    tq.save_prompt_cache(path, caches)
    expected = [c.keys_and_values() for c in caches]
    monkeypatch.setenv("TQ_BACKEND", "reference")
    again = tq.load_prompt_cache(path)
    assert [c.storage.name for c in again] == ["reference", "reference"]
    for cache, sides in zip(again, expected, strict=True):
        for a, b in zip(cache.keys_and_values(), sides, strict=True):
            assert relative(a, b) < 1e-3


@needs_kernels
def test_arrays_of_another_layout_are_refused():
    cache = held(KVSettings(8, 4, **SMALL), 200, (64, 64))
    header, arrays, *fitted = cache.state
    arrays = [*arrays[:2], arrays[2][..., :-64], *arrays[3:]]
    with pytest.raises(TQError, match="another version of tq"):
        PackedKVCache.from_state((header, arrays, *fitted))


@needs_kernels
def test_a_damaged_file_is_refused():
    """Kernels would read, or write, behind the end of arrays."""
    cache = held(KVSettings(2.5, 4, **SMALL), 200, (64, 64))
    line, arrays, *rest = cache.state
    order = next(i for i, array in enumerate(arrays) if array.dtype == mx.int32)

    def changed(i, array):
        return line, [*arrays[:i], array, *arrays[i + 1 :]], *rest

    def counted(*tokens):
        return json.dumps(json.loads(line) | {"tokens": tokens}), arrays, *rest

    damaged = [
        *(counted(*tokens) for tokens in ((2000, 1920, 0), (900, cache.packed, 0), (200, -64, 0), (200, 128, 100))),
        changed(order, arrays[order] + 40),
        changed(order, arrays[order] - 1),
        changed(3, arrays[3].astype(mx.float32)),
        changed(1, arrays[1][..., :32]),
        changed(len(arrays) - 1, arrays[-1][..., :32]),
    ]
    for state in damaged:
        with pytest.raises(TQError, match="is damaged"):
            PackedKVCache.from_state(state)
    assert PackedKVCache.from_state((line, arrays, *rest)).packed == cache.packed > 0
