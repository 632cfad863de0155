"""A packed cache on Metal kernels holds and attends to what the storage in plain mx does."""

import mlx.core as mx
import numpy as np
import pytest
from metal.emulator import Kernel

from tq.engine import ops
from tq.engine.cache import mirror
from tq.engine.cache.packed import PackedKVCache
from tq.engine.cache.settings import KVSettings
from tq.engine.cache.storage import Form, Reference, choose
from tq.errors import TQError


@pytest.fixture
def backend(metal, monkeypatch):
    monkeypatch.setattr(ops.metal, "unavailable", lambda: None)
    monkeypatch.setattr(ops.cpu, "unavailable", lambda: "caches are on Metal kernels here")
    monkeypatch.setattr(mirror, "LIMIT_BYTES", -1)  # plain mx decodes packed tokens, as on a GPU
    monkeypatch.setitem(Kernel.defaults, "check", False)  # each kernel has tests of its own


def vectors(*shape, seed):
    return mx.array(np.random.default_rng(seed).standard_normal(shape).astype(np.float32))


def relative(got, expected):
    return float(mx.linalg.norm(got - expected) / mx.linalg.norm(expected))


@pytest.mark.parametrize(
    ("settings", "dims"),
    [
        (KVSettings(8, 3, sink=8, window=16), (64, 64)),
        (KVSettings(4, 2, sink=0, window=0, group_size=32), (96, 64)),
    ],
    ids=lambda value: value.label() if isinstance(value, KVSettings) else str(value),
)
def test_a_cache_attends_as_in_plain_mx(backend, settings, dims):
    form = Form(1, 2, *dims, "float32")
    made, reason = choose(settings, form)
    assert (type(made).__name__, reason) == ("Metal", None)
    plain = Reference(settings, form)
    caches = []
    for storage in (made, plain):
        cache = PackedKVCache(settings)
        cache.form, cache.storage, cache.arrays = form, storage, storage.empty()
        caches.append(cache)
    for step, n in enumerate((100, 1, 2)):
        keys, values = vectors(1, 2, n, dims[0], seed=step), vectors(1, 2, n, dims[1], seed=10 + step)
        queries = vectors(1, 6, n, dims[0], seed=20 + step)
        found = []
        for cache in caches:
            fetched = cache.update_and_fetch(keys, values)
            found.append(cache.attend(queries, *fetched, scale=0.1, mask="causal"))
        assert relative(*found) < 1e-3  # a number between two levels may get either
    assert caches[0].packed == caches[1].packed >= 64
    both = [cache.keys_and_values() for cache in caches]
    assert all(relative(*pair) < 2e-2 for pair in zip(*both, strict=True))


def test_a_saved_cache_goes_on_in_plain_mx(backend, monkeypatch):
    cache = PackedKVCache(KVSettings(4, 4, sink=0, window=0))
    cache.update_and_fetch(vectors(1, 1, 70, 64, seed=0), vectors(1, 1, 70, 64, seed=1))
    expected, state = cache.keys_and_values(), cache.state
    monkeypatch.setattr(ops.metal, "unavailable", lambda: "there is no Metal GPU")
    again = PackedKVCache.from_state(state)
    assert type(again.storage) is Reference
    assert all(mx.array_equal(*pair) for pair in zip(again.keys_and_values(), expected, strict=True))


def test_what_no_kernel_reads_is_in_plain_mx_and_says_why(backend, monkeypatch):
    made, reason = choose(KVSettings(4, 4, "affine", "affine"), Form(1, 2, 64, 64, "float16"))
    assert type(made) is Reference
    assert "no Metal kernel for the KV codec affine" in reason
    assert "multiples of 16" in choose(KVSettings(4, 4), Form(1, 2, 40, 40, "float16"))[1]
    monkeypatch.setenv("TQ_BACKEND", "metal")
    with pytest.raises(TQError, match="the metal kernels cannot pack this KV cache"):
        choose(KVSettings(4, 4, "polar", "polar"), Form(1, 2, 64, 64, "float16"))
