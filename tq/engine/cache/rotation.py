"""The orthonormal matrices that head vectors are multiplied by: Hadamard where one fits the dimension, else random.

Head vectors are short, so a dense matrix costs little, and dimensions such as 120 or 33, in which Hadamard blocks are
smaller than the vector, are mixed as well as others.
"""

from functools import lru_cache

import mlx.core as mx
import numpy as np

from tq.engine.quantize.rotation import hadamard_block, random_signs, rotate


@lru_cache
def rotation(dim: int, seed: int = 0) -> mx.array:
    """An orthonormal float32 (dim, dim): x @ rotation(dim).T is x in the basis of the codes."""
    if hadamard_block(dim) != dim:
        return mx.array(_random_orthonormal(dim, seed))
    signs = mx.array(random_signs(dim, seed))
    with mx.stream(mx.cpu):
        matrix = rotate(mx.eye(dim), signs).T
        mx.eval(matrix)
    return matrix


@lru_cache
def gaussian(dim: int, seed: int) -> mx.array:
    """Independent standard normals, float32 (dim, dim): the projection of QJL."""
    return mx.array(_normals(dim * dim, seed).reshape(dim, dim).astype(np.float32))


def _random_orthonormal(dim: int, seed: int) -> np.ndarray:
    """Uniform over all of them: the Q of a Gaussian matrix, with the signs that make it unique."""
    q, r = np.linalg.qr(_normals(dim * dim, seed).reshape(dim, dim))
    return (q * np.where(np.diag(r) < 0, -1, 1)).astype(np.float32)


def _normals(n: int, seed: int) -> np.ndarray:
    """Standard normals from raw bits, which NumPy keeps stable, unlike its distributions (Box and Muller 1958)."""
    raw = np.random.PCG64([seed, n]).random_raw(2 * n) >> np.uint64(11)
    uniform = (raw.astype(np.float64) + 0.5) / 2**53
    return np.sqrt(-2 * np.log(uniform[:n])) * np.cos(2 * np.pi * uniform[n:])
