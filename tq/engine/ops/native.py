"""MLX's own kernels for its own layout: the affine codec on ``mx.quantized_matmul`` and ``mx.gather_qmm``."""

import mlx.core as mx

from tq.engine.quantize import PackedTensor

name = "mlx"


def supports(op: str, packed: PackedTensor, dtype: mx.Dtype) -> str | None:
    """None, or the reason why MLX cannot run ``op`` on ``packed``."""
    if packed.spec.codec != "affine":
        return f"MLX has no kernel for {packed.spec.codec} codes"
    if op == "embed":
        return "MLX has no embedding kernel for packed rows"
    if packed.decoded is not None:
        return "the weights are already decoded"
    return None


def _arguments(packed: PackedTensor, dtype: mx.Dtype) -> dict:
    arrays = packed.arrays
    return {
        "w": arrays["weight"],
        # MLX promotes to the widest type of x, scales and biases: keep the activation's.
        "scales": arrays["scales"].astype(dtype),
        "biases": arrays["biases"].astype(dtype),
        "group_size": packed.spec.group_size,
        "bits": packed.spec.bits,
    }


def matmul(x: mx.array, packed: PackedTensor, transpose: bool = True) -> mx.array:
    return mx.quantized_matmul(x, transpose=transpose, **_arguments(packed, x.dtype))


def gather_matmul(x: mx.array, packed: PackedTensor, indices: mx.array, sorted_indices: bool = False) -> mx.array:
    return mx.gather_qmm(
        x, rhs_indices=indices, transpose=True, sorted_indices=sorted_indices, **_arguments(packed, x.dtype)
    )
