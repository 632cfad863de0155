"""What every operation on packed arrays means, in plain mx. Slow, works everywhere, the truth for other backends."""

import mlx.core as mx
import numpy as np

from tq.engine.quantize import PackedTensor, decode_rotated

name = "reference"


def supports(op: str, packed: PackedTensor, dtype: mx.Dtype) -> str | None:
    """None: the reference runs everything."""
    return None


def _dense(packed: PackedTensor, dtype: mx.Dtype) -> mx.array:
    if packed.decoded is not None:
        return packed.decoded.astype(dtype)
    return decode_rotated(packed, dtype)


def matmul(x: mx.array, packed: PackedTensor, transpose: bool = True, bias: mx.array | None = None) -> mx.array:
    """x @ W^T + bias with x (..., in) rotated, or x @ W with x (..., out). W: (out, in) or (heads, out, in)."""
    w = _dense(packed, x.dtype)
    return add_bias(x @ (w.swapaxes(-1, -2) if transpose else w), bias)


def gather_matmul(
    x: mx.array,
    packed: PackedTensor,
    indices: mx.array,
    sorted_indices: bool = False,
    bias: mx.array | None = None,
) -> mx.array:
    """x @ W[e]^T + bias[e] for the expert e of each row, as ``mx.gather_mm``.

    x: (..., 1, in) rotated, indices: (...), bias: (experts, out).
    """
    chosen_bias = expert_bias(bias, indices)
    n_experts = packed.shape[0]
    if packed.decoded is None and indices.size < n_experts:
        # Few tokens: decode only the experts that they chose.
        stored = {k: packed.arrays[k][indices.flatten()] for k in packed.per_matrix_arrays}
        chosen = PackedTensor(packed.spec, (indices.size, *packed.shape[1:]), packed.arrays | stored)
        w = decode_rotated(chosen, x.dtype)
        indices, sorted_indices = mx.arange(indices.size).reshape(indices.shape), False
    else:
        w = _dense(packed, x.dtype)
    y = mx.gather_mm(x, w.swapaxes(-1, -2), rhs_indices=indices, sorted_indices=sorted_indices)
    return add_bias(y, chosen_bias)


def embed(ids: mx.array, packed: PackedTensor, dtype: mx.Dtype) -> mx.array:
    """Rows of W in the rotated basis. ids: (...) -> (..., in)."""
    if packed.decoded is not None:
        return packed.decoded[ids].astype(dtype)
    rows = {k: packed.arrays[k][ids] for k in packed.per_matrix_arrays}
    return decode_rotated(PackedTensor(packed.spec, (*ids.shape, packed.in_features), packed.arrays | rows), dtype)


def add_bias(y: mx.array, bias: mx.array | None) -> mx.array:
    return y if bias is None else y + bias


def expert_bias(bias: mx.array | None, indices: mx.array) -> mx.array | None:
    """The row of each expert, for results of ``gather_matmul``: (..., 1, out)."""
    return None if bias is None else mx.expand_dims(bias[indices], -2)


def in_pairs(x: mx.array, indices: mx.array) -> tuple[mx.array, mx.array]:
    """Inputs of ``gather_matmul`` for kernels that repeat each row of x for consecutive indices.

    Returns:
        indices (*batch), and x (..., 1, in) with the axes of ``batch``, whose trailing ones may be 1.
    """
    batch = np.broadcast_shapes(x.shape[:-2], indices.shape)
    if indices.shape != batch:
        indices = mx.broadcast_to(indices, batch)
    kept = x.ndim - 2
    while kept and x.shape[kept - 1] == 1:
        kept -= 1
    if x.ndim - 2 != len(batch) or x.shape[:kept] != batch[:kept]:
        x = mx.broadcast_to(x, (*batch, *x.shape[-2:]))
    return x, indices
