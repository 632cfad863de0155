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


class Part:
    """Numbers of a key or value that are coded together."""

    def __init__(self, dim: int, bits: int, group: int = 0, affine: bool = False, rotate: bool = True):
        self.dim, self.bits, self.affine = dim, bits, affine
        self.group = group if group and dim % group == 0 else 0
        self.n_groups = dim // self.group if self.group else 1
        self.planes = self.n_groups * (2 if affine else 1)
        self.rotation = Rotation(dim) if rotate else None
        self.table, self.table_scale = np.full(256, 77, np.uint8), 1.0
        if affine:
            self.levels = np.arange(1 << bits, dtype=np.float32) - (1 << bits >> 1)
            self.table[: 1 << bits] = self.levels + 128
        elif bits == 8:
            self.levels = np.arange(256, dtype=np.float32) - 128
        else:
            self.levels = np.array(stored_codebook("lloyd-max", bits), np.float32)
            table = codebook_table(tuple(self.levels.tolist()))
            self.table_scale = float(np.float32(table.scale))
            self.table[: len(self.levels)] = table.high[: len(self.levels)]

    @property
    def structure(self) -> library.KVPart:
        rotation = library.Rotation() if self.rotation is None else self.rotation.rotation
        return library.KVPart(
            self.dim, self.bits, self.group, self.affine, self.table.ctypes.data, self.levels.ctypes.data,
            self.table_scale, rotation,
        )  # fmt: skip

    def values_of(self, codes: np.ndarray, planes: np.ndarray, *, exact: bool = True) -> np.ndarray:
        """Codes (..., tokens, dim) and planes (..., tokens, planes) as float64 vectors in the original basis."""
        levels = self.levels.astype(np.float64)
        if not exact and self.bits < 8:
            levels = self.table_scale * (self.table[: len(levels)].astype(np.float64) - 128)
        each = self.dim // self.n_groups
        scales, minima = (np.repeat(planes[..., i : i + self.n_groups], each, -1) for i in (0, self.n_groups))
        x = levels[codes] * scales
        if self.affine:
            x = x + minima + scales * (1 << self.bits >> 1)
        return x if self.rotation is None else x @ self.rotation.dense

    def pack(self, codes: np.ndarray, values: bool) -> np.ndarray:
        """uint8 codes (blocks, 64, dim) -> bytes (blocks, bytes of a block)."""
        if values:
            codes = codes.transpose(0, 2, 1)
        elif self.bits == 8:  # steps of 4 columns, without the last ones that hold nothing
            whole = np.zeros((len(codes), BLOCK_TOKENS, -(-self.dim // 4) * 4), np.uint8)
            whole[..., : self.dim] = codes
            tiles = whole.reshape(len(codes), 4, 16, -1, 4).transpose(0, 1, 3, 2, 4)
            return np.ascontiguousarray(tiles).reshape(len(codes), -1)
        return np.stack([pack_codes(block, self.bits) for block in codes]).reshape(len(codes), -1)


class Code:
    """How keys and values of a cache are packed; `structure` is for C, and valid as long as this object.

    `group` and `affine` as in Part; `outliers`: a quarter of the numbers, others for each head, has two bits more.
    """

    def __init__(
        self, key_bits: int, value_bits: int, head_dim: int, value_dim: int, rotate: bool = True,
        group: int = 0, affine: bool = False, outliers: bool = False,
    ):  # fmt: skip
        self.bits, self.dims, self.outliers = (key_bits, value_bits), (head_dim, value_dim), outliers
        self.parts = []
        for bits, dim in zip(self.bits, self.dims, strict=True):
            few = dim // 4 if outliers else 0
            shares = [(few, bits + 2), (dim - few, bits)] if outliers else [(dim, bits)]
            self.parts.append([Part(n, b, group, affine, rotate and not affine) for n, b in shares])
        self.planes = [sum(part.planes for part in parts) for parts in self.parts]

    @property
    def structure(self) -> library.KVCode:
        sides = []
        for parts in self.parts:
            made = (library.KVPart * 2)(*[part.structure for part in parts])
            sides.append(library.KVSide(made, len(parts), self.outliers))
        return library.KVCode(*sides)

    def block_bytes(self, values: int) -> int:
        size = library.library().tq_kv_block_bytes
        return sum(size(part.dim, part.bits, values) for part in self.parts[values])

    def arrays(self, side: int, batch: int, heads: int, blocks: int) -> list[np.ndarray]:
        """Memory for the packed tokens of one side, full of garbage."""
        made = [
            np.full((batch, heads, blocks, self.block_bytes(side)), 0x5A, np.uint8),
            np.full((batch, heads, blocks * BLOCK_TOKENS * self.planes[side]), np.nan, np.float16),
        ]
        return [*made, np.full((batch, heads, self.dims[side]), -1, np.int32)] if self.outliers else made


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
            self.packed += code.arrays(side, batch, heads, blocks)

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
        """Keys and values of all tokens as float64."""
        return [side.astype(np.float64) for side in unpack(self.code, self.segments, self.heads)]


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


def unpack(code: Code, segments: list[Segment], heads: int) -> list[np.ndarray]:
    """tq_kv_unpack: keys and values of all tokens of the segments, float32."""
    params = parameters(segments, heads, *code.dims, code)
    batch, tokens = segments[0].arrays[0].shape[0], sum(s.structure.count for s in segments)
    result = [np.full((batch, heads, tokens, dim), np.nan, np.float32) for dim in code.dims]
    call(library.library().tq_kv_unpack, params, [a for s in segments for a in s.arrays], result)
    return result


def random_packed(
    code: Code, batch: int, heads: int, tokens: int, random: np.random.Generator, spare: int = 0, hidden: int = 0
):
    """A segment of random codes, `spare` blocks of garbage after them, and its keys and values (exact or by table).

    The segment leaves out the first `hidden` tokens of its first block.
    """
    kept = tokens + hidden
    blocks = -(-kept // BLOCK_TOKENS) + spare
    arrays, sides = [], []
    for side, parts in enumerate(code.parts):
        found = []
        packed, planes = code.arrays(side, batch, heads, blocks)[:2]
        by_block = planes.reshape(batch, heads, blocks, code.planes[side], BLOCK_TOKENS)
        at = plane = 0
        for part in parts:
            shape = (batch, heads, blocks * BLOCK_TOKENS, part.dim)
            if part.affine:
                codes = random.integers(0, 1 << part.bits, shape).astype(np.uint8)
            elif part.bits == 8:  # nearly normal, as the codes of real vectors are
                codes = np.clip(np.rint(random.normal(128, 40, shape)), 1, 255).astype(np.uint8)
            else:  # as often as their cells are hit
                codes = np.searchsorted((part.levels[1:] + part.levels[:-1]) / 2, random.standard_normal(shape))
                codes = codes.astype(np.uint8)
            size = (batch, heads, blocks * BLOCK_TOKENS, part.n_groups)
            unit = 3.4 / (1 << part.bits) if part.affine else 1 / 40 if part.bits == 8 else 1
            scales = (random.uniform(0.5, 1.5, size) * unit).astype(np.float16)
            if part.affine:
                least = -scales * random.uniform(0.3, 0.7, size) * (1 << part.bits)
                scales = np.concatenate([scales, least.astype(np.float16)], axis=3)
            scales[:, :, kept:] = np.nan
            one = part.pack(codes.reshape(-1, BLOCK_TOKENS, part.dim), bool(side)).reshape(batch, heads, blocks, -1)
            packed[..., at : at + one.shape[3]] = one
            in_blocks = scales.reshape(batch, heads, blocks, BLOCK_TOKENS, part.planes).swapaxes(3, 4)
            by_block[..., plane : plane + part.planes, :] = in_blocks
            at, plane = at + one.shape[3], plane + part.planes
            found.append((part, codes[:, :, hidden:kept], scales[:, :, hidden:kept].astype(np.float64)))
        order = np.argsort(random.random((batch, heads, code.dims[side])), axis=2).astype(np.int32)
        arrays += [packed, planes, order] if code.outliers else [packed, planes]
        sides.append((found, order))

    def dense(exact: bool) -> list[np.ndarray]:
        made = []
        for found, order in sides:
            x = np.concatenate([p.values_of(codes, scales, exact=exact) for p, codes, scales in found], axis=3)
            if code.outliers:
                x = np.take_along_axis(x, np.argsort(order, axis=2)[:, :, None], axis=3)
            made.append(x)
        return made

    return Segment(PACKED, arrays, tokens, first=hidden), dense


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
