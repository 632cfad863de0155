"""MLX's own kernels for its own layout: the affine codec on ``mx.quantized_matmul`` and its relatives."""

import mlx.core as mx

from tq.engine.ops.reference import add_bias, expert_bias
from tq.engine.quantize import PackedTensor

name = "mlx"


def supports(op: str, packed: PackedTensor, dtype: mx.Dtype) -> str | None:
    """None, or the reason why MLX cannot run ``op`` on ``packed``."""
    if packed.spec.codec != "affine":
        return f"MLX has no kernel for {packed.spec.codec} codes"
    if packed.decoded is not None:
        return "the weights are already decoded"
    return None


def _stored(packed: PackedTensor, dtype: mx.Dtype) -> tuple[mx.array, mx.array, mx.array]:
    arrays = packed.arrays
    # MLX promotes to the widest type of x, scales and biases: keep the activation's.
    return arrays["weight"], arrays["scales"].astype(dtype), arrays["biases"].astype(dtype)


def matmul(x: mx.array, packed: PackedTensor, transpose: bool = True, bias: mx.array | None = None) -> mx.array:
    spec = packed.spec
    y = mx.quantized_matmul(
        x, *_stored(packed, x.dtype), transpose=transpose, group_size=spec.group_size, bits=spec.bits
    )
    return add_bias(y, bias)


def gather_matmul(
    x: mx.array,
    packed: PackedTensor,
    indices: mx.array,
    sorted_indices: bool = False,
    bias: mx.array | None = None,
) -> mx.array:
    spec = packed.spec
    y = mx.gather_qmm(
        x,
        *_stored(packed, x.dtype),
        rhs_indices=indices,
        transpose=True,
        group_size=spec.group_size,
        bits=spec.bits,
        sorted_indices=sorted_indices,
    )
    return add_bias(y, expert_bias(bias, indices))


def embed(ids: mx.array, packed: PackedTensor, dtype: mx.Dtype) -> mx.array:
    spec = packed.spec
    ids = ids[..., None]  # mx.dequantize wants two axes
    weight, scales, biases = (packed.arrays[name][ids] for name in ("weight", "scales", "biases"))
    rows = mx.dequantize(weight, scales.astype(dtype), biases.astype(dtype), spec.group_size, spec.bits)
    return rows.squeeze(-2)
