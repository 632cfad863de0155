"""PackedTensor: the arrays of one quantized matrix and its QuantSpec."""

from dataclasses import dataclass
from math import prod
from typing import Protocol

import mlx.core as mx

from tq.engine.quantize.spec import QuantSpec

SHARED = ("codebook", "signs", "qjl_signs")


@dataclass(frozen=True)
class ArrayLayout:
    """Type and shape of one stored array."""

    dtype: mx.Dtype
    shape: tuple[int, ...]

    @property
    def size_bytes(self) -> int:
        return prod(self.shape) * self.dtype.size


class OwnOrder(Protocol):
    """A matrix in a memory order of a backend's own."""

    def decode(self) -> mx.array:
        """The dense matrix in the rotated basis, float32 (..., out, in)."""


@dataclass(frozen=True)
class PackedTensor:
    """One quantized matrix.

    Attributes:
        spec: How it was quantized.
        shape: The dense shape (..., out_features, in_features); leading axes are experts or heads.
        arrays: ``weight`` (uint32) and ``scales``, and as the codec needs ``biases``, ``codebook``, ``signs``,
            ``qjl_packed``, ``qjl_norms``, ``qjl_signs``. Those in SHARED may serve many matrices.
        decoded: The dense matrix in the rotated basis, where a slow backend keeps it in memory.
        prepared: The matrix as one backend reads it, which then has it in place of the arrays that are not SHARED.
    """

    spec: QuantSpec
    shape: tuple[int, ...]
    arrays: dict[str, mx.array]
    decoded: mx.array | None = None
    prepared: OwnOrder | None = None

    @property
    def per_matrix_arrays(self) -> list[str]:
        """Names of the arrays whose leading axes are those of the matrix."""
        return [name for name in self.arrays if name not in SHARED]

    @property
    def in_features(self) -> int:
        return self.shape[-1]

    @property
    def size_bytes(self) -> int:
        return sum(a.nbytes for a in self.arrays.values())
