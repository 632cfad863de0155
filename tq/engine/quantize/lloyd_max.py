"""The codebook codecs: lloyd-max (TurboQuant) and ternary. Rotate, search scales, take the nearest level, pack."""

import mlx.core as mx
import numpy as np

from tq.engine.quantize import packing, qjl
from tq.engine.quantize.codebooks import stored_codebook
from tq.engine.quantize.feedback import quantize_with_feedback
from tq.engine.quantize.nearest import NearestLevel
from tq.engine.quantize.packed import ArrayLayout, PackedTensor
from tq.engine.quantize.scales import best_scales, inverse
from tq.engine.quantize.spec import QuantSpec


class CodebookCodec:
    """Codes of a fixed codebook times one scale per group (Zandieh et al. 2025, TurboQuant_mse, section 3.1)."""

    def layout(self, spec: QuantSpec, shape: tuple[int, ...]) -> dict[str, ArrayLayout]:
        *rows, n = shape
        arrays = {
            "weight": ArrayLayout(mx.uint32, (*rows, packing.words_per_row(n, spec.bits))),
            "scales": ArrayLayout(mx.float16, (*rows, spec.n_groups(n))),
        }
        return arrays | (qjl.layout(shape) if spec.qjl else {})

    def shared(self, spec: QuantSpec, in_features: int) -> dict[str, mx.array]:
        codebook = mx.array(stored_codebook(spec.codec, spec.bits)).astype(mx.float16)
        return {"codebook": codebook} | (qjl.shared(in_features) if spec.qjl else {})

    def encode(self, rotated: np.ndarray, spec: QuantSpec, factor: np.ndarray | None) -> dict[str, mx.array]:
        """rotated: float32 (rows, n) -> arrays with the same leading axis."""
        rows, n = rotated.shape
        nearest = NearestLevel(stored_codebook(spec.codec, spec.bits))
        group = n // spec.n_groups(n)
        if factor is None:
            scales, codes = best_scales(rotated.reshape(-1, group), nearest)
            codes = codes.reshape(rows, n)
        else:

            def fit(weights: np.ndarray) -> tuple[np.ndarray]:
                return (best_scales(weights, nearest)[0],)

            def quantize(column: np.ndarray, params: tuple) -> tuple[np.ndarray, np.ndarray]:
                (scale,) = params
                codes = nearest.codes(column * inverse(scale))
                return codes, nearest.levels[codes] * scale

            params, codes = quantize_with_feedback(rotated, factor, group, fit, quantize)
            scales = np.stack([scale for (scale,) in params], axis=1)
        scales = scales.reshape(rows, -1)
        arrays = {
            "weight": mx.array(packing.pack(codes, spec.bits)),
            "scales": mx.array(scales.astype(np.float16)),
        }
        if spec.qjl:
            approximation = nearest.levels[codes] * np.repeat(scales, group, axis=1)
            arrays |= qjl.encode(rotated - approximation)
        return arrays

    def decode(self, packed: PackedTensor, dtype: mx.Dtype) -> mx.array:
        """The matrix in the rotated basis. Returns (..., out, in) of ``dtype``."""
        *rows, n = packed.shape
        arrays = packed.arrays
        codes = packing.unpack(arrays["weight"], packed.spec.bits, n)
        levels = arrays["codebook"].astype(dtype)[codes]
        scales = arrays["scales"].astype(dtype)[..., None]
        dense = (levels.reshape(*scales.shape[:-1], -1) * scales).reshape(*rows, n)
        if packed.spec.qjl:
            dense = dense + qjl.decode(arrays, n, dtype)
        return dense
