"""Half bits: the channels with the largest numbers get two bits more than the others (TurboQuant, section 4.3)."""

from collections.abc import Sequence

import mlx.core as mx

from tq.engine.cache.codecs import Layout
from tq.engine.cache.lloyd_max import LloydMax

SHARE = 4  # one channel of so many is an outlier: 32 of 128, so that b and b + 2 bits are b + 1/2 in the mean
MORE_BITS = 2


class Outliers:
    """Two lloyd-max codes, each with a rotation and a scale of its own: a rotation must not spread what is large.

    Which channels are outliers is found once for each head, from the first vectors that are packed.
    """

    fits = True

    def __init__(self, bits: float, dim: int):
        self.dim = dim
        self.n_outliers = max(dim // SHARE, 1)
        self.parts = LloydMax(int(bits) + MORE_BITS, self.n_outliers), LloydMax(int(bits), dim - self.n_outliers)
        self.layout: Layout = (*self.parts[0].layout, *self.parts[1].layout)

    def fit(self, x: mx.array) -> mx.array:
        """Channels by their energy, the largest first: int32 (B, heads, 1, dim)."""
        energy = mx.square(x.astype(mx.float32)).mean(axis=2, keepdims=True)
        return mx.argsort(-energy, axis=-1).astype(mx.int32)

    def rotate(self, x: mx.array, fitted: mx.array | None) -> mx.array:
        assert fitted is not None
        order = mx.broadcast_to(_for_heads(fitted, x.shape[1]), x.shape)
        return self._each("rotate", mx.take_along_axis(x.astype(mx.float32), order, axis=-1))

    def unrotate(self, y: mx.array, fitted: mx.array | None) -> mx.array:
        assert fitted is not None
        order = mx.broadcast_to(_for_heads(mx.argsort(fitted, axis=-1), y.shape[1]), y.shape)
        return mx.take_along_axis(self._each("unrotate", y), order, axis=-1)

    def encode(self, y: mx.array) -> list[mx.array]:
        first, second = mx.split(y, [self.n_outliers], axis=-1)
        return [*self.parts[0].encode(first), *self.parts[1].encode(second)]

    def decode(self, arrays: Sequence[mx.array]) -> mx.array:
        return mx.concatenate([self.parts[0].decode(arrays[:2]), self.parts[1].decode(arrays[2:])], axis=-1)

    def _each(self, what: str, x: mx.array) -> mx.array:
        parts = mx.split(x, [self.n_outliers], axis=-1)
        return mx.concatenate([getattr(c, what)(p) for c, p in zip(self.parts, parts, strict=True)], axis=-1)


def _for_heads(order: mx.array, heads: int) -> mx.array:
    """For each query head that of its key head."""
    return order if order.shape[1] == heads else mx.repeat(order, heads // order.shape[1], axis=1)
