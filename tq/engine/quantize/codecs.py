"""The codec registry, and the two functions that everything else calls: encode and decode.

A codec works on rows in the rotated basis and knows neither models nor rotation; rotation is applied here, once for
all codecs. A codec has ``layout``, ``shared``, ``encode`` and ``decode``.
"""

from typing import Protocol

import mlx.core as mx
import numpy as np

from tq.engine.quantize.affine import AffineCodec
from tq.engine.quantize.feedback import Feedback
from tq.engine.quantize.lloyd_max import CodebookCodec
from tq.engine.quantize.packed import ArrayLayout, PackedTensor
from tq.engine.quantize.rotation import random_signs, rotate, unrotate
from tq.engine.quantize.spec import QuantSpec
from tq.errors import TQError


class Codec(Protocol):
    def layout(self, spec: QuantSpec, shape: tuple[int, ...]) -> dict[str, ArrayLayout]:
        """Name, type and shape of each array that one matrix stores."""

    def shared(self, spec: QuantSpec, in_features: int) -> dict[str, mx.array]:
        """Arrays that all matrices of a spec and an input dimension share."""

    def encode(self, rotated: np.ndarray, spec: QuantSpec, factor: np.ndarray | None) -> dict[str, mx.array]:
        """The stored arrays of float32 (rows, in_features), with error feedback by a ``feedback_factor`` if given."""

    def decode(self, packed: PackedTensor, dtype: mx.Dtype) -> mx.array:
        """The matrix in the rotated basis."""


CODECS: dict[str, Codec] = {
    "lloyd-max": CodebookCodec(),
    "ternary": CodebookCodec(),
    "affine": AffineCodec(),
}
# Values encoded at a time: bounds the float32 copies that encoding makes of a large matrix to some 100 MB.
ENCODE_VALUES = 1 << 23
LARGEST = 65504.0  # of float16, in which scales are stored


def layout(spec: QuantSpec, shape: tuple[int, ...]) -> dict[str, ArrayLayout]:
    """The arrays that a matrix of ``shape`` (..., out, in) stores: exact sizes, before any work is done."""
    return CODECS[spec.codec].layout(spec, shape)


def shared_arrays(spec: QuantSpec, in_features: int) -> dict[str, mx.array]:
    """``codebook`` and ``signs``, as the spec needs them: the same for all matrices with these inputs."""
    arrays = CODECS[spec.codec].shared(spec, in_features)
    if spec.rotation == "hadamard":
        arrays["signs"] = mx.array(random_signs(in_features)).astype(mx.float16)
    return arrays


def encode(weight: mx.array, spec: QuantSpec, moments: np.ndarray | Feedback | None = None) -> PackedTensor:
    """Quantize one matrix.

    Args:
        weight: (..., out, in), any float type.
        spec: How.
        moments: Second moments E[x x^T] of the un-rotated inputs, float (in, in): with them, the error of each
            column is fed back into the columns to come (GPTQ, LDLQ). Matrices with leading axes share them. A
            ``Feedback`` in their place is for several matrices that read one activation.

    Raises:
        UsageError: The group size does not divide the input features.
        TQError: The weight holds values that are not finite, or beyond float16.
        ValueError: ``moments`` is not a finite positive semi-definite (in, in) matrix.
    """
    n = weight.shape[-1]
    spec.n_groups(n)
    shared = shared_arrays(spec, n)
    signs = shared.get("signs")
    factor = None
    if moments is not None:
        feedback = moments if isinstance(moments, Feedback) else Feedback(moments)
        if feedback.moments.shape != (n, n):
            raise ValueError(f"second moments of {n} inputs have the shape {feedback.moments.shape}")
        factor = feedback.factor(None if signs is None else np.array(signs.astype(mx.float32)))
    rows = weight.reshape(-1, n)
    step = max(1, ENCODE_VALUES // n)
    parts = []
    for start in range(0, rows.shape[0], step):
        block = rows[start : start + step].astype(mx.float32)
        if signs is not None:
            block = rotate(block, signs)
        values = np.array(block)
        _check_range(values)
        parts.append(CODECS[spec.codec].encode(values, spec, factor))
        mx.eval(parts[-1])
    stored = {
        name: mx.concatenate([p[name] for p in parts]).reshape(array.shape)
        for name, array in layout(spec, weight.shape).items()
    }
    return PackedTensor(spec, tuple(weight.shape), stored | shared)


def _check_range(values: np.ndarray) -> None:
    largest = max(values.max(), -values.min())  # NaN if any value is NaN
    if not largest <= LARGEST:
        found = f"values up to {largest:.3g}, beyond float16" if np.isfinite(largest) else "NaN or infinite values"
        raise TQError(f"the weight holds {found}", "the source may be damaged: download it again")


def decode_rotated(packed: PackedTensor, dtype: mx.Dtype = mx.float32) -> mx.array:
    """The dense matrix in the basis in which it is stored, (..., out, in): multiply it with rotated activations."""
    if packed.prepared is not None:
        return packed.prepared.decode().astype(dtype)
    return CODECS[packed.spec.codec].decode(packed, dtype)


def decode(packed: PackedTensor, dtype: mx.Dtype = mx.float32) -> mx.array:
    """The dense matrix in the basis of the model, (..., out, in)."""
    dense = decode_rotated(packed, dtype)
    if packed.spec.rotation == "hadamard":
        dense = unrotate(dense, packed.arrays["signs"])
    return dense
