"""A key-value cache in a few bits per number, which attention reads as it is (tq/cpu/kernels).

Each head vector is rotated and coded with one float16 scale: 8 bits as symmetric integers, fewer as Lloyd-Max codes
(TurboQuant, Zandieh et al. 2025, section 3.1). The first `sink` tokens and at least the last `window` stay in float16;
between them, blocks of 64 tokens are packed as they fill.
"""

import ctypes
from dataclasses import dataclass
from functools import cache as once
from typing import Any

import mlx.core as mx

from tq.cpu import lazy, library
from tq.engine.ops import cpu
from tq.engine.ops.prepared import codebook_table, prepare_rotation
from tq.engine.quantize.codebooks import stored_codebook
from tq.engine.quantize.rotation import random_signs
from tq.errors import TQError, UsageError

BITS = (2, 3, 4, 5, 6, 8)
BLOCK = 64  # tokens that are packed together
SINK, WINDOW = 128, 64
STEP_BLOCKS = 4  # by which the packed part grows, or by a quarter if that is more
FLOAT16, PACKED = 1, 2  # tq_kv_format


@dataclass(frozen=True)
class KVBits:
    """Bits of a number of keys, and of values."""

    keys: int
    values: int

    @classmethod
    def parse(cls, text: str) -> "KVBits":
        """ "8,4": keys, values; "4": both.

        Raises:
            UsageError: It is neither.
        """
        parts = text.split(",")
        valid = ", ".join(map(str, BITS))
        if len(parts) > 2 or not all(p.strip().isdecimal() and int(p) in BITS for p in parts):
            raise UsageError(f"KV bits {text!r} are not one or two of {valid}", hint="for example 8,4: keys, values")
        return cls(int(parts[0]), int(parts[-1]))


def pack_caches(caches: list[Any], bits: KVBits) -> list[Any]:
    """A model's fresh caches, with those that keep all keys and values replaced by packed ones.

    Others (windows, recurrent states) stay as they are.

    Raises:
        TQError: There are no kernels for packed caches here, or no layer has such a cache.
    """
    from mlx_lm.models.cache import KVCache

    reason = cpu.unavailable()
    if reason is not None:
        raise TQError(f"a packed KV cache needs tq's CPU kernels in this version: {reason}", "leave --kv-bits out")
    packed = [PackedKVCache(bits) if type(c) is KVCache else c for c in caches]
    if not any(isinstance(c, PackedKVCache) for c in packed):
        raise TQError("no layer of this model has a KV cache that can be packed", "leave --kv-bits out")
    return packed


class Code:
    """The tables of one coding, for C. `address` is that of a tq_kv_code, valid as long as `pinned`."""

    def __init__(self, bits: KVBits, key_dim: int, value_dim: int):
        also: list[lazy.Pinned] = []
        fields: list[tuple[int | None, float, int | None]] = []
        for n_bits in (bits.keys, bits.values):
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
            bits.keys, bits.values, key_table, value_table, key_scale, value_scale, key_values, value_values,
            rotations[0].rotation, rotations[1].rotation,
        )  # fmt: skip
        memory = lazy.Memory(ctypes.sizeof(self.structure))
        ctypes.memmove(memory.address, ctypes.byref(self.structure), ctypes.sizeof(self.structure))
        self.address = memory.address
        self.pinned = lazy.Pinned(memory, also=also)


@once
def code_of(bits: KVBits, key_dim: int, value_dim: int) -> Code:
    return Code(bits, key_dim, value_dim)


class PackedKVCache:
    """mlx-lm's cache of one layer, for one sequence.

    Attributes:
        offset: Tokens that it holds.
        packed: Tokens of them that are packed.
        arrays: Keys and values of the sink, (1, heads, sink, dim) float16; keys and their scales, values and their
            scales of packed tokens, (1, heads, blocks, bytes) uint8 and (1, heads, 64 blocks) float16; keys and values
            of the recent tokens, (1, heads, window + 64, dim) float16. Empty before the first token.
    """

    def __init__(self, bits: KVBits, sink: int = SINK, window: int = WINDOW):
        self.kv_bits, self.sink, self.window = bits, sink, window
        self.offset = self.packed = 0
        self.arrays: list[mx.array] = []

    def packed_after(self, tokens: int) -> int:
        """How many are packed once there are so many."""
        return max(self.packed, (tokens - self.sink - self.window) // BLOCK * BLOCK, 0)

    def reserve(self, n_tokens: int, n_kv_heads: int, key_dim: int, value_dim: int) -> None:
        """Make the arrays long enough for more tokens."""
        blocks = self.packed_after(self.offset + n_tokens) // BLOCK
        if not self.arrays:
            rows = [(n, dim) for n in (self.sink, self.window + BLOCK) for dim in (key_dim, value_dim)]
            made = [mx.zeros((1, n_kv_heads, n, dim), mx.float16) for n, dim in rows]
            self.arrays = [*made[:2], *self._packed_arrays(0, n_kv_heads, key_dim, value_dim), *made[2:]]
        have = self.arrays[2].shape[2]
        if blocks > have:
            more = max(-(-blocks // STEP_BLOCKS) * STEP_BLOCKS - have, have // 4)
            longer = self._packed_arrays(more, n_kv_heads, key_dim, value_dim)
            joined = [mx.concatenate([a, b], axis=2) for a, b in zip(self.arrays[2:6], longer, strict=True)]
            self.arrays = [*self.arrays[:2], *joined, *self.arrays[6:]]

    def _packed_arrays(self, blocks: int, heads: int, key_dim: int, value_dim: int) -> list[mx.array]:
        size = library.library().tq_kv_block_bytes
        made = []
        for values, (dim, bits) in enumerate(((key_dim, self.kv_bits.keys), (value_dim, self.kv_bits.values))):
            made.append(mx.zeros((1, heads, blocks, size(dim, bits, values)), mx.uint8))
            made.append(mx.zeros((1, heads, blocks * BLOCK), mx.float16))
        return made

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """For attention that cannot read packed tokens: all keys and values (1, heads, tokens, dim), decoded."""
        batch, heads, n, key_dim = keys.shape
        if batch != 1:
            raise TQError(f"a packed KV cache holds one sequence, not {batch}", "leave --kv-bits out")
        self.reserve(n, heads, key_dim, values.shape[3])
        code = code_of(self.kv_bits, key_dim, values.shape[3])
        params = self._params(code, heads, key_dim, values.shape[3], self.offset + n)
        params.position, params.pack_from = self.offset, min(self.offset, self.sink) + self.packed
        inputs = [keys.astype(mx.float32), values.astype(mx.float32), *self.arrays]
        outputs = [(a.shape, a.dtype) for a in self.arrays]
        self.advance(lazy.call("tq_kv_append", params, inputs, outputs, range(2, 10), code.pinned), n)
        return self.decoded(keys.dtype)

    def advance(self, arrays: list[mx.array], n_tokens: int) -> None:
        """These arrays hold so many more tokens."""
        self.arrays = arrays
        self.offset += n_tokens
        self.packed = self.packed_after(self.offset)

    def decoded(self, dtype: mx.Dtype = mx.float32) -> tuple[mx.array, mx.array]:
        """All keys and values, (1, heads, tokens, dim)."""
        sink = min(self.offset, self.sink)
        recent = self.offset - sink - self.packed
        parts = [self.arrays[:2], self._unpacked(), self.arrays[6:]]
        counts = (sink, self.packed, recent)
        keys, values = (
            mx.concatenate([part[side][:, :, :n].astype(dtype) for part, n in zip(parts, counts, strict=True)], axis=2)
            for side in (0, 1)
        )
        return keys, values

    def _unpacked(self) -> list[mx.array]:
        _, heads, _, key_dim = self.arrays[0].shape
        value_dim = self.arrays[1].shape[3]
        shapes = [(1, heads, self.packed, dim) for dim in (key_dim, value_dim)]
        if self.packed == 0:
            return [mx.zeros(shape) for shape in shapes]
        code = code_of(self.kv_bits, key_dim, value_dim)
        params = library.AttendParams(n_kv_heads=heads, head_dim=key_dim, value_dim=value_dim, n_segments=1)
        params.segments[0] = library.Segment(format=PACKED, count=self.packed)
        params.code = code.structure
        return lazy.call("tq_kv_unpack", params, self.arrays[2:6], [(s, mx.float32) for s in shapes], keep=code.pinned)

    def _params(self, code: Code, heads: int, key_dim: int, value_dim: int, tokens: int) -> library.AttendParams:
        """The cache as it is once it holds so many tokens."""
        sink, packed = min(tokens, self.sink), self.packed_after(tokens)
        params = library.AttendParams(n_kv_heads=heads, head_dim=key_dim, value_dim=value_dim, n_segments=3)
        params.segments[0] = library.Segment(format=FLOAT16, count=sink)
        params.segments[1] = library.Segment(format=PACKED, count=packed, position=sink)
        params.segments[2] = library.Segment(format=FLOAT16, count=tokens - sink - packed, position=sink + packed)
        params.code = code.structure
        return params

    # --- what mlx-lm asks of a cache ---

    @property
    def state(self) -> Any:
        return self.arrays

    @state.setter
    def state(self, arrays: Any) -> None:
        self.arrays = list(arrays)

    @property
    def meta_state(self) -> tuple[str, ...]:
        numbers = (self.kv_bits.keys, self.kv_bits.values, self.sink, self.window, self.offset, self.packed)
        return tuple(map(str, numbers))

    @meta_state.setter
    def meta_state(self, state: tuple[str, ...]) -> None:
        keys, values, self.sink, self.window, self.offset, self.packed = map(int, state)
        self.kv_bits = KVBits(keys, values)

    @classmethod
    def from_state(cls, state: Any, meta_state: tuple[str, ...]) -> "PackedKVCache":
        made = cls(KVBits(8, 8))
        made.state, made.meta_state = state, meta_state
        return made

    def is_trimmable(self) -> bool:
        return True

    def trim(self, n: int) -> int:
        """Forget the last n tokens. A block that is cut is decoded back into the recent ones."""
        n = min(self.offset, n)
        left = self.offset - n
        rest = max(left - self.sink, 0)
        if rest < self.packed:
            packed = rest // BLOCK * BLOCK
            kept = [side[:, :, packed:rest].astype(mx.float16) for side in self._unpacked()]
            recent = [mx.concatenate([new, old[:, :, rest - packed :]], axis=2)
                      for new, old in zip(kept, self.arrays[6:], strict=True)]  # fmt: skip
            self.arrays = [*self.arrays[:6], *recent]
            self.packed = packed
        self.offset = left
        return n

    def size(self) -> int:
        return self.offset

    def empty(self) -> bool:
        return not self.arrays

    def make_mask(self, *args: Any, **kwargs: Any) -> Any:
        from mlx_lm.models.cache import create_attention_mask

        return create_attention_mask(*args, offset=self.offset, **kwargs)

    @property
    def nbytes(self) -> int:
        return sum(a.nbytes for a in self.arrays)
