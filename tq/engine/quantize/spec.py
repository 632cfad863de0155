"""QuantSpec: how one matrix is quantized, and what that costs. It says what, a codec does it."""

import difflib
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from math import prod

from tq.errors import UsageError

GROUP_SIZES = (32, 64, 128)
# Read, never offered: turboquant checkpoints made with --mlp-group-size 16.
FOREIGN_GROUP_SIZE = 16
ROW = 0  # group_size of "one scale per row"
ROTATIONS = ("hadamard", "none")
# Valid bits per codec. A ternary code has 3 levels, 20 of them in 32 bits: it has no whole number of bits.
CODEC_BITS = {
    "lloyd-max": (1, 2, 3, 4, 5, 6, 7, 8),
    "ternary": (0,),
    "affine": (2, 3, 4, 5, 6, 8),
}


@dataclass(frozen=True)
class QuantSpec:
    """How one matrix is quantized.

    Args:
        codec: ``lloyd-max`` (TurboQuant), ``ternary`` or ``affine`` (MLX's own layout).
        bits: Bits of one code; 0 for ternary.
        group_size: Input features that share a scale: 32, 64, 128, or 0 for the whole row.
        rotation: ``hadamard`` (random signs, then a Hadamard transform of the inputs) or ``none``.
        qjl: Adds the sign of a random projection of each row's residual (1 bit per weight, see ``qjl.py``).

    Raises:
        UsageError: A value is outside the valid ones.
    """

    codec: str = "lloyd-max"
    bits: int = 4
    group_size: int = 64
    rotation: str = "hadamard"
    qjl: bool = False

    def __post_init__(self):
        if self.codec not in tuple(CODEC_BITS):  # a list from a damaged config.json has no hash
            near = _near(self.codec, CODEC_BITS)
            raise UsageError(f"codec {self.codec!r} is not one of {', '.join(CODEC_BITS)}", near)
        if type(self.bits) is not int or self.bits not in CODEC_BITS[self.codec]:
            if self.codec == "ternary":
                raise UsageError("the ternary codec takes no bits: it stores 20 trits in 32 bits")
            valid = ", ".join(map(str, CODEC_BITS[self.codec]))
            raise UsageError(f"bits {self.bits!r} is not valid for {self.codec}: use one of {valid}")
        if type(self.group_size) is not int or self.group_size not in (*GROUP_SIZES, FOREIGN_GROUP_SIZE, ROW):
            raise UsageError(f"group size {self.group_size!r} is not one of 32, 64, 128, row")
        if self.codec == "affine" and self.group_size not in GROUP_SIZES:
            raise UsageError("the affine codec needs a group size of 32, 64 or 128: MLX has no other, and no row scale")
        if self.rotation not in ROTATIONS:
            near = _near(self.rotation, ROTATIONS)
            raise UsageError(f"rotation {self.rotation!r} is not one of {', '.join(ROTATIONS)}", near)
        if not isinstance(self.qjl, bool):
            raise UsageError(f"qjl {self.qjl!r} is not true or false")
        if self.qjl and self.codec != "lloyd-max":
            raise UsageError("qjl is a second stage of the lloyd-max codec only")

    def size_bytes(self, shape: tuple[int, ...]) -> int:
        """Exact bytes of one quantized matrix of ``shape`` (..., out, in) on disk, without what matrices share."""
        from tq.engine.quantize.codecs import layout

        return sum(array.size_bytes for array in layout(self, shape).values())

    def bits_per_weight(self, shape: tuple[int, ...]) -> float:
        """Exact bits per weight of a matrix of ``shape`` (..., out, in)."""
        return 8 * self.size_bytes(shape) / prod(shape)

    def n_groups(self, in_features: int) -> int:
        """Scales per row. Raises UsageError if the group size does not divide ``in_features``."""
        if self.group_size == ROW:
            return 1
        if in_features % self.group_size:
            fits = [str(g) for g in GROUP_SIZES if in_features % g == 0] + ["row"] * (self.codec != "affine")
            hint = f"use --group-size {fits[0]}" if len(fits) == 1 else f"use one of {', '.join(fits)}"
            raise UsageError(
                f"group size {self.group_size} does not divide {in_features} input features", hint if fits else None
            )
        return in_features // self.group_size

    def label(self) -> str:
        """A short name for tables: ``lloyd-max 3-bit g64``."""
        parts = [self.codec]
        if self.bits:
            parts.append(f"{self.bits}-bit")
        parts.append("row" if self.group_size == ROW else f"g{self.group_size}")
        if self.rotation == "none":
            parts.append("unrotated")
        if self.qjl:
            parts.append("+qjl")
        return " ".join(parts)

    def to_json(self) -> dict:
        """The spec as a JSON object; fields at their default of QuantSpec are written too."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict) -> "QuantSpec":
        """The inverse of ``to_json``. Raises UsageError on an unknown field."""
        known = [f.name for f in fields(cls)]
        for name in data:
            if name not in known:
                raise UsageError(f"unknown field {name!r} in a quantization spec", _near(name, known))
        return cls(**data)


def _near(value: object, valid: Iterable[str]) -> str | None:
    found = difflib.get_close_matches(str(value), valid, 1)
    return f"did you mean {found[0]}?" if found else None
