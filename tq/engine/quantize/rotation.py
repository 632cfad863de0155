"""Randomized Hadamard rotation of input features: y = H (signs * x), in blocks where the dimension needs them."""

from functools import lru_cache

import mlx.core as mx
import numpy as np

HADAMARD_FACTORS = (1, 12, 20, 28)  # mx.hadamard_transform takes sizes m * 2^k
MAX_POWER_OF_TWO = 8192  # the largest 2^k that MLX's Metal kernel takes in float32


@lru_cache
def hadamard_block(n: int) -> int:
    """The largest m*2^k (m in 1, 12, 20, 28) that divides ``n``: the block in which ``n`` features are rotated."""
    power = min(n & -n, MAX_POWER_OF_TWO)  # the largest power of two in n
    best = power
    for m in HADAMARD_FACTORS[1:]:
        if n % m == 0:
            rest = n // m
            best = max(best, m * min(rest & -rest, MAX_POWER_OF_TWO))
    return best


@lru_cache
def random_signs(n: int, seed: int = 0) -> np.ndarray:
    """The +-1 signs of a dimension, float32 (n,): bits of a PCG64 stream, whose raw output NumPy keeps stable.

    All matrices with ``n`` input features share them, so that q, k and v (gate and up, all experts) read one rotated
    activation.
    """
    raw = np.random.PCG64([seed, n]).random_raw(-(-n // 64)).astype("<u8")
    bits = np.unpackbits(raw.view(np.uint8), bitorder="little")[:n]
    signs = 1 - 2 * bits.astype(np.float32)
    signs.setflags(write=False)
    return signs


@lru_cache
def transposed_hadamard(m: int) -> np.ndarray:
    """H_m^T for m = 12, 20, 28, orthonormal: the rows of an identity, transformed, are the columns of H_m.

    On the CPU, because MLX's Metal kernel fails for these sizes in releases before mlx pull request 4054.
    """
    with mx.stream(mx.cpu):
        return np.array(mx.hadamard_transform(mx.eye(m)))


def rotate(x: mx.array, signs: mx.array) -> mx.array:
    """y = H (signs * x) along the last axis. x: (..., n), signs: (n,); the type of ``x`` is kept."""
    x = x * signs.astype(x.dtype)
    n = x.shape[-1]
    block = hadamard_block(n)
    if block == 1:
        return x
    blocks = x if block == n else x.reshape(*x.shape[:-1], n // block, block)
    if block in HADAMARD_FACTORS:
        y = blocks @ mx.array(transposed_hadamard(block)).astype(x.dtype)
    else:
        y = mx.hadamard_transform(blocks)
    return y.reshape(x.shape)


def unrotate(y: mx.array, signs: mx.array) -> mx.array:
    """The inverse of ``rotate``: x = signs * (H^T y). y: (..., n).

    H_20 and H_28 are not symmetric, so the transform is not its own inverse: the power-of-two part is, and the small
    factor is applied transposed.
    """
    n = y.shape[-1]
    block = hadamard_block(n)
    m = next((f for f in HADAMARD_FACTORS[1:] if block % f == 0 and (block // f) & (block // f - 1) == 0), 1)
    x = y
    if block > 1:
        x = x.reshape(*y.shape[:-1], n // block, m, block // m)
        if block // m > 1:
            x = mx.hadamard_transform(x)
        if m > 1:
            x = mx.array(transposed_hadamard(m)).astype(y.dtype) @ x
        x = x.reshape(y.shape)
    return x * signs.astype(y.dtype)
