"""Launches the attention kernels: over a sink, packed tokens and recent ones, which are read as they are.

A few query rows of a key head (heads that share it, times queries) are served by attend_rows.metal, the tokens split
among threadgroups, and attend_combine.metal; many rows by attend_tile.metal.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import mlx.core as mx

from tq.metal.fit import MOST_TERMS, Decoding, decoding
from tq.metal.kernel import Kernel, Launch, Template

INPUTS = (
    *("q", "rotated_q", "keys", "key_scales", "values", "value_scales", "key_levels", "value_levels"),
    *("sink_keys", "sink_values", "recent_keys", "recent_values", "mask", "starts", "sinks", "shape", "factors"),
)
PARTIAL = ("sums", "maxima", "totals")
ROWS = Kernel("attend_rows", INPUTS, PARTIAL)
TILE = Kernel("attend_tile", INPUTS, PARTIAL)
COMBINE = Kernel("attend_combine", (*PARTIAL, "rotation", "sinks", "shape"), ("out",))
FLOATS = (mx.float16, mx.bfloat16, mx.float32)

# As in attend_rows.metal.
SIMD_GROUPS, SLICE_TOKENS = 8, 128
ROWS_AT_MOST = 4  # of a SIMD-group: their queries, or sums, are in its registers
TILES = (1, 2, 4)  # SIMD-groups that read the same tokens for different rows
MOST_NUMBERS = 512  # of a vector: 32 lanes, 16 each
# As in attend_tile.metal.
TILE_ROWS, TILE_THREADS = 32, 128
TILE_NUMBERS = 256  # of a vector, at most: a lane has a fourth of its row's sums in registers
TILE_SPLIT = 128  # tokens of a split, at least
COMBINE_THREADS = 512
# Relative RMS error of the fitted levels. It enters twice, with keys and with values.
HALF_ERROR = 7e-4
ENOUGH = 128  # threadgroups that keep a large GPU busy


@dataclass(frozen=True)
class Codes:
    """How one side, keys or values, is packed by the codec lloyd-max.

    Attributes:
        bits: 1 to 8; at 8 a code is an integer and 128.
        codebook: Any float type (2^bits,); not read at 8 bits.
        rotation: float32 (dim, dim): codes are of x @ rotation.T.
        group_size: Numbers that share a scale; 0: all of a vector.
    """

    bits: int
    codebook: mx.array
    rotation: mx.array
    group_size: int = 0

    @property
    def dim(self) -> int:
        return self.rotation.shape[0]


@dataclass(frozen=True)
class Tokens:
    """Keys and values of a cache. Each array may hold more tokens than are in use.

    Attributes:
        sink, recent: Keys and values (B, n_kv_heads, tokens, dim) of the type of the queries; the first `n_sink` and
            `n_recent` tokens count. With none, arrays may be empty.
        keys, values: Codes, uint32 (B, n_kv_heads, tokens, words), and scales, float16 (B, n_kv_heads, tokens, groups);
            of 8 tokens at least, or empty.
        first, n_packed: Of packed tokens, those that count.
    """

    sink: tuple[mx.array, mx.array]
    keys: tuple[mx.array, mx.array]
    values: tuple[mx.array, mx.array]
    recent: tuple[mx.array, mx.array]
    n_sink: int
    first: int
    n_packed: int
    n_recent: int

    @property
    def count(self) -> int:
        return self.n_sink + self.n_packed + self.n_recent


def declines(dtype: mx.Dtype, key: Codes, value: Codes) -> str | None:
    """Why the kernels cannot attend to such tokens, if so."""
    if dtype not in FLOATS:
        return f"activations are {dtype}"
    for side, codes in (("keys", key), ("values", value)):
        if not 1 <= codes.bits <= 8:
            return f"{codes.bits} bits of {side}"
        if codes.dim % 16 or codes.dim > MOST_NUMBERS:
            return f"{side} of {codes.dim} numbers: the kernels take multiples of 16 up to {MOST_NUMBERS}"
        if codes.group_size % 16:
            return f"{side} in groups of {codes.group_size}, not a multiple of 16"
    return None


def attend(
    queries: mx.array,
    tokens: Tokens,
    key: Codes,
    value: Codes,
    scale: float,
    mask: mx.array | str | None = None,
    sinks: mx.array | None = None,
    softcap: float = 0.0,
    starts: mx.array | None = None,
) -> mx.array:
    """Attention over the sink, packed and recent tokens, in this order.

    Args:
        queries: (B, n_heads, L, key_dim).
        mask: None, "causal" (queries are the last L tokens), or an array that broadcasts to (B, n_heads, L, tokens): a
            bool one (true: visible), or one that is added to scores.
        sinks: (n_heads,): a score that takes part in the softmax and has no value.
        softcap: If not 0, scores are softcap * tanh(score / softcap) before the mask.
        starts: int32 (B,): the first token that a sequence sees (left padding, a window).

    Raises:
        ValueError: The mask does not fit.

    Returns:
        (B, n_heads, L, value_dim), the type of `queries`; zeros for a query that sees nothing.
    """
    B, n_heads, length, _ = queries.shape
    dtype, key_heads = queries.dtype, tokens.keys[0].shape[1]
    plan = _plan(tokens, B * key_heads, n_heads // key_heads * length, max(key.dim, value.dim))
    # What is staged for 8x8 matrices: half is as exact as the float16 scales.
    staged = mx.float32 if dtype == mx.float32 else mx.float16
    q = queries if plan.kernel is ROWS else queries.astype(staged)
    if plan.final:
        tokens = _rotated_tokens(tokens, key, value, staged)
        q = rotated = _rotated(q, key, staged)
    else:
        # Rotations keep scalar products: rotated queries score rotated keys.
        rotated = _rotated(queries, key, mx.float32 if plan.kernel is ROWS else staged)
    shape = _integers(
        *(tokens.n_sink, tokens.first, tokens.n_packed, tokens.n_recent, *plan.splits[:2], sum(plan.splits)),
        *(plan.split_tokens, n_heads, key_heads, length, isinstance(mask, str)),
    )
    key_form, value_form = _decoding(key, dtype), _decoding(value, dtype)
    mask_kind, mask = _mask(mask, (B, n_heads, length, tokens.count), shape)
    template: Template = {
        **{"T": tokens.recent[0].dtype, "KEY_DIM": key.dim, "VALUE_DIM": value.dim},
        **{"KEY_BITS": key.bits, "KEY_FORM": key_form.form, "KEY_GROUP": key.group_size},
        **{"VALUE_BITS": value.bits, "VALUE_FORM": value_form.form, "VALUE_GROUP": value.group_size},
        **{"KEY_TABLE": key_form.table_size, "VALUE_TABLE": value_form.table_size},
        **{"MASK": mask_kind, "STARTS": starts is not None},
    }
    out_type = staged if plan.final else mx.float32
    if plan.kernel is ROWS:
        template |= {"ROWS": plan.rows, "TILES": plan.tiles}
    else:
        step = 32 if max(key.dim, value.dim) * staged.size <= 512 else 16  # so that it fits into threadgroup memory
        template |= {"S": staged, "O": out_type, "STEP": step, "FINAL": plan.final}
        template |= {"SINKS": plan.final and sinks is not None}
    lead = (B, n_heads, length, sum(plan.splits))
    sink_logits = shape if sinks is None else sinks
    launch = Launch(
        template,
        grid=(sum(plan.splits) * plan.threads, plan.blocks, B * key_heads),
        threadgroup=(plan.threads, 1, 1),
        outputs=[((*lead, value.dim), out_type), (lead, mx.float32), (lead, mx.float32)],
    )
    partial = plan.kernel(
        [
            *(q, rotated, *_present(tokens.keys), *_present(tokens.values), key_form.levels, value_form.levels),
            *(*_present(tokens.sink), *_present(tokens.recent)),
            *(mask, shape if starts is None else starts, sink_logits, shape, _floats(scale, softcap)),
        ],
        launch,
    )
    if plan.final:
        return (partial[0].squeeze(3) @ _as(value.rotation, staged)).astype(dtype)
    columns = -(-value.dim // 32) * 32
    parts = COMBINE_THREADS // columns
    launch = Launch(
        {"T": dtype, "VALUE_DIM": value.dim, "PARTS": parts, "SINKS": sinks is not None},
        grid=(B * n_heads * length * columns * parts, 1, 1),
        threadgroup=(columns * parts, 1, 1),
        outputs=[((B, n_heads, length, value.dim), dtype)],
    )
    return COMBINE([*partial, value.rotation, sink_logits, shape], launch)[0]


def kernel_of(n_rows: int, dim: int) -> str:
    """The kernel for so many rows of a key head, and vectors of so many numbers."""
    return ROWS.name if n_rows <= TILES[-1] * ROWS_AT_MOST or dim > TILE_NUMBERS else TILE.name


@dataclass(frozen=True)
class _Plan:
    """How attention is cut into threadgroups.

    Attributes:
        kernel: ROWS or TILE.
        rows, tiles: Of ROWS: rows of a SIMD-group, and SIMD-groups that read the same tokens.
        blocks: Threadgroups that share the rows of a key head.
        splits: Of the sink, packed and recent tokens; `split_tokens` each.
        final: No threadgroup meets another one's result.
    """

    kernel: Kernel
    threads: int
    blocks: int
    split_tokens: int
    splits: tuple[int, ...]
    rows: int = 0
    tiles: int = 0
    final: bool = False


def _plan(tokens: Tokens, key_heads: int, n_rows: int, dim: int) -> _Plan:
    """key_heads: of all sequences; n_rows: of each."""
    segments = (tokens.n_sink, tokens.n_packed, tokens.n_recent)
    if kernel_of(n_rows, dim) == ROWS.name:
        tiles = next((t for t in TILES if n_rows <= t * ROWS_AT_MOST), TILES[-1])
        rows = min(-(-n_rows // tiles), ROWS_AT_MOST)
        blocks = -(-n_rows // (rows * tiles))
        # As many tokens to a split as leave enough threadgroups.
        size = SIMD_GROUPS // tiles * 32
        most = SIMD_GROUPS // tiles * SLICE_TOKENS
        while size < most and key_heads * blocks * (tokens.count // (2 * size)) >= ENOUGH:
            size *= 2
        splits = tuple(-(-n // size) for n in segments)
        return _Plan(ROWS, 32 * SIMD_GROUPS, blocks, size, splits, rows, tiles)
    blocks = -(-n_rows // TILE_ROWS)
    if key_heads * blocks >= ENOUGH:
        return _Plan(TILE, TILE_THREADS, blocks, tokens.count, (0, 1, 0), final=True)
    size = max(tokens.count * key_heads * blocks // ENOUGH // 32 * 32, TILE_SPLIT)
    return _Plan(TILE, TILE_THREADS, blocks, size, tuple(-(-n // size) for n in segments))


def _rotated(x: mx.array, codes: Codes, dtype: mx.Dtype) -> mx.array:
    return x.astype(dtype) @ _as(codes.rotation, dtype).T


def _rotated_tokens(tokens: Tokens, key: Codes, value: Codes, dtype: mx.Dtype) -> Tokens:
    """With plain tokens in the basis of the codes, where a result need not be kept apart from that of packed ones."""
    plain = []
    for arrays, count in ((tokens.sink, tokens.n_sink), (tokens.recent, tokens.n_recent)):
        keys, values = (_rotated(array[:, :, :count], codes, dtype)
                        for array, codes in zip(arrays, (key, value), strict=True))  # fmt: skip
        plain.append((keys, values))
    return replace(tokens, sink=plain[0], recent=plain[1])


@lru_cache(maxsize=256)
def _as(rotation: mx.array, dtype: mx.Dtype) -> mx.array:
    return rotation.astype(dtype)


def _decoding(codes: Codes, dtype: mx.Dtype) -> Decoding:
    """How codes become values. 8-bit ones are integers: see attend.metal."""
    if codes.bits == 8:
        return Decoding(0, _floats(1, *(0,) * MOST_TERMS, 2**23), 0.0)
    return decoding(codes.codebook, codes.bits, dtype, HALF_ERROR)


def _mask(mask: mx.array | str | None, seen: tuple[int, int, int, int], unused: mx.array) -> tuple[int, mx.array]:
    """Its kind, as in attend.metal, and its array, each axis of which is that of `seen` or 1."""
    if not isinstance(mask, mx.array):
        return 0, unused
    mask = mask.reshape(*(1,) * (4 - mask.ndim), *mask.shape)
    if any(have not in (1, need) for have, need in zip(mask.shape, seen, strict=True)):
        raise ValueError(f"a mask {mask.shape} does not broadcast to queries and tokens {seen}")
    return (1 if mask.dtype == mx.bool_ else 2), mask


def _present(arrays: Sequence[mx.array]) -> list[mx.array]:
    """Arrays that are not empty, and in place of those that are, one that nobody reads."""
    return [array if array.size else _zeros(array.dtype) for array in arrays]


@lru_cache
def _zeros(dtype: mx.Dtype) -> mx.array:
    return mx.zeros((1, 1, 1, 8), dtype)


@lru_cache(maxsize=256)
def _integers(*values: int) -> mx.array:
    return mx.array(values, dtype=mx.int32)


@lru_cache(maxsize=256)
def _floats(*values: float) -> mx.array:
    return mx.array(values, dtype=mx.float32)
