"""Rotations as the kernels are given them, and the orthogonal matrices that they are."""

import numpy as np

from tq.cpu import library
from tq.engine.quantize.rotation import HADAMARD_FACTORS, hadamard_block, random_signs, transposed_hadamard


class Rotation:
    """The rotation of n features; `dense` is its matrix in float64."""

    def __init__(self, n: int):
        self.n, self.block = n, hadamard_block(n)
        self.m = next((m for m in HADAMARD_FACTORS[1:] if self.block % m == 0 and _is_power_of_two(self.block // m)), 1)
        self.signs = random_signs(n)
        self.factor = np.ascontiguousarray(transposed_hadamard(self.m).T) if self.m > 1 else None

    @property
    def rotation(self) -> library.Rotation:
        """The C structure; valid as long as this object."""
        factor = None if self.factor is None else self.factor.ctypes.data
        return library.Rotation(self.signs.ctypes.data, factor, self.n, self.block, self.m)

    @property
    def dense(self) -> np.ndarray:
        block = np.ones((1, 1)) if self.factor is None else self.factor.astype(np.float64)
        while len(block) < self.block:
            block = np.kron(block, np.array([[1, 1], [1, -1]]) / np.sqrt(2))
        return np.kron(np.eye(self.n // self.block), block) * self.signs


def _is_power_of_two(n: int) -> bool:
    return n & (n - 1) == 0
