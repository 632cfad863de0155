"""What tests, `tq doctor` and the budget script iterate: every kernel variant, with data and the exact result."""

from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from tq.engine.quantize import packing

DTYPES = (mx.float16, mx.bfloat16, mx.float32)


@dataclass(frozen=True)
class Case:
    """One launch of a kernel variant on random data.

    Attributes:
        launch: Runs the kernel, lazily; may be called many times.
        expected: The result in float64.
        size_bytes: What the launch has to read and write at least, for achieved GB/s.
    """

    launch: Callable[[], mx.array]
    expected: np.ndarray
    size_bytes: int

    def error(self) -> float:
        """Run it: RMS error relative to the RMS of the expected result."""
        got = np.array(self.launch().astype(mx.float32), np.float64)
        return float(np.linalg.norm(got - self.expected) / np.linalg.norm(self.expected))


@dataclass(frozen=True)
class Variant:
    """A kernel with one kind of codes, type of activations and shape.

    Attributes:
        kernel: Name of its file.
        label: What else tells it from others: "3 bits, groups of 64, float16, 4 rows of 37x192".
        dtype: Of the activations.
        prepare: Makes the data.
    """

    kernel: str
    label: str
    dtype: mx.Dtype
    prepare: Callable[[np.random.Generator], Case]


@dataclass(frozen=True)
class Codes:
    """A kind of stored matrix: bits (0 for trits), columns per scale (0 for all), its levels, and a remark."""

    bits: int
    group_size: int
    codebook: np.ndarray
    remark: str = ""

    @property
    def label(self) -> str:
        bits = (f"{self.bits} bits" if self.bits else "trits") + self.remark
        return f"{bits}, {f'groups of {self.group_size}' if self.group_size else 'a scale per row'}"


@dataclass(frozen=True)
class Matrix:
    """A random packed matrix (..., out, in), as launchers take it, and what it means.

    Attributes:
        dense: float64 (..., out, in).
    """

    weight: mx.array
    scales: mx.array
    codebook: mx.array
    bits: int
    group_size: int
    dense: np.ndarray

    @property
    def stored(self) -> tuple[mx.array, mx.array, mx.array, int, int]:
        """The arguments that say what a matrix is, in the order of every launcher."""
        return self.weight, self.scales, self.codebook, self.bits, self.group_size

    @property
    def size_bytes(self) -> int:
        return self.weight.nbytes + self.scales.nbytes


def random_matrix(rng: np.random.Generator, codes: Codes, shape: tuple[int, ...]) -> Matrix:
    """A matrix of random codes and scales. shape: (..., out, in)."""
    *outer, columns = shape
    rows = int(np.prod(outer))
    levels = codes.codebook.astype(np.float16)
    # Codes as often as those of normal weights, so that the error of a level counts as much as it does in a model.
    borders = (levels[1:].astype(np.float64) + levels[:-1]) / 2
    chosen = np.searchsorted(borders, rng.standard_normal((rows, columns)))
    groups = columns // codes.group_size if codes.group_size else 1
    scales = rng.uniform(0.5, 1.5, (rows, groups)).astype(np.float16)
    dense = levels.astype(np.float64)[chosen] * np.repeat(scales.astype(np.float64), columns // groups, axis=1)
    words = packing.pack(chosen, codes.bits)
    return Matrix(
        mx.array(words).reshape(*outer, -1),
        mx.array(scales).reshape(*outer, -1),
        mx.array(levels),
        codes.bits,
        codes.group_size,
        dense.reshape(shape),
    )


def random_rows(rng: np.random.Generator, shape: tuple[int, ...], dtype: mx.Dtype) -> tuple[mx.array, np.ndarray]:
    """Normal activations of a type, and their exact values in float64."""
    x = mx.array(rng.standard_normal(shape).astype(np.float32)).astype(dtype)
    return x, np.array(x.astype(mx.float32), np.float64)


def type_name(dtype: mx.Dtype) -> str:
    return str(dtype).split(".")[-1]
