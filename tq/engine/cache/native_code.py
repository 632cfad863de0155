"""How the CPU kernels code keys or values: the parts of a vector, and their tables for C."""

from dataclasses import dataclass
from functools import lru_cache

import mlx.core as mx
import numpy as np

from tq.cpu import lazy, library
from tq.engine.cache import affine, outliers
from tq.engine.ops.prepared import codebook_table, prepare_rotation
from tq.engine.quantize.codebooks import stored_codebook
from tq.engine.quantize.rotation import hadamard_block, random_signs

CODECS = ("lloyd-max", "affine")
SMALLEST_ROTATION = 16  # numbers of a vector that are mixed with each other, at least


@dataclass(frozen=True)
class Part:
    """Numbers that are coded together (tq_kv_part).

    Attributes:
        group: That share a scale; 0: all.
        affine: With a minimum, and not rotated.
    """

    dim: int
    bits: int
    group: int = 0
    affine: bool = False

    @property
    def n_groups(self) -> int:
        return self.dim // self.group if self.group else 1

    @property
    def planes(self) -> int:
        """Float16 numbers beside the codes."""
        return self.n_groups * (2 if self.affine else 1)

    def block_bytes(self, values: bool) -> int:
        """Of the codes of 64 tokens."""
        return library.library().tq_kv_block_bytes(self.dim, self.bits, values)


@dataclass(frozen=True, eq=False)
class Coding:
    """Of keys or of values: `structure` is a tq_kv_side, valid as long as `pinned`.

    Attributes:
        ordered: Whether a head has an order of its numbers, those with the largest energy first.
        planes, block_bytes: Of all parts.
    """

    dim: int
    parts: tuple[Part, ...]
    ordered: bool
    structure: library.KVSide
    pinned: tuple[lazy.Pinned, ...]
    planes: int
    block_bytes: int


def declines_side(codec: str, bits: float, dim: int) -> str | None:
    """None, or why the kernels cannot keep keys or values that are coded like this."""
    if codec not in CODECS:
        return f"there is no kernel for the KV codec {codec}"
    for part in parts_of(codec, bits, dim, 0):
        if not part.affine and hadamard_block(part.dim) < SMALLEST_ROTATION:
            return f"{part.dim} numbers of a head dimension of {dim} have no Hadamard rotation"
    return None


def parts_of(codec: str, bits: float, dim: int, group_size: int) -> tuple[Part, ...]:
    """The parts that the codecs of codecs.py make of a vector."""
    if codec == "affine":
        group = group_size or affine.GROUP
        return (Part(dim, int(bits), group if dim % group == 0 else 0, affine=True),)
    if bits != int(bits):
        few = max(dim // outliers.SHARE, 1)
        return Part(few, int(bits) + outliers.MORE_BITS), Part(dim - few, int(bits))
    return (Part(dim, int(bits), group_size if group_size and dim % group_size == 0 else 0),)


@lru_cache(maxsize=64)
def coding(codec: str, bits: float, dim: int, group_size: int, values: bool) -> Coding:
    """How vectors of `dim` numbers are coded."""
    parts = parts_of(codec, bits, dim, group_size)
    pinned: list[lazy.Pinned] = []
    made = (library.KVPart * 2)(*(_structure(part, pinned) for part in parts))
    ordered = len(parts) > 1
    return Coding(
        dim, parts, ordered, library.KVSide(made, len(parts), ordered), tuple(pinned),
        sum(part.planes for part in parts), sum(part.block_bytes(values) for part in parts),
    )  # fmt: skip


def _structure(part: Part, pinned: list[lazy.Pinned]) -> library.KVPart:
    high: np.ndarray | None = None
    scale = 1.0
    if part.affine:
        values = np.arange(1 << part.bits, dtype=np.float32) - (1 << part.bits >> 1)
        high = np.full(256, 128, np.uint8)
        high[: len(values)] = values + 128
    elif part.bits < 8:
        table = codebook_table(tuple(stored_codebook("lloyd-max", part.bits).tolist()))
        high, values, scale = table.high, table.values, table.scale
    made = library.KVPart(part.dim, part.bits, part.group, part.affine, table_scale=scale)
    if high is not None:
        pinned.append(lazy.Pinned(mx.array(high), mx.array(values)))
        made.table, made.values = pinned[-1].addresses
    if not part.affine:
        rotation = prepare_rotation(mx.array(random_signs(part.dim)))
        made.rotation = rotation.rotation
        if rotation.pinned is not None:
            pinned.append(rotation.pinned)
    return made
