"""Where a native layer finds earlier keys and values, and puts new ones: mlx-lm's caches without their own update.

Afterwards a cache is what its own `update_and_fetch` would have left, but for the type of a new buffer and its length,
so that the next token may take either way.
"""

from collections.abc import Callable
from functools import cache as once
from typing import Any, NamedTuple, Protocol

import mlx.core as mx

FLOATS = (mx.float16, mx.float32)
STEP = 256  # tokens by which buffers grow, as in mlx-lm, or by a quarter if that is more


class Form(NamedTuple):
    """What a layer stores: its heads, and the type that a new buffer gets."""

    n_kv_heads: int
    head_dim: int
    value_dim: int
    dtype: mx.Dtype


class Place(NamedTuple):
    """Buffers (1, n_kv_heads, capacity, dim), and where the new tokens belong in them.

    Attributes:
        row: Of the first new token; the others follow.
        rows: That hold tokens once the new ones are there.
        position: Of the first new token in the sequence.
        finish: Called with the buffers that hold the new tokens.
    """

    keys: mx.array
    values: mx.array
    row: int
    rows: int
    position: int
    finish: Callable[[mx.array, mx.array], None]


class NativeCache(Protocol):
    """What a cache of tq's own offers to native layers."""

    def native_place(self, n_tokens: int, form: Form) -> Place | None:
        """The place of the next tokens, or None if the layer must call `update_and_fetch`."""


def place(cache: Any, n_tokens: int, form: Form) -> Place | None:
    """Where the next tokens go in a cache, or None if only its own `update_and_fetch` knows."""
    find = _places().get(type(cache)) or getattr(type(cache), "native_place", None)
    return None if find is None else find(cache, n_tokens, form)


@once
def plain_cache() -> type:
    """The cache that keeps all tokens in order."""
    from mlx_lm.models.cache import KVCache

    return KVCache


@once
def _places() -> dict[type, Callable[[Any, int, Form], Place | None]]:
    """By the exact type: a subclass may keep something else."""
    from mlx_lm.models.cache import RotatingKVCache

    return {plain_cache(): _in_order, RotatingKVCache: _in_ring}


def _in_order(cache: Any, n_tokens: int, form: Form) -> Place | None:
    offset: int = cache.offset
    end = offset + n_tokens
    keys, values = cache.keys, cache.values
    if keys is None:
        keys, values = _empty(_capacity(end), form)
    elif not _fits(keys, values, form):
        return None
    elif keys.shape[2] < end:
        more = max(_capacity(end), offset + offset // 4 // STEP * STEP) - offset
        keys, values = _longer(keys[:, :, :offset], more), _longer(values[:, :, :offset], more)

    def finish(keys: mx.array, values: mx.array) -> None:
        cache.keys, cache.values, cache.offset = keys, values, end

    return Place(keys, values, offset, end, offset, finish)


def _in_ring(cache: Any, n_tokens: int, form: Form) -> Place | None:
    """As RotatingKVCache: one token overwrites the oldest; of many, the cache first keeps what the first one sees."""
    offset: int = cache.offset
    keys, values = cache.keys, cache.values
    if keys is not None and not _fits(keys, values, form):
        return None
    if n_tokens > 1:
        row = 0
        if keys is None:
            keys, values = _empty(n_tokens, form)
        else:
            keys, values = cache._temporal_order(keys), cache._temporal_order(values)
            surplus = keys.shape[2] - cache.max_size + 1
            keys, values = cache._trim(surplus, keys), cache._trim(surplus, values)
            row = keys.shape[2]
            keys, values = _longer(keys, n_tokens), _longer(values, n_tokens)
        rows = row + n_tokens
    else:
        row = cache._idx
        if keys is None:
            keys, values = _empty(min(STEP, cache.max_size - offset), form)
            row = offset
        elif offset >= keys.shape[2] < cache.max_size:
            more = min(STEP, cache.max_size - offset)
            keys, values = _longer(keys, more), _longer(values, more)
            row = offset
        surplus = keys.shape[2] - cache.max_size
        if surplus > 0:
            keys, values = cache._trim(surplus, keys), cache._trim(surplus, values)
            row = cache.max_size
        if row == cache.max_size:
            row = cache.keep
        rows = min(offset + 1, keys.shape[2])

    def finish(keys: mx.array, values: mx.array) -> None:
        cache.keys, cache.values = keys, values
        cache.offset, cache._idx = offset + n_tokens, row + n_tokens

    return Place(keys, values, row, rows, offset, finish)


def _fits(keys: mx.array, values: mx.array, form: Form) -> bool:
    n, heads, _, dim = keys.shape
    return (
        keys.dtype in FLOATS
        and keys.dtype == values.dtype
        and (n, heads, dim, values.shape[3]) == (1, form.n_kv_heads, form.head_dim, form.value_dim)
    )


def _empty(capacity: int, form: Form) -> tuple[mx.array, mx.array]:
    shape = (1, form.n_kv_heads, capacity)
    return mx.zeros((*shape, form.head_dim), form.dtype), mx.zeros((*shape, form.value_dim), form.dtype)


def _longer(array: mx.array, more: int) -> mx.array:
    n, heads, _, dim = array.shape
    return mx.concatenate([array, mx.zeros((n, heads, more, dim), array.dtype)], axis=2)


def _capacity(tokens: int) -> int:
    return -(-tokens // STEP) * STEP
