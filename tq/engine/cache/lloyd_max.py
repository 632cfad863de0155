"""The codec lloyd-max: a rotation, one searched scale, codes of a Lloyd-Max codebook (TurboQuant_mse, section 3.1)."""

import ctypes
from collections.abc import Sequence
from functools import lru_cache

import mlx.core as mx
import numpy as np

from tq.cpu import library
from tq.engine import ops
from tq.engine.cache import bitstream
from tq.engine.cache.codecs import Layout
from tq.engine.cache.rotation import rotation
from tq.engine.quantize.codebooks import stored_codebook
from tq.engine.quantize.nearest import NearestLevel
from tq.engine.quantize.packing import words_per_row

# Start scales in root mean squares, by bits; from 3 bits on the last lets the highest level meet the largest number.
LOWEST, HIGHEST = 0.7, 1.1
STARTS = {1: 1, 2: 3}
MANY_STARTS = 8
CELLS = 4096  # of the table that finds the nearest of many levels
LARGEST = 65504.0  # of float16


class LloydMax:
    """Zandieh et al. 2025 store the norm; here it is the scale that leaves the smallest error for the chosen codes.

    At 8 bits levels are equidistant, and the scale is the largest number over 127: in vectors of a hundred numbers
    that is as good as the codebook (whose last levels wait for numbers that do not come), and codes are integers.
    """

    fits = False

    def __init__(self, bits: int, dim: int, group_size: int = 0):
        self.bits, self.dim = bits, dim
        self.group = group_size if group_size and dim % group_size == 0 else dim
        self.layout: Layout = ((mx.uint32, words_per_row(dim, bits)), (mx.float16, dim // self.group))
        self.levels = np.arange(-128, 128, dtype=np.float32) if bits == 8 else stored_codebook("lloyd-max", bits)

    def fit(self, x: mx.array) -> None:
        return None

    def rotate(self, x: mx.array, fitted: mx.array | None = None) -> mx.array:
        return x.astype(mx.float32) @ rotation(self.dim).T

    def unrotate(self, y: mx.array, fitted: mx.array | None = None) -> mx.array:
        return y @ rotation(self.dim)

    def encode(self, y: mx.array) -> list[mx.array]:
        groups = y.reshape(*y.shape[:-1], -1, self.group)
        if self.bits < 8 and _compiled():
            scales, codes = self._search(groups)
        else:
            scales = self._scales(groups)
            codes = self._nearest(groups * _inverse(scales.astype(mx.float32)))
        return [bitstream.pack(codes.reshape(y.shape), self.bits), scales[..., 0]]

    def decode(self, arrays: Sequence[mx.array]) -> mx.array:
        words, scales = arrays
        codes = bitstream.unpack(words, self.bits, self.dim)
        levels = codes.astype(mx.float32) - 128 if self.bits == 8 else mx.array(self.levels)[codes]
        groups = levels.reshape(*scales.shape, self.group) * scales[..., None].astype(mx.float32)
        return groups.reshape(*words.shape[:-1], self.dim)

    def _scales(self, x: mx.array) -> mx.array:
        """float16 (..., 1) of groups (..., group)."""
        largest = mx.abs(x).max(axis=-1, keepdims=True)
        if self.bits == 8:
            return mx.minimum(largest / 127, LARGEST).astype(mx.float16)
        rms = mx.sqrt(mx.square(x).mean(axis=-1, keepdims=True))
        n = STARTS.get(self.bits, MANY_STARTS)
        first = rms if n == 1 else LOWEST * rms
        last = HIGHEST * rms
        if n == MANY_STARTS:
            last = mx.maximum(last, largest / float(self.levels[-1]))
        best, best_gain = rms, mx.zeros_like(rms)
        levels = mx.array(self.levels)
        for i in range(n + 1):  # the best of them once more
            start = best if i == n else first + (last - first) * (i / max(n - 1, 1))
            q = levels[self._nearest(x * _inverse(start))]
            product = (x * q).sum(axis=-1, keepdims=True)
            fitted = product / mx.square(q).sum(axis=-1, keepdims=True)
            better = fitted * product > best_gain
            best, best_gain = mx.where(better, fitted, best), mx.where(better, fitted * product, best_gain)
        return mx.minimum(best, LARGEST).astype(mx.float16)

    def _search(self, x: mx.array) -> tuple[mx.array, mx.array]:
        """`_scales` and the codes for them, (..., group), by the compiled search that weights have: much faster."""
        n = STARTS.get(self.bits, MANY_STARTS)
        groups = np.clip(np.array(x, np.float32).reshape(-1, self.group), -LARGEST, LARGEST)
        scales, codes = np.empty(len(groups), np.float32), np.empty(groups.shape, np.uint8)
        search = library.ScaleSearch(
            nearest=_table(self.bits).compiled,
            lowest=1 if n == 1 else LOWEST,
            highest=HIGHEST,
            to_largest=n == MANY_STARTS,
            n_starts=n,
            size=self.group,
            n_groups=len(groups),
        )
        library.library().tq_best_scales(ctypes.byref(search), groups.ctypes, scales.ctypes, codes.ctypes)
        shape = *x.shape[:-1], 1
        return mx.array(scales).astype(mx.float16).reshape(shape), mx.array(codes).reshape(x.shape)

    def _nearest(self, x: mx.array) -> mx.array:
        """Codes (uint32) of the levels nearest to x."""
        if self.bits == 8:
            return (mx.clip(mx.round(x), -127, 127) + 128).astype(mx.uint32)
        borders = (self.levels[1:] + self.levels[:-1]) / 2
        if len(borders) <= 7:
            return sum(((x > float(border)).astype(mx.uint32) for border in borders), mx.array(0, mx.uint32))
        # Each cell of the range holds at most one border: the cell gives the code below it, a comparison decides.
        width = float(borders[-1] - borders[0]) / (CELLS - 4)
        low = float(borders[0]) - 2 * width
        below = np.searchsorted(borders, np.arange(CELLS) * width + low - width).astype(np.uint32)
        code = mx.array(below)[mx.clip((x - low) * (1 / width), 0, CELLS - 1).astype(mx.uint32)]
        above = mx.array(np.append(borders, np.inf).astype(np.float32))[code]
        return code + (x > above).astype(mx.uint32)


def _compiled() -> bool:
    """Whether vectors may leave MLX to be encoded."""
    at_hand = mx.default_device() == mx.Device(mx.cpu) and ops.forced_backend() in ("auto", ops.cpu.name)
    return at_hand and library.state().active


@lru_cache
def _table(bits: int) -> NearestLevel:
    return NearestLevel(stored_codebook("lloyd-max", bits))


def _inverse(scale: mx.array) -> mx.array:
    return mx.where(scale > 1e-30, 1 / scale, 0)
