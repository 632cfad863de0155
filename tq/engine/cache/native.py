"""A packed cache in the memory of tq's CPU kernels, which write and read it as it is (tq/cpu/kernels).

Codes are in blocks of 64 tokens in the order of the kernels (kv_layout.h; native_layout.py changes it from and to that
of the reference). Kernels pack before they attend: in a long prompt, tokens attend to packed ones already in their own
chunk. Caches of several sequences are appended to, and attended to, in one call.
"""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache as once
from functools import lru_cache
from typing import Any

import mlx.core as mx

from tq import settings as environment
from tq.cpu import lazy, library
from tq.cpu.library import AttendParams
from tq.engine.cache.native_code import Coding, coding, declines_side
from tq.engine.cache.settings import BLOCK, KVSettings
from tq.engine.cache.storage import Form, Tokens, grown, with_rows
from tq.engine.ops import cpu

FLOAT16, PACKED = 1, 2  # tq_kv_format
SINK, CODES, RECENT = range(3)  # the segments of a cache
KEPT_SINKS = 512  # arrays of sinks that stay pinned: one per layer of a model that has them


def declines(settings: KVSettings, form: Form) -> str | None:
    """None, or why the kernels cannot keep such a cache."""
    reason = cpu.unavailable()
    if reason is not None:
        return reason
    for codec, bits, dim in (
        (settings.key_codec, settings.key_bits, form.key_dim),
        (settings.value_codec, settings.value_bits, form.value_dim),
    ):
        reason = declines_side(codec, bits, dim)
        if reason is not None:
            return reason
    return None


@lru_cache(maxsize=256)
def storage(settings: KVSettings, form: Form) -> "Native":
    return Native(settings, form)


@dataclass(frozen=True)
class View:
    """Tokens of a cache, or of one for each sequence of a batch.

    Attributes:
        arrays: Of all caches, one after another.
        params: One structure for all sequences of one cache, or one for each cache: a token's position is its column.
        batch: How many caches there are; 0: one, which may hold several sequences.
        columns: Of keys and values, and of a mask.
    """

    arrays: list[mx.array]
    params: Any
    batch: int
    columns: int


class Native:
    """The memory of a cache: `arrays` are float16 (B, heads, tokens, dim) of sink and recent tokens; between them, of
    keys and of values, uint8 (B, heads, blocks, bytes), float16 (B, heads, blocks * 64 * planes), and, with outlier
    channels, their order, int32 (B, heads, dim)."""

    name = "cpu"

    def __init__(self, settings: KVSettings, form: Form):
        self.settings, self.form = settings, form
        self.code = code(settings, form.key_dim, form.value_dim)

    def __deepcopy__(self, memo: dict) -> "Native":
        return self

    def empty(self) -> list[mx.array]:
        form = self.form
        rows = [(n, dim) for n in (self.settings.sink, 0) for dim in (form.key_dim, form.value_dim)]
        made = [mx.zeros((form.batch, form.heads, n, dim), mx.float16) for n, dim in rows]
        return [*made[:2], *self._packed(0), *made[2:]]

    def _packed(self, blocks: int) -> list[mx.array]:
        shape, made = (self.form.batch, self.form.heads), []
        for side in self.code.sides:
            made.append(mx.zeros((*shape, blocks, side.block_bytes), mx.uint8))
            made.append(mx.zeros((*shape, blocks * BLOCK * side.planes), mx.float16))
            if side.ordered:
                made.append(mx.zeros((*shape, side.dim), mx.int32) + mx.arange(side.dim, dtype=mx.int32))
        return made

    def _of_tokens(self) -> list[int]:
        """Rows that a block of tokens has in each packed array; 0: the array does not grow."""
        found: list[int] = []
        for side in self.code.sides:
            found += [1, BLOCK * side.planes] + [0] * side.ordered
        return found

    def reserve(self, cache: Tokens, n_tokens: int) -> None:
        """Make a cache's arrays long enough for more tokens."""
        tokens = cache.offset + n_tokens
        packed = cache.packed_after(tokens)
        blocks, have = packed // BLOCK, cache.arrays[2].shape[2]
        if blocks > have:
            longer = self._packed(grown(blocks, have) - have)
            cache.arrays[2:-2] = [
                mx.concatenate([a, more], axis=2) if rows else a
                for a, more, rows in zip(cache.arrays[2:-2], longer, self._of_tokens(), strict=True)
            ]
        recent = tokens - cache.dropped - cache.sink - packed
        if recent > cache.arrays[-2].shape[2]:
            cache.arrays[-2:] = [with_rows(a, recent) for a in cache.arrays[-2:]]

    def drop(self, cache: Tokens, tokens: int) -> None:
        """Forget the first packed tokens, whole blocks."""
        cache.arrays[2:-2] = [
            mx.contiguous(a[:, :, tokens // BLOCK * rows :]) if rows else a
            for a, rows in zip(cache.arrays[2:-2], self._of_tokens(), strict=True)
        ]
        cache.packed -= tokens
        cache.dropped += tokens

    def append(self, cache: Tokens, keys: mx.array, values: mx.array) -> View:
        n = keys.shape[2]
        self._append([cache], self._appended(cache, n), keys, values)
        return self.view(cache)

    def append_each(
        self, caches: Sequence[Tokens], keys: mx.array, values: mx.array, spans: Sequence[tuple[int, int]]
    ) -> None:
        """Add tokens (B, heads, n, dim) to the caches of B sequences: to each those of a span."""
        params = (AttendParams * len(caches))()
        for b, (cache, (first, last)) in enumerate(zip(caches, spans, strict=True)):
            one = self._appended(cache, last - first)
            one.n_sequences, one.new_first, one.new_count = len(caches), first, last - first
            params[b] = one
        self._append(caches, params, keys, values)

    def _appended(self, cache: Tokens, n: int) -> AttendParams:
        """A cache with room for n more tokens, as it is once they are there."""
        self.reserve(cache, n)
        after = cache.offset + n
        stored = cache.offset - cache.dropped
        params = self._params(cache, stored + n, cache.packed_after(after))
        params.position, params.pack_from = stored, min(stored, cache.sink) + cache.packed
        cache.packed, cache.offset = cache.packed_after(after), after
        return params

    def _append(self, caches: Sequence[Tokens], params: Any, keys: mx.array, values: mx.array) -> None:
        inputs = [keys.astype(mx.float32), values.astype(mx.float32)]
        for cache in caches:
            inputs += cache.arrays
            cache.arrays = []  # nobody else may hold them when they are written to
        outputs = [(a.shape, a.dtype) for a in inputs[2:]]
        arrays = lazy.call("tq_kv_append", params, inputs, outputs, range(2, len(inputs)), self.code.pinned)
        each = len(arrays) // len(caches)
        for b, cache in enumerate(caches):
            cache.arrays = arrays[b * each : (b + 1) * each]

    def view(self, cache: Tokens) -> View:
        tokens = cache.offset - cache.dropped
        return View(list(cache.arrays), self._params(cache, tokens, cache.packed), 0, tokens)

    def newest(self, view: View, n: int) -> View:
        """A view without the oldest tokens after the sink, so that `n` in all are left."""
        surplus = view.columns - n
        if surplus <= 0:
            return view
        params = AttendParams.from_buffer_copy(view.params)
        for segment in (params.segments[CODES], params.segments[RECENT]):
            gone = min(surplus, segment.count)
            segment.first += gone
            segment.count -= gone
            surplus -= gone
        params.segments[RECENT].position = params.segments[CODES].position + params.segments[CODES].count
        return View(view.arrays, params, 0, n)

    def joined(self, views: Sequence[View | None], starts: Sequence[int], columns: int) -> View:
        """Views of one sequence each as one, where the first token of a view is in column `start`; None has none."""
        params, arrays = (AttendParams * len(views))(), []
        for b, (view, start) in enumerate(zip(views, starts, strict=True)):
            if view is None:
                params[b] = self._no_segments()
                params[b].n_segments = 3
                params[b].segments[CODES].format = PACKED
                arrays += self.empty()
            else:
                params[b] = view.params
                for segment in params[b].segments[:3]:
                    segment.position += start
                arrays += view.arrays
            params[b].n_sequences = len(views)
        return View(arrays, params, len(views), columns)

    def decoded(self, view: View, dtype: mx.Dtype) -> tuple[mx.array, mx.array]:
        form = self.form
        shape = (view.batch or form.batch, form.heads, view.columns)
        outputs = [((*shape, dim), mx.float32) for dim in (form.key_dim, form.value_dim)]
        keys, values = lazy.call("tq_kv_unpack", view.params, view.arrays, outputs, keep=self.code.pinned)
        return keys.astype(dtype), values.astype(dtype)

    def attend(
        self,
        view: View,
        queries: mx.array,
        scale: float,
        mask: mx.array | str | None = None,
        sinks: mx.array | None = None,
        softcap: float = 0.0,
        values_are_keys: bool = False,
    ) -> mx.array | None:
        if queries.dtype != mx.float32 or values_are_keys or queries.size == 0:
            return None
        B, n_heads, length, _ = queries.shape
        inputs, also = [queries, *view.arrays], [self.code.pinned]
        if isinstance(mask, mx.array):
            mask = mask.reshape(*(1,) * (4 - mask.ndim), *mask.shape)
            mask = mask if mask.dtype == mx.bool_ else mask.astype(mx.float32)
            inputs.append(mx.broadcast_to(mask, (*mask.shape[:3], view.columns)))
        pinned = None
        if sinks is not None:
            pinned = pinned_sinks(sinks)
            also.append(pinned)
        params = type(view.params).from_buffer_copy(view.params)
        for one in params if view.batch else (params,):
            one.n_heads, one.scale, one.softcap, one.exact = n_heads, scale, softcap, environment.cpu_exact()
            one.mask = isinstance(mask, mx.array)
            if isinstance(mask, str) and length > 1:
                one.causal, one.position = True, view.columns - length
            if pinned is not None:
                one.sinks = pinned.addresses[0]
        keep = also[0] if len(also) == 1 else lazy.Pinned(also=also)
        outputs = [((B, n_heads, length, self.form.value_dim), mx.float32)]
        return lazy.call("tq_attend", params, inputs, outputs, keep=keep, strided=True)[0]

    def _params(self, cache: Tokens, tokens: int, packed: int) -> AttendParams:
        """A cache as it is once it holds so many tokens."""
        sink = min(tokens, cache.sink)
        params = self._no_segments()
        params.n_segments = 3
        params.segments[SINK] = library.Segment(format=FLOAT16, count=sink)
        params.segments[CODES] = library.Segment(format=PACKED, count=packed, position=sink)
        params.segments[RECENT] = library.Segment(format=FLOAT16, count=tokens - sink - packed, position=sink + packed)
        return params

    def _no_segments(self) -> AttendParams:
        form = self.form
        return AttendParams(
            n_kv_heads=form.heads, head_dim=form.key_dim, value_dim=form.value_dim, code=self.code.structure
        )


class Code:
    """How keys and values are coded, for C. `address` is that of a tq_kv_code, valid as long as `pinned`."""

    def __init__(self, sides: tuple[Coding, Coding]):
        self.sides = sides
        self.structure = library.KVCode(*(side.structure for side in sides))
        memory = lazy.Memory(ctypes.sizeof(self.structure))
        ctypes.memmove(memory.address, ctypes.byref(self.structure), ctypes.sizeof(self.structure))
        self.address = memory.address
        self.pinned = lazy.Pinned(memory, also=[pinned for side in sides for pinned in side.pinned])


def code(settings: KVSettings, key_dim: int, value_dim: int) -> Code:
    """The coding of keys and values."""
    group = settings.group_size
    return _code(
        coding(settings.key_codec, settings.key_bits, key_dim, group, False),
        coding(settings.value_codec, settings.value_bits, value_dim, group, True),
    )


@once
def _code(keys: Coding, values: Coding) -> Code:
    """It stays: no call has to keep it."""
    return Code((keys, values))


_sinks: dict[int, tuple[mx.array, lazy.Pinned]] = {}


def pinned_sinks(sinks: mx.array) -> lazy.Pinned:
    """The float32 values of ``sinks`` for the kernels, the same object for the same array."""
    found = _sinks.get(id(sinks))
    if found is None:
        if len(_sinks) >= KEPT_SINKS:
            _sinks.clear()
        # Beside its values the array itself is kept, because the id of a dead object is given to another.
        found = _sinks[id(sinks)] = (sinks, lazy.Pinned(sinks.astype(mx.float32)))
    return found[1]
