"""The codec polar: recursive polar angles of the rotated vector (PolarQuant, arXiv 2502.02617).

Pairs of numbers become a radius and an angle, pairs of radii again, up to four times: of 16 numbers one radius is left,
and 15 angles. After a random rotation the angles of a level are independent, with a density that is known.
"""

from collections.abc import Sequence
from functools import lru_cache

import mlx.core as mx
import numpy as np

from tq.engine.cache import bitstream
from tq.engine.cache.codecs import Layout
from tq.engine.cache.rotation import rotation
from tq.engine.quantize.packing import words_per_row
from tq.errors import TQError

LEVELS = 4
LESS = 2  # bits that angles of higher levels, which lie in a quarter of the circle, have less than the first ones
GRID = 1 << 14


class Polar:
    """`bits` for first angles and two less, at least one, for others: 3.9 bits per number at 4 and dimension 128.

    Radii are float16, each the best one for the angles as they are stored.
    """

    fits = False

    def __init__(self, bits: int, dim: int):
        if dim % 4:
            raise TQError(f"the KV codec polar needs head dimensions that 4 divides, not {dim}", "take lloyd-max")
        self.dim = dim
        self.n_levels = min(LEVELS, (dim & -dim).bit_length() - 1)
        self.bits = [bits] + [max(bits - LESS, 1)] * (self.n_levels - 1)
        self.angles = [dim >> level for level in range(1, self.n_levels + 1)]
        words = [(mx.uint32, words_per_row(n, b)) for n, b in zip(self.angles, self.bits, strict=True)]
        self.layout: Layout = (*words, (mx.float16, self.angles[-1]))

    def fit(self, x: mx.array) -> None:
        return None

    def rotate(self, x: mx.array, fitted: mx.array | None = None) -> mx.array:
        return x.astype(mx.float32) @ rotation(self.dim).T

    def unrotate(self, y: mx.array, fitted: mx.array | None = None) -> mx.array:
        return y @ rotation(self.dim)

    def encode(self, y: mx.array) -> list[mx.array]:
        radii, codes = y, []
        for level, bits in enumerate(self.bits):
            even, odd = radii[..., 0::2], radii[..., 1::2]
            angle = mx.arctan2(odd, even)
            if level == 0:
                angle = mx.where(angle < 0, angle + 2 * np.pi, angle)
            codes.append(_nearest(angle, level, bits))
            radii = mx.sqrt(mx.square(even) + mx.square(odd))
        direction = self._vectors(codes, mx.ones(radii.shape))
        groups = (*y.shape[:-1], self.angles[-1], -1)
        radii = (y.reshape(groups) * direction.reshape(groups)).sum(axis=-1)  # the direction has length 1
        packed = [bitstream.pack(c, b) for c, b in zip(codes, self.bits, strict=True)]
        return [*packed, mx.clip(radii, 0, 65504).astype(mx.float16)]

    def decode(self, arrays: Sequence[mx.array]) -> mx.array:
        *words, radii = arrays
        codes = [bitstream.unpack(w, b, n) for w, b, n in zip(words, self.bits, self.angles, strict=True)]
        return self._vectors(codes, radii.astype(mx.float32))

    def _vectors(self, codes: list[mx.array], radii: mx.array) -> mx.array:
        for level in range(self.n_levels - 1, -1, -1):
            angles = codebook(level, self.bits[level])
            cos, sin = (mx.array(f(angles).astype(np.float32))[codes[level]] for f in (np.cos, np.sin))
            radii = mx.stack([radii * cos, radii * sin], axis=-1).reshape(*radii.shape[:-1], -1)
        return radii


@lru_cache
def codebook(level: int, bits: int) -> np.ndarray:
    """The Lloyd-Max levels of the angles of a level, ascending, float64 (2^bits,).

    First angles are uniform on the circle; those of level l (from 0) have the density sin(2x)^(2^l - 1) on a quarter.
    """
    n = 2**bits
    if level == 0:
        return (np.arange(n) + 0.5) * (2 * np.pi / n)
    x = (np.arange(GRID) + 0.5) * (np.pi / 2 / GRID)
    mass = np.sin(2 * x) ** (2**level - 1)
    cumulative = np.cumsum(mass)
    levels = np.interp((np.arange(n) + 0.5) / n * cumulative[-1], cumulative, x)
    for _ in range(200):
        cell = np.searchsorted((levels[1:] + levels[:-1]) / 2, x)
        levels = np.bincount(cell, mass * x, n) / np.bincount(cell, mass, n)
    return levels


def _nearest(angle: mx.array, level: int, bits: int) -> mx.array:
    n = 2**bits
    if level == 0:
        return mx.minimum((angle * (n / (2 * np.pi))).astype(mx.uint32), n - 1)
    angles = codebook(level, bits)
    borders = (angles[1:] + angles[:-1]) / 2
    return sum(((angle > float(border)).astype(mx.uint32) for border in borders), mx.array(0, mx.uint32))
