"""Key-value caches as the kernels of attention read them, and what attention is in float64."""

import ctypes

import numpy as np
from hadamard import Rotation
from packed_matrix import pack_codes

from tq.cpu import library
from tq.engine.ops.prepared import codebook_table
from tq.engine.quantize.codebooks import stored_codebook

BLOCK_TOKENS = 64
F32, F16, PACKED = 0, 1, 2
DTYPES = {"float32": 0, "float16": 1, "uint32": 2, "int32": 3, "uint8": 4, "bool": 5}


class Code:
    """How keys and values of a cache are packed; `structure` is for C, and valid as long as this object."""

    def __init__(self, key_bits: int, value_bits: int, head_dim: int, value_dim: int, rotate: bool = True):
        self.bits, self.dims = (key_bits, value_bits), (head_dim, value_dim)
        self.rotations = [Rotation(dim) if rotate else None for dim in self.dims]
        self.levels = [None if bits == 8 else np.array(stored_codebook("lloyd-max", bits)) for bits in self.bits]
        self.tables, self.table_scales = [np.full(256, 77, np.uint8) for _ in self.bits], [1.0, 1.0]
        for side, levels in enumerate(self.levels):
            if levels is not None:
                table = codebook_table(tuple(levels.tolist()))
                self.table_scales[side] = float(np.float32(table.scale))
                self.tables[side][: len(levels)] = table.high[: len(levels)]

    @property
    def structure(self) -> library.KVCode:
        rotations = [library.Rotation() if r is None else r.rotation for r in self.rotations]
        levels = [None if values is None else values.ctypes.data for values in self.levels]
        return library.KVCode(
            *self.bits, self.tables[0].ctypes.data, self.tables[1].ctypes.data, *self.table_scales, *levels, *rotations
        )

    def block_bytes(self, values: int) -> int:
        return library.library().tq_kv_block_bytes(self.dims[values], self.bits[values], values)

    def values_of(self, side: int, codes: np.ndarray, scales: np.ndarray, *, exact: bool = True) -> np.ndarray:
        """Codes (..., tokens, dim) as float64 vectors in the original basis; as those of the table if not exact."""
        if self.bits[side] == 8:
            levels = np.arange(256) - 128.0
        elif exact:
            levels = self.levels[side].astype(np.float64)
        else:
            levels = self.table_scales[side] * (self.tables[side].astype(np.float64) - 128)
        x = levels[codes] * scales.astype(np.float64)[..., None]
        rotation = self.rotations[side]
        return x if rotation is None else x @ rotation.dense

    def pack(self, side: int, codes: np.ndarray) -> np.ndarray:
        """uint8 codes (B, heads, 64 n, dim) -> bytes (B, heads, n, bytes of a block)."""
        batch, heads, tokens, dim = codes.shape
        blocks = codes.reshape(-1, BLOCK_TOKENS, dim)
        if side == 1:
            blocks = blocks.transpose(0, 2, 1)
        elif self.bits[0] == 8:  # steps of 4 columns, without the last ones that hold nothing
            whole = np.zeros((len(blocks), BLOCK_TOKENS, -(-dim // 4) * 4), np.uint8)
            whole[..., :dim] = blocks
            tiles = whole.reshape(len(blocks), 4, 16, -1, 4).transpose(0, 1, 3, 2, 4)
            return np.ascontiguousarray(tiles).reshape(batch, heads, tokens // BLOCK_TOKENS, -1)
        packed = np.stack([pack_codes(block, self.bits[side]) for block in blocks])
        return packed.reshape(batch, heads, tokens // BLOCK_TOKENS, -1)


class Segment:
    """Consecutive tokens of a cache: arrays in the order in which operations take them, and their structure."""

    def __init__(self, form: int, arrays: list[np.ndarray], count: int, position: int = 0, first: int = 0):
        self.arrays = arrays
        self.structure = library.Segment(format=form, count=count, position=position, first=first)


class PackedCache:
    """A cache with a sink, packed blocks, and recent tokens; counters are functions of the number of tokens.

    The first `sink` tokens and the last `window` to `window` + 63 are floats of `dtype`.
    """

    def __init__(self, code: Code, batch: int, heads: int, sink: int, window: int, capacity: int, dtype=np.float16):
        self.code, self.batch, self.heads, self.sink, self.window = code, batch, heads, sink, window
        self.form = F16 if dtype == np.float16 else F32
        self.length = 0
        blocks = -(-capacity // BLOCK_TOKENS)

        def rows(n: int) -> list[np.ndarray]:
            return [np.full((batch, heads, n, dim), np.nan, dtype) for dim in code.dims]

        self.sinks, self.recent = rows(max(sink, 1)), rows(window + BLOCK_TOKENS)
        self.packed: list[np.ndarray] = []
        for side in (0, 1):
            self.packed.append(np.full((batch, heads, blocks, code.block_bytes(side)), 0x5A, np.uint8))
            self.packed.append(np.full((batch, heads, blocks * BLOCK_TOKENS), np.nan, np.float16))

    def packed_until(self, length: int) -> int:
        """The position of the first token that is not packed when there are `length`."""
        return self.sink + max(0, length - self.sink - self.window) // BLOCK_TOKENS * BLOCK_TOKENS

    @property
    def segments(self) -> list[Segment]:
        sink, packed = min(self.length, self.sink), self.packed_until(self.length)
        return [
            Segment(self.form, self.sinks, sink),
            Segment(PACKED, self.packed, packed - self.sink, position=self.sink),
            Segment(self.form, self.recent, max(0, self.length - packed), position=packed),
        ]

    def append(self, keys: np.ndarray, values: np.ndarray) -> None:
        position, n = self.length, keys.shape[2]
        self.length += n
        segments = self.segments
        params = parameters(segments, self.heads, *self.code.dims, self.code)
        params.position, params.pack_from = position, self.packed_until(position)
        call(library.library().tq_kv_append, params, [keys, values], [a for s in segments for a in s.arrays])

    def unpacked(self) -> list[np.ndarray]:
        """Keys and values of all tokens as float64, packed ones by tq_kv_unpack."""
        parts: list[list[np.ndarray]] = [[], []]
        for segment in self.segments:
            count = segment.structure.count
            arrays = segment.arrays
            if segment.structure.format == PACKED:
                arrays = unpack(self.code, segment, self.heads)
            for side in (0, 1):
                parts[side].append(arrays[side][:, :, :count].astype(np.float64))
        return [np.concatenate(side, axis=2) for side in parts]


def parameters(segments: list[Segment], n_kv_heads: int, head_dim: int, value_dim: int, code: Code | None):
    params = library.AttendParams(n_kv_heads=n_kv_heads, head_dim=head_dim, value_dim=value_dim)
    params.n_segments = len(segments)
    for i, segment in enumerate(segments):
        params.segments[i] = segment.structure
    if code is not None:
        params.code = code.structure
    return params


def call(operation, params: ctypes.Structure, inputs: list[np.ndarray], outputs: list[np.ndarray]) -> None:
    """Calls an operation of the library with NumPy arrays, which it reads and writes where they are."""

    def arrays(of: list[np.ndarray]) -> ctypes.Array:
        described = []
        for array in of:
            shape = (ctypes.c_int32 * array.ndim)(*array.shape)
            strides = (ctypes.c_int64 * array.ndim)(*(step // array.itemsize for step in array.strides))
            described.append(library.Array(array.ctypes.data, shape, strides, array.ndim, DTYPES[str(array.dtype)]))
        return (library.Array * len(of))(*described)

    operation(ctypes.byref(params), arrays(inputs), arrays(outputs))


def unpack(code: Code, segment: Segment, heads: int) -> list[np.ndarray]:
    """tq_kv_unpack: keys and values of the tokens of a packed segment, float32."""
    params = parameters([segment], heads, *code.dims, code)
    batch = segment.arrays[0].shape[0]
    result = [np.full((batch, heads, segment.structure.count, dim), np.nan, np.float32) for dim in code.dims]
    call(library.library().tq_kv_unpack, params, segment.arrays, result)
    return result


def random_packed(code: Code, batch: int, heads: int, tokens: int, random: np.random.Generator, spare: int = 0):
    """A segment of random codes, `spare` blocks of garbage after them, and its keys and values (exact or by table)."""
    capacity = (-(-tokens // BLOCK_TOKENS) + spare) * BLOCK_TOKENS
    arrays, codes, scales = [], [], []
    for side in (0, 1):
        n, low = 1 << code.bits[side], int(code.bits[side] == 8)
        one = random.integers(low, n, (batch, heads, capacity, code.dims[side]), dtype=np.uint8)
        if code.bits[side] == 8:  # nearly normal, as the codes of real vectors are
            one = np.clip(np.rint(random.normal(128, 40, one.shape)), 1, 255).astype(np.uint8)
        else:  # as often as their cells are hit
            borders = (code.levels[side][1:] + code.levels[side][:-1]) / 2
            one = np.searchsorted(borders, random.standard_normal(one.shape)).astype(np.uint8)
        scale = random.uniform(0.5, 1.5, (batch, heads, capacity)) / (40 if code.bits[side] == 8 else 1)
        scale = scale.astype(np.float16)
        scale[:, :, tokens:] = np.nan
        arrays += [code.pack(side, one), scale]
        codes.append(one[:, :, :tokens])
        scales.append(scale[:, :, :tokens])

    def dense(exact: bool) -> list[np.ndarray]:
        return [code.values_of(side, codes[side], scales[side], exact=exact) for side in (0, 1)]

    return Segment(PACKED, arrays, tokens), dense


def attend(
    q: np.ndarray,
    segments: list,
    n_kv_heads: int,
    value_dim: int,
    *,
    scale: float | None = None,
    softcap: float = 0,
    causal: bool = False,
    window: int = 0,
    position: int = 0,
    sinks: np.ndarray | None = None,
    mask: np.ndarray | None = None,
    code: Code | None = None,
    exact: bool = False,
) -> np.ndarray:
    """tq_attend. segments: those of a cache, or one pair of keys and values."""
    batch, n_heads, length, head_dim = q.shape
    described = [segment for segment in segments if isinstance(segment, Segment)]
    params = parameters(described, n_kv_heads, head_dim, value_dim, code)
    params.n_heads, params.causal, params.window, params.position = n_heads, causal, window, position
    params.scale = head_dim**-0.5 if scale is None else scale
    params.softcap, params.exact, params.mask = softcap, exact, mask is not None
    params.sinks = None if sinks is None else sinks.ctypes.data
    arrays = [a for segment in segments for a in (segment.arrays if isinstance(segment, Segment) else segment)]
    result = np.full((batch, n_heads, length, value_dim), np.nan, np.float32)
    call(library.library().tq_attend, params, [q, *arrays] + ([] if mask is None else [mask]), [result])
    return result


def expected(
    q: np.ndarray,
    keys: np.ndarray,
    values: np.ndarray,
    *,
    scale: float | None = None,
    softcap: float = 0,
    causal: bool = False,
    window: int = 0,
    position: int = 0,
    sinks: np.ndarray | None = None,
    mask: np.ndarray | None = None,
    positions: np.ndarray | None = None,
) -> np.ndarray:
    """Attention in float64. keys: (B, n_kv_heads, S, head_dim), their token i at positions[i] or i."""
    batch, n_heads, length, head_dim = q.shape
    group = n_heads // keys.shape[1]
    keys, values = (np.repeat(x.astype(np.float64), group, axis=1) for x in (keys, values))
    scores = q.astype(np.float64) @ keys.swapaxes(2, 3) * (head_dim**-0.5 if scale is None else scale)
    if softcap:
        scores = softcap * np.tanh(scores / softcap)
    positions = np.arange(keys.shape[2]) if positions is None else positions
    own = position + np.arange(length)[:, None]
    visible = np.ones((length, len(positions)), bool)
    if causal:
        visible &= positions <= own
    if window:
        visible &= positions > own - window
    lowest = np.finfo(np.float32).min
    if mask is not None and mask.dtype == bool:
        visible = visible & mask[..., positions]
    elif mask is not None:
        scores = scores + mask[..., positions]
    scores = np.where(visible, scores, lowest)
    with np.errstate(invalid="ignore"):
        if sinks is not None:
            sink = np.broadcast_to(sinks.astype(np.float64)[None, :, None, None], (*scores.shape[:3], 1))
            scores = np.concatenate([scores, sink], axis=3)
        weights = np.exp(scores - scores.max(axis=3, keepdims=True))
        weights /= weights.sum(axis=3, keepdims=True)
    return weights[..., : len(positions)] @ values
