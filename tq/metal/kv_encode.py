"""Launches kv_encode.metal: packs new keys or values for the cache."""

from functools import lru_cache

import mlx.core as mx

from tq.metal.attend import FLOATS, Codes
from tq.metal.kernel import Kernel, Launch

KERNEL = Kernel("kv_encode", ("x", "rotation", "codebook"), ("words", "scales"))
SIMD_GROUPS = 4  # as in kv_encode.metal
MOST_NUMBERS = 512  # of a vector
# Of the vectors that a SIMD-group packs at once, so that they fit into registers.
REGISTER_NUMBERS = 512


def declines(dtype: mx.Dtype, codes: Codes) -> str | None:
    """Why the kernel cannot pack such vectors, if so."""
    if dtype not in FLOATS:
        return f"activations are {dtype}"
    if not 1 <= codes.bits <= 8:
        return f"{codes.bits} bits"
    if codes.dim > MOST_NUMBERS:
        return f"vectors of {codes.dim} numbers, more than {MOST_NUMBERS}"
    if codes.group_size % 32 or (codes.group_size and codes.dim % codes.group_size):
        return f"groups of {codes.group_size} in vectors of {codes.dim} numbers"
    return None


def encode(x: mx.array, codes: Codes) -> tuple[mx.array, mx.array]:
    """Pack vectors. x: (B, heads, n, dim).

    Returns:
        Codes, uint32 (B, heads, n, words), and scales, float16 (B, heads, n, groups), as the codec lloyd-max has them.
        A number that lies between two levels may get the other one, where its rotation is rounded in another order.
    """
    B, heads, n, dim = x.shape
    vectors = min(4, max(REGISTER_NUMBERS // dim, 1))
    blocks = -(-B * heads * n // (SIMD_GROUPS * vectors))
    groups = dim // codes.group_size if codes.group_size else 1
    launch = Launch(
        {"BITS": codes.bits, "DIM": dim, "GROUP": codes.group_size, "VECTORS": vectors},
        grid=(blocks * SIMD_GROUPS * 32, 1, 1),
        threadgroup=(SIMD_GROUPS * 32, 1, 1),
        outputs=[((B, heads, n, -(-dim * codes.bits // 32)), mx.uint32), ((B, heads, n, groups), mx.float16)],
    )
    words, scales = KERNEL([x, _transposed(codes.rotation), codes.codebook], launch)
    return words, scales


@lru_cache(maxsize=256)
def _transposed(rotation: mx.array) -> mx.array:
    return mx.contiguous(rotation.T)
