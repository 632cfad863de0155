"""Packed tokens from the memory order of the CPU kernels to the reference's, and back: for saved caches.

In NumPy, so that what a machine with kernels has saved is read where there are none. The order is that of
tq/cpu/kernels/layout.h and kv_layout.h. Codes and scales stay what they are where both rotate alike; vectors of other
dimensions (120, 576), which the kernels rotate in blocks, are coded again.
"""

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from tq.engine.cache import bitstream
from tq.engine.cache.affine import Affine
from tq.engine.cache.codecs import VectorCodec
from tq.engine.cache.lloyd_max import LloydMax
from tq.engine.cache.native_code import Part, parts_of
from tq.engine.cache.outliers import Outliers
from tq.engine.cache.settings import BLOCK, KVSettings
from tq.engine.cache.storage import Form, Reference
from tq.engine.quantize.rotation import hadamard_block, random_signs, rotate
from tq.errors import TQError

ROWS, COLUMNS = 16, 64  # of a block of codes
STEPS, LANES = 16, 64
PLANES = {1: (1,), 2: (2,), 3: (3,), 4: (4,), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1), 8: (8,)}  # bits, low ones first


def to_reference(
    settings: KVSettings, form: Form, arrays: Sequence[mx.array], packed: int
) -> tuple[list[mx.array], tuple[mx.array | None, mx.array | None]]:
    """A cache's arrays and `fitted` as `storage.Reference` has them, from those of `native.Native`."""
    reference = Reference(settings, form)
    made: list[mx.array] = []
    fitted: list[mx.array | None] = []
    rest = list(arrays[2:-2])
    for side, codec in enumerate(reference.codecs):
        parts = _parts(settings, side, codec.dim)
        codes, planes, *order = rest[: 2 + (len(parts) > 1)]
        rest = rest[2 + len(order) :]
        at = plane = 0
        blocks = np.array(codes)[:, :, : packed // BLOCK]
        scales = np.array(planes).reshape(*planes.shape[:2], -1, planes_of(parts), BLOCK)
        scales = scales[:, :, : packed // BLOCK].swapaxes(3, 4).reshape(*planes.shape[:2], packed, planes_of(parts))
        for part, own in zip(parts, _coders(codec), strict=True):
            size = block_bytes(part, bool(side))
            found = unpack(blocks[..., at : at + size], part, bool(side))
            made += _to_codec(found, scales[..., plane : plane + part.planes], part, own)
            at, plane = at + size, plane + part.planes
        fitted.append(order[0][:, :, None] if order and packed else None)
    rows = [a.astype(reference.dtype) for a in (*arrays[:2], *arrays[-2:])]
    return [*rows[:2], *made, *rows[2:]], (fitted[0], fitted[1])


def to_native(
    settings: KVSettings,
    form: Form,
    arrays: Sequence[mx.array],
    fitted: tuple[mx.array | None, mx.array | None],
    packed: int,
) -> list[mx.array]:
    """The inverse."""
    reference = Reference(settings, form)
    made: list[mx.array] = []
    rest = list(arrays[2:-2])
    lead = (form.batch, form.heads)
    for side, codec in enumerate(reference.codecs):
        parts = _parts(settings, side, codec.dim)
        codes, planes = [], []
        for part, own in zip(parts, _coders(codec), strict=True):
            held = [a[:, :, :packed] for a in rest[: len(own.layout)]]
            rest = rest[len(own.layout) :]
            found, scales = _from_codec(held, part, own)
            codes.append(pack(found, part, bool(side)))
            planes.append(scales.reshape(*lead, packed // BLOCK, BLOCK, part.planes).swapaxes(3, 4))
        made.append(mx.array(np.concatenate(codes, axis=3)))
        made.append(mx.array(np.concatenate(planes, axis=3).reshape(*lead, -1)))
        if len(parts) > 1:
            order = fitted[side]
            made.append(mx.zeros((*lead, codec.dim), mx.int32) if order is None else order[:, :, 0])
    rows = [a.astype(mx.float16) for a in (*arrays[:2], *arrays[-2:])]
    return [*rows[:2], *made, *rows[2:]]


def check(settings: KVSettings, form: Form, arrays: Sequence[mx.array], tokens: tuple[int, int, int]) -> None:
    """Whether a saved cache's arrays are what kernels keep, and hold its tokens: kernels read them unseen.

    Args:
        tokens: All, packed and dropped ones.

    Raises:
        TQError: They are not, or do not.
    """
    lead = (form.batch, form.heads)
    found = [(a.dtype, tuple(a.shape)) for a in arrays]
    blocks, rows = (arrays[i].shape[2] if len(arrays) > 5 and arrays[i].ndim == 4 else 0 for i in (2, -1))
    wanted: list[tuple[mx.Dtype, tuple[int, ...]]] = []
    orders = []
    for side, dim in enumerate((form.key_dim, form.value_dim)):
        parts = _parts(settings, side, dim)
        size = sum(block_bytes(part, bool(side)) for part in parts)
        wanted += [(mx.uint8, (*lead, blocks, size)), (mx.float16, (*lead, blocks * BLOCK * planes_of(parts)))]
        if len(parts) > 1:
            orders.append((2 + len(wanted), dim))
            wanted.append((mx.int32, (*lead, dim)))
    sink, recent = (
        [(mx.float16, (*lead, n, dim)) for dim in (form.key_dim, form.value_dim)] for n in (settings.sink, rows)
    )
    offset, packed, dropped = tokens
    stored = offset - dropped
    late = stored - min(stored, settings.sink) - packed
    fits = min(stored, packed, dropped) >= 0 and packed <= blocks * BLOCK and 0 <= late <= rows
    if found != [*sink, *wanted, *recent] or not fits or any(_leaves(arrays[i], dim) for i, dim in orders):
        raise TQError("this KV cache was saved by another version of tq, or is damaged", "compute the prompt again")


def _leaves(order: mx.array, dim: int) -> bool:
    """Whether an order names numbers that a vector does not have."""
    return not 0 <= order.min().item() <= order.max().item() < dim  # type: ignore[operator]


def planes_of(parts: Sequence[Part]) -> int:
    """Float16 numbers of a token beside its codes."""
    return sum(part.planes for part in parts)


def block_bytes(part: Part, values: bool) -> int:
    """Of the codes of 64 tokens."""
    steps, units, _ = _units(part, values)
    return units * steps * LANES * part.bits // 8


def unpack(blocks: np.ndarray, part: Part, values: bool) -> np.ndarray:
    """Codes uint8 (B, heads, tokens, dim) of bytes (B, heads, blocks, block_bytes)."""
    *lead, n, _ = blocks.shape
    steps, units, columns = _units(part, values)
    codes = _by_rows(_steps(blocks.reshape(*lead, n, units, steps * LANES * part.bits // 8), part.bits, steps))
    if values:  # rows are numbers, columns tokens
        codes = codes.reshape(*lead, n, units * ROWS, BLOCK).swapaxes(3, 4)
    else:  # units of a tile of tokens follow each other
        codes = codes.reshape(*lead, n, BLOCK // ROWS, columns // (4 * steps), ROWS, 4 * steps).swapaxes(4, 5)
    return np.ascontiguousarray(codes.reshape(*lead, n * BLOCK, columns)[..., : part.dim])


def pack(codes: np.ndarray, part: Part, values: bool) -> np.ndarray:
    """The inverse."""
    *lead, tokens, dim = codes.shape
    n = tokens // BLOCK
    steps, units, columns = _units(part, values)
    whole = np.zeros((*lead, tokens, columns), np.uint8)
    whole[..., :dim] = codes
    if values:
        rows = whole.reshape(*lead, n, BLOCK, columns).swapaxes(3, 4).reshape(*lead, n, units, ROWS, BLOCK)
    else:
        rows = whole.reshape(*lead, n, BLOCK // ROWS, ROWS, columns // (4 * steps), 4 * steps).swapaxes(4, 5)
        rows = rows.reshape(*lead, n, units, ROWS, 4 * steps)
    by_step = rows.reshape(*lead, n, units, ROWS, steps, 4).swapaxes(-3, -2).reshape(*lead, n, units, steps, LANES)
    return _bytes(by_step, part.bits).reshape(*lead, n, block_bytes(part, values))


def _units(part: Part, values: bool) -> tuple[int, int, int]:
    """Steps of a block of codes, such blocks in one of 64 tokens, and the width to which vectors are padded."""
    if values:
        tiles = -(-part.dim // ROWS)
        return STEPS, tiles, tiles * ROWS
    if part.bits == 8:
        steps = -(-part.dim // 4)
        return steps, BLOCK // ROWS, 4 * steps
    width = -(-part.dim // COLUMNS) * COLUMNS
    return STEPS, BLOCK // ROWS * (width // COLUMNS), width


def _by_rows(steps: np.ndarray) -> np.ndarray:
    """(..., steps, 64) to (..., 16, 4 steps)."""
    *lead, n, _ = steps.shape
    return steps.reshape(*lead, n, ROWS, 4).swapaxes(-3, -2).reshape(*lead, ROWS, 4 * n)


def _steps(units: np.ndarray, bits: int, steps: int) -> np.ndarray:
    """Codes (..., steps, 64) of the bytes of a block (layout.h)."""
    *lead, _ = units.shape
    codes = np.zeros((*lead, steps, LANES), np.uint8)
    if codes.size == 0:
        return codes
    at = done = 0
    for plane in PLANES[bits]:
        size = steps * LANES * plane // 8
        vectors = units[..., at : at + size].reshape(*lead, -1, LANES)
        if plane == 3:
            halves = vectors.reshape(*lead, 2, 3, LANES)
            own = [halves[..., u // 2, :] >> 3 * (u % 2) for u in range(6)]
            top = sum((halves[..., v, :] >> 6) << 2 * v for v in range(3))
            found = np.stack([*own, top, top >> 3], axis=-2).reshape(codes.shape)
        else:
            each = 8 // plane
            found = np.stack([vectors >> plane * i for i in range(each)], axis=-2).reshape(codes.shape)
        codes |= (found & ((1 << plane) - 1)) << done
        at, done = at + size, done + plane
    return codes


def _bytes(codes: np.ndarray, bits: int) -> np.ndarray:
    """The inverse."""
    *lead, steps, _ = codes.shape
    if codes.size == 0:
        return codes
    parts, done = [], 0
    for plane in PLANES[bits]:
        own = (codes >> done) & ((1 << plane) - 1)
        if plane == 3:
            halves = own.reshape(*lead, 2, 8, LANES)
            top = halves[..., 6, :] | halves[..., 7, :] << 3
            pairs = [halves[..., 2 * v, :] | halves[..., 2 * v + 1, :] << 3 for v in range(3)]
            joined = np.stack([pair | (top >> 2 * v & 3) << 6 for v, pair in enumerate(pairs)], axis=-2)
        else:
            each = 8 // plane
            groups = own.reshape(*lead, steps // each, each, LANES)
            joined = np.bitwise_or.reduce(groups << (np.arange(each, dtype=np.uint8) * plane)[:, None], axis=-2)
        parts.append(joined.reshape(*lead, -1).astype(np.uint8))
        done += plane
    return np.concatenate(parts, axis=-1)


# --- from and to what codecs have ------------------------------------------------------------------------------------


def _parts(settings: KVSettings, side: int, dim: int) -> tuple[Part, ...]:
    codec, bits = (settings.value_codec, settings.value_bits) if side else (settings.key_codec, settings.key_bits)
    return parts_of(codec, bits, dim, settings.group_size)


def _coders(codec: VectorCodec) -> tuple[Any, ...]:
    """What codes each part."""
    return codec.parts if isinstance(codec, Outliers) else (codec,)


def _to_codec(codes: np.ndarray, planes: np.ndarray, part: Part, codec: LloydMax | Affine) -> list[mx.array]:
    if codes.size == 0:  # of no shape that bit streams could be made of
        return [mx.zeros((*codes.shape[:3], width), dtype) for dtype, width in codec.layout]
    scales = [mx.array(planes[..., i : i + part.n_groups]) for i in range(0, part.planes, part.n_groups)]
    if part.affine or _alike(part.dim):
        return [bitstream.pack(mx.array(codes), part.bits), *scales]
    assert isinstance(codec, LloydMax)
    each = mx.repeat(scales[0].astype(mx.float32), part.dim // part.n_groups, -1)
    vectors = mx.array(codec.levels)[mx.array(codes)] * each
    return codec.encode(codec.rotate(vectors @ _basis(part.dim).T))


def _from_codec(arrays: list[mx.array], part: Part, codec: LloydMax | Affine) -> tuple[np.ndarray, np.ndarray]:
    lead = arrays[0].shape[:3]
    if lead[2] == 0:
        return np.zeros((*lead, part.dim), np.uint8), np.zeros((*lead, part.planes), np.float16)
    if not part.affine and not _alike(part.dim):
        vectors = codec.unrotate(codec.decode(arrays))
        arrays = codec.encode(vectors @ _basis(part.dim))
    codes = bitstream.unpack(arrays[0], part.bits, part.dim)
    return np.array(codes.astype(mx.uint8)), np.concatenate([np.array(a) for a in arrays[1:]], axis=-1)


def _alike(dim: int) -> bool:
    """Whether kernels and reference rotate vectors of this dimension in the same way."""
    return hadamard_block(dim) == dim


def _basis(dim: int) -> mx.array:
    """x @ this is x in the basis of the kernels."""
    return rotate(mx.eye(dim), mx.array(random_signs(dim)))
