"""The codec affine: the minimum of a group and equal steps from there, not rotated."""

from collections.abc import Sequence

import mlx.core as mx

from tq.engine.cache import bitstream
from tq.engine.cache.codecs import Layout
from tq.engine.quantize.packing import words_per_row

GROUP = 64  # where the settings name none: mlx-lm's


class Affine:
    """x = minimum + step * code, both float16. What mlx-lm's own quantized cache has, at any width and dimension."""

    fits = False

    def __init__(self, bits: int, dim: int, group_size: int = 0):
        self.bits, self.dim = bits, dim
        group = group_size or GROUP
        self.group = group if dim % group == 0 else dim
        groups = dim // self.group
        self.layout: Layout = ((mx.uint32, words_per_row(dim, bits)), (mx.float16, groups), (mx.float16, groups))

    def fit(self, x: mx.array) -> None:
        return None

    def rotate(self, x: mx.array, fitted: mx.array | None = None) -> mx.array:
        return x.astype(mx.float32)

    def unrotate(self, y: mx.array, fitted: mx.array | None = None) -> mx.array:
        return y

    def encode(self, y: mx.array) -> list[mx.array]:
        groups = y.reshape(*y.shape[:-1], -1, self.group)
        lowest = groups.min(axis=-1, keepdims=True).astype(mx.float16)
        largest = groups.max(axis=-1, keepdims=True)
        last = 2**self.bits - 1
        step = ((largest - lowest.astype(mx.float32)) / last).astype(mx.float16)
        divisor = mx.where(step > 0, step, 1).astype(mx.float32)
        codes = mx.clip(mx.round((groups - lowest.astype(mx.float32)) / divisor), 0, last)
        return [bitstream.pack(codes.reshape(y.shape), self.bits), step[..., 0], lowest[..., 0]]

    def decode(self, arrays: Sequence[mx.array]) -> mx.array:
        words, step, lowest = arrays
        codes = bitstream.unpack(words, self.bits, self.dim).astype(mx.float32)
        groups = codes.reshape(*step.shape, self.group)
        groups = groups * step[..., None].astype(mx.float32) + lowest[..., None].astype(mx.float32)
        return groups.reshape(*words.shape[:-1], self.dim)
