"""tq's own Metal kernels (tq/metal), on matrices as they are stored. See docs/kernels.md.

A kernel that failed its check on this device is switched off: ``supports`` then gives that as the reason.
"""

import mlx.core as mx

from tq.engine.ops import reference
from tq.engine.quantize import PackedTensor, QuantSpec
from tq.engine.quantize import rotation as plain
from tq.engine.quantize.spec import FOREIGN_GROUP_SIZE
from tq.metal import embed as embed_kernel
from tq.metal import experts
from tq.metal import matmul as matmul_kernel
from tq.metal import matvec as matvec_kernel
from tq.metal import rotate as rotation_kernel

name = "metal"

DTYPES = (mx.float16, mx.bfloat16, mx.float32)
# Kernels that gave wrong results on this device, and what they did.
switched_off: dict[tuple[str, QuantSpec | int], str] = {}


def unavailable() -> str | None:
    """None, or the reason why no operation runs here."""
    if not mx.metal.is_available():
        return "there is no Metal GPU"
    if mx.default_device() != mx.Device(mx.gpu):
        return "the CPU is the device that runs models"
    return None


def supports(op: str, packed: PackedTensor, dtype: mx.Dtype) -> str | None:
    """None, or the reason why the kernels cannot run ``op`` on ``packed``."""
    reason = unavailable()
    if reason is not None:
        return reason
    spec = packed.spec
    if spec.codec == "affine":
        return "MLX has kernels of its own for affine codes"
    if spec.qjl:
        return "there is no kernel for qjl"
    if spec.group_size == FOREIGN_GROUP_SIZE:
        return f"there is no kernel for groups of {FOREIGN_GROUP_SIZE}"
    if packed.decoded is not None:
        return "the weights are already decoded"
    if dtype not in DTYPES:
        return f"there is no kernel for {dtype} activations"
    return switched_off.get((op, spec))


def matmul(x: mx.array, packed: PackedTensor, transpose: bool = True, bias: mx.array | None = None) -> mx.array:
    if not transpose:
        # No layer does this while it generates: mlx-lm's latent attention does, for a prompt.
        return reference.matmul(x, packed, transpose, bias)
    if len(packed.shape) > 2:
        return reference.add_bias(_per_head(x, packed), bias)
    rows = x.reshape(-1, x.shape[-1])
    multiply = matvec_kernel.matvec if rows.shape[0] <= matvec_kernel.MOST_ROWS else matmul_kernel.matmul
    return multiply(rows, *stored(packed), bias).reshape(*x.shape[:-1], packed.shape[0])


def gather_matmul(
    x: mx.array,
    packed: PackedTensor,
    indices: mx.array,
    sorted_indices: bool = False,
    bias: mx.array | None = None,
) -> mx.array:
    x, indices = reference.in_pairs(x, indices)
    rows, ids = x.reshape(-1, x.shape[-1]), _flat(indices)
    weight, scales, codebook, bits, group_size = stored(packed)
    of = packed.shape[0]
    y = experts.gather(rows, weight, scales, codebook, ids, bits, group_size, bias, None, sorted_indices, of)
    return y.reshape(*indices.shape, 1, packed.shape[1])


def embed(ids: mx.array, packed: PackedTensor, dtype: mx.Dtype) -> mx.array:
    rows = embed_kernel.embed(_flat(ids), *stored(packed), packed.in_features, dtype)
    return rows.reshape(*ids.shape, packed.in_features)


def rotates(n: int, dtype: mx.Dtype) -> bool:
    """Whether the kernel rotates ``n`` features of this type here."""
    if unavailable() is not None or dtype not in DTYPES or ("rotate", n) in switched_off:
        return False
    return rotation_kernel.declines(n) is None


def rotate(x: mx.array, signs: mx.array) -> mx.array:
    """As ``rotation.rotate`` of tq.engine.quantize."""
    return rotation_kernel.rotate(x.reshape(-1, x.shape[-1]), signs, _block(x)).reshape(x.shape)


def unrotate(y: mx.array, signs: mx.array) -> mx.array:
    """As ``rotation.unrotate`` of tq.engine.quantize."""
    return rotation_kernel.unrotate(y.reshape(-1, y.shape[-1]), signs, _block(y)).reshape(y.shape)


def stored(packed: PackedTensor) -> tuple[mx.array, mx.array, mx.array, int, int]:
    """What a launcher wants of a matrix: codes, scales, codebook, bits, group size."""
    arrays = packed.arrays
    return arrays["weight"], arrays["scales"], arrays["codebook"], packed.spec.bits, packed.spec.group_size


def _block(x: mx.array) -> int:
    return plain.hadamard_block(x.shape[-1])


def _per_head(x: mx.array, packed: PackedTensor) -> mx.array:
    """x (..., heads, L, in) times the transposed matrix of each head; one x may serve all heads."""
    heads = packed.shape[0]
    *batch, x_heads, length, _ = x.shape if x.ndim > 2 else (1, *x.shape)
    x = mx.broadcast_to(x, (*batch, heads, length, x.shape[-1])) if x_heads != heads else x
    expert = mx.broadcast_to(mx.arange(heads, dtype=mx.uint32)[:, None], (*batch, heads, length))
    return gather_matmul(x[..., None, :], packed, expert, length > 1).squeeze(-2)


def _flat(indices: mx.array) -> mx.array:
    return indices.reshape(-1).astype(mx.uint32)


def gate_up(
    x: mx.array,
    gate: PackedTensor,
    up: PackedTensor,
    indices: mx.array,
    activation: experts.Activation,
    gate_bias: mx.array | None = None,
    up_bias: mx.array | None = None,
    alpha: float = 1.0,
    limit: float = 0.0,
) -> mx.array:
    """act(x @ gate[e]^T, x @ up[e]^T) for the experts of each token, for few of them.

    Args:
        x: (..., in), rotated.
        gate, up: (experts, hidden, in), of one spec.
        indices: (..., k).
        activation, alpha, limit: See tq/metal/experts.py.

    Returns:
        (..., k, 1, hidden).
    """
    rows, spec = x.reshape(-1, x.shape[-1]), gate.spec
    hidden = experts.gate_up(
        rows, stored(gate)[:3], stored(up)[:3], _flat(indices), spec.bits, spec.group_size, activation, alpha, limit,
        gate_bias, up_bias,
    )  # fmt: skip
    return hidden.reshape(*indices.shape, 1, gate.shape[1])
