"""A packed cache in the memory of tq's CPU kernels, which write and read it as it is (tq/cpu/kernels).

Codes of 8 bits are symmetric integers, fewer are Lloyd-Max codes, in blocks of 64 tokens in the order of the kernels.
Kernels pack before they attend: in a long prompt, tokens attend to packed ones already in their own chunk.
"""

import ctypes
from functools import cache as once
from functools import lru_cache
from typing import Any

import mlx.core as mx

from tq import settings as environment
from tq.cpu import lazy, library
from tq.engine.cache.settings import BLOCK, KVSettings, number
from tq.engine.cache.storage import Form, Tokens, grown, with_rows
from tq.engine.ops import cpu
from tq.engine.ops.prepared import codebook_table, prepare_rotation
from tq.engine.quantize.codebooks import stored_codebook
from tq.engine.quantize.rotation import hadamard_block, random_signs

BITS = (2, 3, 4, 5, 6, 8)
SMALLEST_ROTATION = 16  # numbers of a vector that are mixed with each other, at least
FLOAT16, PACKED = 1, 2  # tq_kv_format
KEPT_SINKS = 512  # arrays of sinks that stay pinned: one per layer of a model that has them


def declines(settings: KVSettings, form: Form, windowed: bool = False) -> str | None:
    """None, or why the kernels cannot keep such a cache."""
    reason = cpu.unavailable()
    if reason is not None:
        return reason
    for codec, bits in ((settings.key_codec, settings.key_bits), (settings.value_codec, settings.value_bits)):
        if codec != "lloyd-max":
            return f"there is no kernel for the KV codec {codec}"
        if bits not in BITS:
            return f"there is no kernel for keys or values of {number(bits)} bits"
    if settings.group_size:
        return "there is no kernel for groups in a head vector"
    if windowed:
        return "there is no kernel for a packed sliding window"
    for dim in (form.key_dim, form.value_dim):
        if hadamard_block(dim) < SMALLEST_ROTATION:
            return f"a head dimension of {dim} has no Hadamard rotation"
    return None


class Code:
    """The tables of one coding, for C. `address` is that of a tq_kv_code, valid as long as `pinned`."""

    def __init__(self, key_bits: int, value_bits: int, key_dim: int, value_dim: int):
        also: list[lazy.Pinned] = []
        fields: list[tuple[int | None, float, int | None]] = []
        for n_bits in (key_bits, value_bits):
            if n_bits == 8:
                fields.append((None, 0.0, None))
                continue
            table = codebook_table(tuple(stored_codebook("lloyd-max", n_bits).tolist()))
            pinned = lazy.Pinned(mx.array(table.high), mx.array(table.values))
            also.append(pinned)
            fields.append((pinned.addresses[0], table.scale, pinned.addresses[1]))
        rotations = [prepare_rotation(mx.array(random_signs(dim))) for dim in (key_dim, value_dim)]
        also += [r.pinned for r in rotations if r.pinned is not None]
        (key_table, key_scale, key_values), (value_table, value_scale, value_values) = fields
        self.structure = library.KVCode(
            key_bits, value_bits, key_table, value_table, key_scale, value_scale, key_values, value_values,
            rotations[0].rotation, rotations[1].rotation,
        )  # fmt: skip
        memory = lazy.Memory(ctypes.sizeof(self.structure))
        ctypes.memmove(memory.address, ctypes.byref(self.structure), ctypes.sizeof(self.structure))
        self.address = memory.address
        self.pinned = lazy.Pinned(memory, also=also)


@once
def code(key_bits: int, value_bits: int, key_dim: int, value_dim: int) -> Code:
    """The tables of a coding, which stay: no call has to keep them."""
    return Code(key_bits, value_bits, key_dim, value_dim)


@lru_cache(maxsize=256)
def storage(settings: KVSettings, form: Form) -> "Native":
    return Native(settings, form)


class Native:
    """The memory of a cache: `arrays` are float16 (1, heads, tokens, dim) and, packed, uint8 (1, heads, blocks, bytes)
    and float16 (1, heads, 64 blocks) of keys and of values. A view is a cache's arrays with the number of tokens."""

    name = "cpu"

    def __init__(self, settings: KVSettings, form: Form):
        self.settings, self.form = settings, form
        self.bits = int(settings.key_bits), int(settings.value_bits)
        self.code = code(*self.bits, form.key_dim, form.value_dim)

    def __deepcopy__(self, memo: dict) -> "Native":
        return self

    def empty(self) -> list[mx.array]:
        form, settings = self.form, self.settings
        rows = [(n, dim) for n in (settings.sink, 0) for dim in (form.key_dim, form.value_dim)]
        made = [mx.zeros((form.batch, form.heads, n, dim), mx.float16) for n, dim in rows]
        return [*made[:2], *self._packed(0), *made[2:]]

    def _packed(self, blocks: int) -> list[mx.array]:
        size, shape = library.library().tq_kv_block_bytes, (self.form.batch, self.form.heads)
        made = []
        for values, (dim, bits) in enumerate(zip((self.form.key_dim, self.form.value_dim), self.bits, strict=True)):
            made.append(mx.zeros((*shape, blocks, size(dim, bits, values)), mx.uint8))
            made.append(mx.zeros((*shape, blocks * BLOCK), mx.float16))
        return made

    def reserve(self, cache: Tokens, n_tokens: int) -> None:
        """Make a cache's arrays long enough for more tokens."""
        tokens = cache.offset + n_tokens
        packed = cache.packed_after(tokens)
        blocks, have = packed // BLOCK, cache.arrays[2].shape[2]
        if blocks > have:
            longer = self._packed(grown(blocks, have) - have)
            joined = [mx.concatenate(list(pair), axis=2) for pair in zip(cache.arrays[2:6], longer, strict=True)]
            cache.arrays = [*cache.arrays[:2], *joined, *cache.arrays[6:]]
        recent = tokens - cache.sink - packed
        if recent > cache.arrays[6].shape[2]:
            cache.arrays = [*cache.arrays[:6], *(with_rows(a, recent) for a in cache.arrays[6:])]

    def append(self, cache: Tokens, keys: mx.array, values: mx.array) -> Any:
        n = keys.shape[2]
        self.reserve(cache, n)
        tokens = cache.offset + n
        params = self._params(cache, tokens, cache.packed_after(tokens))
        params.position, params.pack_from = cache.offset, min(cache.offset, cache.sink) + cache.packed
        inputs = [keys.astype(mx.float32), values.astype(mx.float32), *cache.arrays]
        outputs = [(a.shape, a.dtype) for a in cache.arrays]
        cache.arrays = lazy.call("tq_kv_append", params, inputs, outputs, range(2, 10), self.code.pinned)
        cache.packed, cache.offset = cache.packed_after(tokens), tokens
        return self.view(cache)

    def view(self, cache: Tokens) -> Any:
        return list(cache.arrays), self._params(cache, cache.offset, cache.packed), cache.packed

    def decoded(self, view: Any, dtype: mx.Dtype) -> tuple[mx.array, mx.array]:
        arrays, params, packed = view
        parts = [arrays[:2], self._unpacked(arrays, packed), arrays[6:]]
        counts = [params.segments[i].count for i in range(3)]
        keys, values = (
            mx.concatenate([part[side][:, :, :n].astype(dtype) for part, n in zip(parts, counts, strict=True)], axis=2)
            for side in (0, 1)
        )
        return keys, values

    def _unpacked(self, arrays: list[mx.array], packed: int) -> list[mx.array]:
        form = self.form
        shapes = [(form.batch, form.heads, packed, dim) for dim in (form.key_dim, form.value_dim)]
        if packed == 0:
            return [mx.zeros(shape) for shape in shapes]
        params = self._no_segments()
        params.n_segments, params.segments[0] = 1, library.Segment(format=PACKED, count=packed)
        outputs = [(shape, mx.float32) for shape in shapes]
        return lazy.call("tq_kv_unpack", params, arrays[2:6], outputs, keep=self.code.pinned)

    def attend(
        self,
        view: Any,
        queries: mx.array,
        scale: float,
        mask: mx.array | str | None = None,
        sinks: mx.array | None = None,
        softcap: float = 0.0,
        values_are_keys: bool = False,
    ) -> mx.array | None:
        arrays, held, _ = view
        if queries.dtype != mx.float32 or values_are_keys or queries.size == 0:
            return None
        B, n_heads, length, _ = queries.shape
        tokens = sum(held.segments[i].count for i in range(3))
        params = library.AttendParams.from_buffer_copy(held)
        params.n_heads, params.scale, params.softcap = n_heads, scale, softcap
        params.exact = environment.cpu_exact()
        inputs, also = [queries, *arrays], [self.code.pinned]
        if isinstance(mask, mx.array):
            mask = mask.reshape(*(1,) * (4 - mask.ndim), *mask.shape)
            mask = mask if mask.dtype == mx.bool_ else mask.astype(mx.float32)
            inputs.append(mx.broadcast_to(mask, (*mask.shape[:3], tokens)))
            params.mask = True
        elif mask is not None and length > 1:
            params.causal, params.position = True, tokens - length
        if sinks is not None:
            also.append(pinned_sinks(sinks))
            params.sinks = also[-1].addresses[0]
        keep = also[0] if len(also) == 1 else lazy.Pinned(also=also)
        outputs = [((B, n_heads, length, self.form.value_dim), mx.float32)]
        return lazy.call("tq_attend", params, inputs, outputs, keep=keep, strided=True)[0]

    def _params(self, cache: Tokens, tokens: int, packed: int) -> library.AttendParams:
        """A cache as it is once it holds so many tokens."""
        sink = min(tokens, cache.sink)
        params = self._no_segments()
        params.n_segments = 3
        params.segments[0] = library.Segment(format=FLOAT16, count=sink)
        params.segments[1] = library.Segment(format=PACKED, count=packed, position=sink)
        params.segments[2] = library.Segment(format=FLOAT16, count=tokens - sink - packed, position=sink + packed)
        return params

    def _no_segments(self) -> library.AttendParams:
        form = self.form
        return library.AttendParams(
            n_kv_heads=form.heads, head_dim=form.key_dim, value_dim=form.value_dim, code=self.code.structure
        )


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
