"""Memory for one matrix of the experts that are there: slots that readers fill and kernels read in place.

The slots of all layers whose experts look alike are one stack of experts to the kernels, so that a hit copies nothing.
Two orders: that of checkpoints, for MLX's arrays on any device, and that of the CPU kernels.
"""

from dataclasses import dataclass
from math import prod
from typing import Protocol

import mlx.core as mx
import numpy as np

from tq import settings
from tq.cpu import lazy, library
from tq.engine.ops.prepared import (
    TERNARY_BITS,
    TILE_ROWS,
    Prepared,
    affine_table,
    codebook_table,
    levels_of,
    padded_rows,
)
from tq.engine.quantize import PackedTensor, QuantSpec, layout
from tq.engine.stream.store import Piece
from tq.engine.stream.words import NUMPY, converted, to_stream

CODES = {mx.float32: "F32", mx.float16: "F16", mx.bfloat16: "BF16", mx.uint32: "U32"}
ALIGNMENT = 64


@dataclass(frozen=True)
class Form:
    """What the matrices of all layers in one arena have in common.

    Attributes:
        spec: How they are quantized.
        rows, columns: Of one expert's.
        bias: The type in which a checkpoint has the bias of products, a safetensors code; None without one.
        used_bits: Of each stored word: fewer than 32 in turboquant's layout.
    """

    spec: QuantSpec
    rows: int
    columns: int
    bias: str | None
    used_bits: int

    @property
    def words_per_row(self) -> int:
        return layout(self.spec, (self.rows, self.columns))["weight"].shape[1]


class Slots(Protocol):
    """Slots for the experts of one form. Memory is given by ``allocate``; slots are filled by several threads."""

    slot_bytes: int

    def allocate(self, n: int) -> None:
        """Make n slots."""

    def target(self, piece: Piece, slot: int) -> memoryview | None:
        """Where the stored bytes of a piece go as they are, or None if ``fill`` must have them."""

    def fill(self, slot: int, pieces: dict[str, tuple[Piece, np.ndarray]]) -> None:
        """Put stored bytes (uint8) of pieces that have no ``target`` into a slot."""

    def packed(self, shared: dict[str, mx.array], n_experts: int) -> tuple[PackedTensor, mx.array | None]:
        """The slots as the experts of a layer with these shared arrays, and their bias if products lack it.

        The shape says how many experts the layer has; the arrays have as many as there are slots.
        """


class ArraySlots:
    """MLX arrays with the experts as they are stored.

    Args:
        dtype: Of activations. Biases have it unless they are stored in float32, as in a resident model; and the scales
            of affine codes, which MLX's kernels want in it.
    """

    def __init__(self, form: Form, dtype: mx.Dtype):
        self.form, self.dtype = form, dtype
        of_one = layout(form.spec, (form.rows, form.columns))
        affine = form.spec.codec == "affine"
        self._types = {name: dtype if affine and name != "weight" else array.dtype for name, array in of_one.items()}
        self._shapes = {name: array.shape for name, array in of_one.items()}
        if form.bias:
            self._types["bias"] = mx.float32 if form.bias == "F32" else dtype
            self._shapes["bias"] = (form.rows,)
        self.slot_bytes = sum(prod(shape) * self._types[name].size for name, shape in self._shapes.items())
        self._arrays: dict[str, mx.array] = {}
        self._memory: dict[str, np.ndarray] = {}
        self._bytes: dict[str, memoryview] = {}

    def allocate(self, n: int) -> None:
        for name, shape in self._shapes.items():
            wanted = self._types[name]
            # NumPy has no bfloat16: its memory is seen as that of the bits, which is the same.
            bits = mx.zeros((n, *shape), mx.uint16 if wanted == mx.bfloat16 else wanted)
            array = bits.view(wanted) if bits.dtype != wanted else bits
            mx.eval(bits, array)
            self._arrays[name] = array
            self._memory[name] = np.asarray(bits)
            self._bytes[name] = self._memory[name].data.cast("B")

    def target(self, piece: Piece, slot: int) -> memoryview | None:
        if piece.dtype != CODES[self._types[piece.name]] or (piece.name == "weight" and self.form.used_bits != 32):
            return None
        return self._bytes[piece.name][slot * piece.size_bytes : (slot + 1) * piece.size_bytes]

    def fill(self, slot: int, pieces: dict[str, tuple[Piece, np.ndarray]]) -> None:
        for name, (piece, stored) in pieces.items():
            values = stored.view(NUMPY[piece.dtype]).reshape(piece.shape)
            if name == "weight":
                values = to_stream(values, self.form.used_bits, self.form.words_per_row)
            else:
                values = converted(values, piece.dtype, CODES[self._types[name]])
            self._memory[name][slot] = values

    def packed(self, shared: dict[str, mx.array], n_experts: int) -> tuple[PackedTensor, mx.array | None]:
        arrays = {name: array for name, array in self._arrays.items() if name != "bias"}
        shape = (n_experts, self.form.rows, self.form.columns)
        return PackedTensor(self.form.spec, shape, arrays | shared), self._arrays.get("bias")


class PreparedSlots:
    """Experts in the memory order of the CPU kernels, made when they are read. See tq/cpu/kernels/layout.h.

    Scales are kept as they are stored, in float16, while those of a resident matrix are multiplied by a power of two:
    products are the same.
    """

    def __init__(self, form: Form):
        self.form = form
        self.bits = form.spec.bits or TERNARY_BITS
        self._codes_bytes = library.library().tq_codes_bytes(form.rows, form.columns, self.bits)
        self._tiles = padded_rows(form.rows) // TILE_ROWS
        of_one = layout(form.spec, (form.rows, form.columns))
        self._groups = of_one["scales"].shape[1]
        scales = self._tiles * self._groups * TILE_ROWS * 2
        sizes = {"codes": self._codes_bytes, "scales": scales}
        sizes |= {"biases": scales} if form.spec.codec == "affine" else {}
        sizes |= {"bias": form.rows * 4} if form.bias else {}
        self._sizes = sizes
        self.slot_bytes = sum(sizes.values())
        self._parts: dict[str, np.ndarray] = {}  # uint8 (n, size)
        self._memory: lazy.Memory | None = None

    def allocate(self, n: int) -> None:
        starts, end = {}, 0
        for name, size in self._sizes.items():
            starts[name] = end
            end += -(-n * size // ALIGNMENT) * ALIGNMENT
        self._memory = lazy.Memory(end)
        whole = self._memory.view()
        for name, size in self._sizes.items():
            self._parts[name] = whole[starts[name] : starts[name] + n * size].reshape(n, size)

    def target(self, piece: Piece, slot: int) -> memoryview | None:
        if piece.name == "bias" and piece.dtype == "F32":
            return memoryview(self._parts["bias"][slot])
        return None

    def fill(self, slot: int, pieces: dict[str, tuple[Piece, np.ndarray]]) -> None:
        form = self.form
        for name, (piece, stored) in pieces.items():
            values = stored.view(NUMPY[piece.dtype]).reshape(piece.shape)
            if name == "weight":
                words = to_stream(values, form.used_bits, form.words_per_row)
                library.library().tq_pack(
                    words.ctypes.data,
                    words.shape[1],
                    form.rows,
                    form.columns,
                    self.bits,
                    not form.spec.bits,
                    self._parts["codes"][slot].ctypes.data,
                )
            elif name == "bias":
                self._parts["bias"][slot].view(np.float32)[:] = converted(values, piece.dtype, "F32")
            else:
                tiles = self._parts[name][slot].view(np.float16).reshape(self._tiles, self._groups, TILE_ROWS)
                self._by_tile(values, tiles)

    def _by_tile(self, values: np.ndarray, tiles: np.ndarray) -> None:
        """float16 (rows, groups) to (tiles, groups, 16); rows that pad the last tile stay zero."""
        whole, rest = divmod(self.form.rows, TILE_ROWS)
        tiles[:whole] = values[: whole * TILE_ROWS].reshape(whole, TILE_ROWS, self._groups).swapaxes(1, 2)
        if rest:
            tiles[whole, :, :rest] = values[whole * TILE_ROWS :].T

    def packed(self, shared: dict[str, mx.array], n_experts: int) -> tuple[PackedTensor, mx.array | None]:
        form, memory = self.form, self._memory
        assert memory is not None
        affine = form.spec.codec == "affine"
        table = affine_table(form.spec.bits) if affine else codebook_table(levels_of(shared["codebook"]))
        n = len(self._parts["codes"])
        # Tables are of one layer, as codebooks are in turboquant's layout.
        tables = {"table": table.high, "table_low": table.low, "values": table.values}
        arrays = {name: mx.array(part) for name, part in tables.items() if part is not None}
        also = lazy.Pinned(*arrays.values())
        addresses = dict(zip(arrays, also.addresses, strict=True))
        addresses |= {name: part.ctypes.data for name, part in self._parts.items()}
        matrix = library.Matrix(
            **addresses,
            table_scale=table.scale,
            offset=table.offset,
            rows=form.rows,
            columns=form.columns,
            experts=n,
            bits=self.bits,
            group=form.spec.group_size,
        )
        shape = (n_experts, form.rows, form.columns)
        pinned = lazy.Pinned(memory, also=[also])
        has_bias = form.bias is not None
        prepared = Prepared(matrix, pinned, settings.cpu_exact(), has_bias, shape, n * self.slot_bytes)
        return PackedTensor(form.spec, shape, dict(shared), prepared=prepared), None
