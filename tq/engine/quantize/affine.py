"""The affine codec: MLX's own layout (code * scale + bias per group), with the best scale and bias for the codes.

Files and arrays are exactly those of ``mx.quantize``, so MLX's native kernels run them on every device; a rotation in
front is what MLX does not have.
"""

import itertools

import mlx.core as mx
import numpy as np

from tq.engine.quantize import packing
from tq.engine.quantize.feedback import quantize_with_feedback
from tq.engine.quantize.packed import ArrayLayout, PackedTensor
from tq.engine.quantize.scales import for_each_block, inverse
from tq.engine.quantize.spec import QuantSpec

# Ends of the ranges to start from, in code steps inwards from the extremes, taken from the mean. Each end for itself:
# 4 to 7 % less error than as many ranges that shrink on both sides, at every width.
END_STEPS = (0.0, 0.8, 1.6)
REFINEMENTS = 2


class AffineCodec:
    def layout(self, spec: QuantSpec, shape: tuple[int, ...]) -> dict[str, ArrayLayout]:
        *rows, n = shape
        groups = (*rows, spec.n_groups(n))
        return {
            "weight": ArrayLayout(mx.uint32, (*rows, packing.words_per_row(n, spec.bits))),
            "scales": ArrayLayout(mx.float16, groups),
            "biases": ArrayLayout(mx.float16, groups),
        }

    def shared(self, spec: QuantSpec, in_features: int) -> dict[str, mx.array]:
        return {}

    def encode(self, rotated: np.ndarray, spec: QuantSpec, factor: np.ndarray | None) -> dict[str, mx.array]:
        """rotated: float32 (rows, n) -> arrays with the same leading axis."""
        rows, n = rotated.shape
        top = 2**spec.bits - 1
        if factor is None:
            groups = rotated.reshape(-1, spec.group_size)
            scales, biases = best_affine(groups, spec.bits)
            codes = np.empty(groups.shape, np.uint8)

            def assign(r: slice) -> None:
                codes[r] = _codes(groups[r], scales[r, None], biases[r, None], top)

            for_each_block(assign, *groups.shape)
            codes = codes.reshape(rows, n)
        else:

            def quantize(column: np.ndarray, params: tuple) -> tuple[np.ndarray, np.ndarray]:
                scale, bias = params
                codes = _codes(column, scale, bias, top)
                return codes, codes * scale + bias

            params, codes = quantize_with_feedback(
                rotated, factor, spec.group_size, lambda group: best_affine(group, spec.bits), quantize
            )
            scales, biases = (np.stack(part, axis=1) for part in zip(*params, strict=True))
        return {
            "weight": mx.array(packing.pack(codes, spec.bits)),
            "scales": mx.array(scales.reshape(rows, -1).astype(np.float16)),
            "biases": mx.array(biases.reshape(rows, -1).astype(np.float16)),
        }

    def decode(self, packed: PackedTensor, dtype: mx.Dtype) -> mx.array:
        """The matrix in the basis in which it is stored. Returns (..., out, in) of ``dtype``."""
        *rows, n = packed.shape
        codes = packing.unpack(packed.arrays["weight"], packed.spec.bits, n).astype(dtype)
        scales, biases = (packed.arrays[k].astype(dtype)[..., None] for k in ("scales", "biases"))
        return (codes.reshape(*scales.shape[:-1], -1) * scales + biases).reshape(*rows, n)


def best_affine(groups: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """Scales and biases, float32 (n_groups,) and exact in float16, of groups float32 (n_groups, group_size).

    A grid of ranges, each with the least-squares line through its codes, the best one refined.
    """
    top = 2**bits - 1
    shares = [np.float32(1 - steps / 2**bits) for steps in END_STEPS]
    scales = np.empty(len(groups), np.float32)
    biases = np.empty(len(groups), np.float32)

    def work(rows: slice) -> None:
        x = groups[rows]
        mean = x.mean(axis=1)
        centred = x - mean[:, None]
        low, high = centred.min(axis=1), centred.max(axis=1)
        # A constant group is its bias: the scale stays 0 and nothing beats it.
        best_scale, best_q_mean, best_gain = (np.zeros_like(mean) for _ in range(3))

        def try_line(scale: np.ndarray, bias: np.ndarray) -> None:
            q = _codes(centred, scale[:, None], bias[:, None], top).astype(np.float32)
            q_mean = q.mean(axis=1)
            q -= q_mean[:, None]
            xq, qq = np.einsum("ij,ij->i", centred, q), np.einsum("ij,ij->i", q, q)
            fitted = np.divide(xq, qq, out=np.zeros_like(xq), where=qq > 0)
            gain = fitted * xq  # the part of |x - mean|^2 that the line explains
            better = gain > best_gain
            best_scale[better], best_gain[better] = fitted[better], gain[better]
            best_q_mean[better] = q_mean[better]

        for low_share, high_share in itertools.product(shares, shares):
            try_line((high * high_share - low * low_share) / top, low * low_share)
        for _ in range(REFINEMENTS):
            try_line(best_scale.copy(), -best_scale * best_q_mean)
        scales[rows] = best_scale.astype(np.float16)
        biases[rows] = np.clip(mean - scales[rows] * best_q_mean, -65504, 65504).astype(np.float16)

    for_each_block(work, *groups.shape)
    return scales, biases


def _codes(x: np.ndarray, scale: np.ndarray, bias: np.ndarray, top: int) -> np.ndarray:
    """Nearest codes 0..top; 0 where the scale is 0."""
    return np.clip(np.rint((x - bias) * inverse(scale)), 0, top).astype(np.uint8)
