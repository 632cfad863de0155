"""The optional second stage: one sign per weight of a random projection of the residual (QJL, arXiv 2406.03482).

For a residual r of n values and the orthonormal projection S = H diag(s), the estimate

    r_hat = sqrt(pi / (2 n)) * |r| * S^T sign(S r)

has E[<r_hat, x>] = <r, x> for every x, over the signs s (TurboQuant_prod, section 3.2). The paper's projection is
Gaussian, where this is exact; here it holds as far as S r looks Gaussian: for a residual spread over many values, which
rounding errors are, and for n that are rotated in one block (``rotation.hadamard_block``). Smaller blocks would each
need a norm of their own. The estimate is linear in x, so it can be added to the decoded matrix. It is unbiased, not
better: its variance is why it is not the default.
"""

import math

import mlx.core as mx
import numpy as np

from tq.engine.quantize import packing
from tq.engine.quantize.packed import ArrayLayout
from tq.engine.quantize.rotation import random_signs, rotate, unrotate

SEED = 1  # another sign vector than the rotation's


def layout(shape: tuple[int, ...]) -> dict[str, ArrayLayout]:
    *rows, n = shape
    return {
        "qjl_packed": ArrayLayout(mx.uint32, (*rows, packing.words_per_row(n, 1))),
        "qjl_norms": ArrayLayout(mx.float16, tuple(rows)),
    }


def shared(n: int) -> dict[str, mx.array]:
    return {"qjl_signs": mx.array(random_signs(n, SEED)).astype(mx.float16)}


def encode(residual: np.ndarray) -> dict[str, mx.array]:
    """residual: float32 (rows, n), in the rotated basis."""
    projected = np.array(rotate(mx.array(residual), mx.array(random_signs(residual.shape[1], SEED))))
    norms = np.linalg.norm(residual, axis=1).astype(np.float16)
    return {
        "qjl_packed": mx.array(packing.pack((projected >= 0).astype(np.uint8), 1)),
        "qjl_norms": mx.array(norms),
    }


def decode(arrays: dict[str, mx.array], n: int, dtype: mx.Dtype) -> mx.array:
    """The estimate of the residual in the rotated basis, (..., n)."""
    signs = packing.unpack(arrays["qjl_packed"], 1, n).astype(dtype) * 2 - 1
    scale = arrays["qjl_norms"].astype(dtype)[..., None] * math.sqrt(math.pi / (2 * n))
    return unrotate(signs, arrays["qjl_signs"]) * scale
