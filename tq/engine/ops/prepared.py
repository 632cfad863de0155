"""Packed matrices and rotations as the CPU kernels read them: memory order, tables, and C structures that point there.

The order of codes is that of tq/cpu/kernels/layout.h. Scales go to float16 [experts][tiles][groups][16 rows].
"""

import ctypes
import math
from dataclasses import dataclass
from functools import cached_property, lru_cache
from math import prod
from statistics import NormalDist

import mlx.core as mx
import numpy as np

from tq import settings
from tq.cpu import lazy, library
from tq.cpu.lazy import ALIGNMENT, Memory, Pinned
from tq.engine.quantize import PackedTensor
from tq.engine.quantize.rotation import HADAMARD_FACTORS, hadamard_block, transposed_hadamard

TILE_ROWS = 16
CENTRE = 128  # the byte that stands for 0 in the table of a codebook
TERNARY_BITS = 2  # of a trit in memory
LOW_TABLE_BITS = 7  # from this width on, bytes alone would add errors as large as those of the code
LARGEST_SCALE = 2.0**10  # of a matrix, in memory: leaves float16 24 binary orders below it


@dataclass(frozen=True)
class Table:
    """The levels of a code as bytes: level = scale * (high - offset + (low - 128) / 256)."""

    high: np.ndarray
    low: np.ndarray | None
    values: np.ndarray
    scale: float
    offset: int


@dataclass(eq=False)
class Prepared:
    """A matrix, or one per expert or head, in the memory order of the CPU kernels.

    Attributes:
        matrix: What kernels are given: its addresses lie in ``pinned``.
        pinned: The memory, which calls that have not run yet keep alive.
        exact: Whether kernels compute with float32 activations (TQ_CPU_EXACT when it was prepared).
        has_bias: Whether products contain the bias of the layer.
        shape: The dense shape (..., out, in).
        size_bytes: What it takes.
    """

    matrix: library.Matrix
    pinned: Pinned
    exact: bool
    has_bias: bool
    shape: tuple[int, ...]
    size_bytes: int

    @cached_property
    def matmul(self) -> library.MatmulParams:
        return library.MatmulParams(self.matrix, self.exact)

    @cached_property
    def gather(self) -> library.GatherParams:
        return library.GatherParams(self.matrix, self.exact)

    @cached_property
    def embed(self) -> library.EmbedParams:
        """Of the rows of all experts as one matrix, where those of each one are padded to whole tiles."""
        matrix = library.Matrix.from_buffer_copy(self.matrix)
        if matrix.experts > 1:
            matrix.rows, matrix.experts = matrix.experts * padded_rows(matrix.rows), 1
        return library.EmbedParams(matrix, library.Rotation())

    def rows(self, ids: mx.array) -> mx.array:
        """Rows in the basis in which they are stored, float32 (..., in). ids: (...)."""
        shape = (*ids.shape, self.shape[-1])
        if ids.size == 0:
            return mx.zeros(shape)
        (rows,) = lazy.call("tq_embed", self.embed, [ids.astype(mx.int32)], [(shape, mx.float32)], keep=self.pinned)
        return rows

    def decode(self) -> mx.array:
        """The dense matrix in the basis in which it is stored, float32 (..., out, in)."""
        *lead, n, _ = self.shape
        first = mx.arange(prod(lead), dtype=mx.int32)[:, None] * padded_rows(n)
        ids = first + mx.arange(n, dtype=mx.int32)
        return self.rows(ids).reshape(self.shape)


@dataclass(eq=False)
class PreparedRotation:
    """A rotation as kernels read it: y = H (signs * x)."""

    rotation: library.Rotation
    pinned: Pinned

    @cached_property
    def forward(self) -> library.RotateParams:
        return library.RotateParams(self.rotation, 0)

    @cached_property
    def inverse(self) -> library.RotateParams:
        return library.RotateParams(self.rotation, 1)


def prepare(packed: PackedTensor, bias: mx.array | None = None) -> Prepared:
    """Put a matrix into memory order. ``packed`` is only read: whoever holds it should drop it afterwards.

    Args:
        packed: (..., out, in), leading axes are experts or heads.
        bias: (..., out) or None.

    Raises:
        Declined: The kernels are not there.
    """
    spec, arrays = packed.spec, packed.arrays
    *lead, rows, columns = packed.shape
    bits = spec.bits or TERNARY_BITS
    table = affine_table(spec.bits) if spec.codec == "affine" else codebook_table(levels_of(arrays["codebook"]))
    scales, exponent = _normalized(_numpy(arrays["scales"]))
    wanted = {
        "scales": _by_tile(scales, rows),
        "biases": _by_tile(_numpy(arrays["biases"]), rows) if spec.codec == "affine" else None,
        "table": table.high,
        "table_low": table.low,
        "values": table.values * np.float32(2.0**exponent),
        "bias": None if bias is None else _numpy(bias),
    }
    parts = {name: part for name, part in wanted.items() if part is not None}
    del scales
    size = library.library().tq_codes_bytes(rows, columns, bits)
    memory, addresses = _lay_out({"codes": prod(lead) * size} | {name: part.nbytes for name, part in parts.items()})
    _pack(arrays["weight"], addresses["codes"], size, packed.shape, bits, trits=not spec.bits)
    for name, part in parts.items():
        ctypes.memmove(addresses[name], np.ascontiguousarray(part).ctypes.data, part.nbytes)
    matrix = library.Matrix(
        **addresses,
        table_scale=table.scale * 2.0**exponent,
        offset=table.offset,
        rows=rows,
        columns=columns,
        experts=prod(lead),
        bits=bits,
        group=spec.group_size,
    )
    return Prepared(matrix, Pinned(memory), settings.cpu_exact(), bias is not None, packed.shape, memory.size_bytes)


def prepare_rotation(signs: mx.array) -> PreparedRotation:
    """The rotation with these signs, (n,)."""
    n = signs.size
    block = hadamard_block(n)
    m = next((f for f in HADAMARD_FACTORS[1:] if block % f == 0 and (block // f) & (block // f - 1) == 0), 1)
    arrays = [signs.astype(mx.float32)]
    if m > 1:
        arrays.append(mx.array(np.ascontiguousarray(transposed_hadamard(m).T)))
    pinned = Pinned(*arrays)
    addresses = dict(zip(("signs", "factor"), pinned.addresses, strict=False))
    return PreparedRotation(library.Rotation(**addresses, n=n, block=block, m=m), pinned)


def padded_rows(rows: int) -> int:
    return -(-rows // TILE_ROWS) * TILE_ROWS


def _lay_out(sizes: dict[str, int]) -> tuple[Memory, dict[str, int]]:
    """One piece of memory for parts of these sizes, and the address of each, a multiple of 64."""
    starts = {}
    end = 0
    for part, size in sizes.items():
        starts[part] = end
        end += -(-size // ALIGNMENT) * ALIGNMENT
    memory = Memory(end)
    return memory, {part: memory.address + start for part, start in starts.items()}


def _pack(words: mx.array, address: int, size: int, shape: tuple[int, ...], bits: int, trits: bool) -> None:
    """Put the codes of all experts in memory order, ``size`` bytes each, from ``address`` on."""
    *_, rows, columns = shape
    stored = np.ascontiguousarray(np.asarray(words)).reshape(-1, rows, words.shape[-1])
    for i, one in enumerate(stored):
        library.library().tq_pack(one.ctypes.data, one.shape[1], rows, columns, bits, trits, address + i * size)


def _by_tile(per_row: np.ndarray, rows: int) -> np.ndarray:
    """float16 (..., rows, groups) to (experts, tiles, groups, 16), zeros in rows that pad the last tile."""
    groups = per_row.shape[-1]
    per_row = per_row.reshape(-1, rows, groups)
    padded = np.zeros((len(per_row), padded_rows(rows), groups), np.float16)
    padded[:, :rows] = per_row
    return np.ascontiguousarray(padded.reshape(len(per_row), -1, TILE_ROWS, groups).swapaxes(2, 3))


def _normalized(values: np.ndarray) -> tuple[np.ndarray, int]:
    """Scales / 2^exponent as float16, with an exponent that no scale is too large or too small for it.

    bfloat16 scales of mlx-lm's checkpoints may be below the range of float16.
    """
    finite = np.abs(values[np.isfinite(values)])
    largest = float(finite.max()) if finite.size else 0.0
    exponent = math.frexp(largest / LARGEST_SCALE)[1] if largest > 0 else 0
    return np.ldexp(values, -exponent), exponent


def _numpy(array: mx.array) -> np.ndarray:
    return np.array(array.astype(mx.float32))


def levels_of(codebook: mx.array) -> tuple[float, ...]:
    return tuple(map(float, _numpy(codebook)))


@lru_cache
def affine_table(bits: int) -> Table:
    """The codes themselves."""
    codes = np.arange(2**bits)
    return Table(_filled(codes, 0), None, codes.astype(np.float32), 1.0, 0)


@lru_cache
def codebook_table(levels: tuple[float, ...]) -> Table:
    """The levels of a codebook for N(0,1) as bytes, with the scale that adds the least error to what it codes."""
    values = np.array(levels)
    largest = float(np.abs(values).max()) or 1.0
    if len(levels) >= 2**LOW_TABLE_BITS:
        scale = largest * 256 / (127 * 256 + 127)
        fine = np.rint(values / scale * 256).astype(int)
        high = (fine + 128) >> 8
        low = _filled(fine - 256 * high + CENTRE, CENTRE)
    else:
        scale = _best_scale(values, largest)
        high, low = np.rint(values / scale).astype(int), None
    return Table(_filled(high + CENTRE, CENTRE), low, values.astype(np.float32), scale, CENTRE)


def _best_scale(values: np.ndarray, largest: float) -> float:
    """The scale that minimises E[(level - scale * rint(level / scale))^2] over x ~ N(0,1), of up to twice the least."""
    ranked = np.sort(values)
    normal = NormalDist()
    edges = np.array([0.0, *(normal.cdf(edge) for edge in (ranked[1:] + ranked[:-1]) / 2), 1.0])
    scales = np.linspace(largest / 127, largest / 64, 16384)[:, None]
    errors = ((ranked - scales * np.rint(ranked / scales)) ** 2) @ np.diff(edges)
    return float(scales[errors.argmin(), 0])


def _filled(codes: np.ndarray, rest: int) -> np.ndarray:
    table = np.full(256, rest, np.uint8)
    table[: len(codes)] = codes
    return table
