"""The codec qjl: lloyd-max with one bit less, and signs of a Gaussian projection of what it leaves.

TurboQuant_prod (Zandieh et al. 2025, section 3.2) with QJL (arXiv 2406.03482): for a residual r of d numbers and a
matrix S of standard normals, sqrt(pi/2) / d * |r| * S^T sign(S r) has the expectation r over S, so that scores are
unbiased. Their variance is larger than that of lloyd-max with all bits: this is not the default.
"""

import math
from collections.abc import Sequence

import mlx.core as mx

from tq.engine.cache import bitstream
from tq.engine.cache.codecs import Layout
from tq.engine.cache.lloyd_max import LloydMax
from tq.engine.cache.rotation import gaussian, rotation
from tq.engine.quantize.packing import words_per_row

SEED = 1  # of the projection


class QJL:
    """Two stages; at 1 bit only the second. Its estimate is added to the vector, as both are linear in the query."""

    fits = False

    def __init__(self, bits: int, dim: int, group_size: int = 0, seed: int = SEED):
        self.dim, self.seed = dim, seed
        self.first = LloydMax(bits - 1, dim, group_size) if bits > 1 else None
        second = ((mx.uint32, words_per_row(dim, 1)), (mx.float16, 1))
        self.layout: Layout = second if self.first is None else (*self.first.layout, *second)

    def fit(self, x: mx.array) -> None:
        return None

    def rotate(self, x: mx.array, fitted: mx.array | None = None) -> mx.array:
        return x.astype(mx.float32) @ rotation(self.dim).T

    def unrotate(self, y: mx.array, fitted: mx.array | None = None) -> mx.array:
        return y @ rotation(self.dim)

    def encode(self, y: mx.array) -> list[mx.array]:
        first = [] if self.first is None else self.first.encode(y)
        residual = y if self.first is None else y - self.first.decode(first)
        projected = residual @ gaussian(self.dim, self.seed).T
        norm = mx.sqrt(mx.square(residual).sum(axis=-1, keepdims=True))
        return [*first, bitstream.pack(projected >= 0, 1), mx.minimum(norm, 65504).astype(mx.float16)]

    def decode(self, arrays: Sequence[mx.array]) -> mx.array:
        *first, words, norm = arrays
        signs = bitstream.unpack(words, 1, self.dim).astype(mx.float32) * 2 - 1
        estimate = signs @ gaussian(self.dim, self.seed)
        estimate = estimate * (norm.astype(mx.float32) * (math.sqrt(math.pi / 2) / self.dim))
        return estimate if self.first is None else self.first.decode(first) + estimate
