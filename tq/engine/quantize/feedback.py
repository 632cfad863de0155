"""Error feedback: quantize column by column and push each error into the columns to come.

GPTQ (Frantar et al. 2022, arXiv 2210.17323) and LDLQ (Chee et al. 2023, QuIP) are this one algorithm. With second
moments H = E[x x^T] of the inputs it lowers tr((W - Q) H (W - Q)^T), the error of the outputs, where plain rounding
lowers |W - Q|^2. Collecting H is calibration's work, not this file's.
"""

from collections.abc import Callable

import mlx.core as mx
import numpy as np

from tq.engine.quantize.rotation import rotate

DAMPING = 0.01  # of the mean diagonal, as GPTQ: keeps H invertible when inputs are few or dead
COLUMNS = 64  # columns updated one by one before the rest is updated by one matrix product

Params = tuple[np.ndarray, ...]
Fit = Callable[[np.ndarray], Params]  # (rows, group) -> per-row parameters of the group
Quantize = Callable[[np.ndarray, Params], tuple[np.ndarray, np.ndarray]]  # (rows,) -> codes, values


def rotate_moments(moments: np.ndarray, signs: np.ndarray) -> np.ndarray:
    """R H R^T for the rotation R of ``rotation.rotate``. moments: (n, n) of un-rotated inputs."""
    with mx.stream(mx.cpu):
        half = rotate(mx.array(moments.astype(np.float32)), mx.array(signs))
        return np.array(rotate(half.T, mx.array(signs)), dtype=np.float64)


def feedback_factor(moments: np.ndarray) -> np.ndarray:
    """U, float32, upper triangular with U^T U = (H + damping)^-1: row j tells where the error of column j goes.

    Raises:
        ValueError: ``moments`` is not a finite positive semi-definite (n, n) matrix.
    """
    h = np.array(moments, dtype=np.float64)
    if h.ndim != 2 or h.shape[0] != h.shape[1] or not np.isfinite(h).all():
        raise ValueError("second moments must be a finite square matrix")
    if not h.any():
        return np.eye(len(h), dtype=np.float32)  # inputs were never seen: no direction is worth more than another
    h[np.diag_indices_from(h)] += DAMPING * np.trace(h) / len(h)
    try:
        # Cholesky of the flipped matrix gives H = R R^T with R upper, so H^-1 = (R^-1)^T R^-1 without inverting H.
        r = np.linalg.cholesky(h[::-1, ::-1])[::-1, ::-1]
    except np.linalg.LinAlgError as error:
        raise ValueError("second moments must be positive semi-definite") from error
    return _inverse_upper(r).astype(np.float32)


def _inverse_upper(r: np.ndarray) -> np.ndarray:
    """The inverse of an upper triangular matrix, by halves: a quarter of the work of np.linalg.inv."""
    n = len(r)
    if n <= 128:
        return np.triu(np.linalg.inv(r))
    half = n // 2
    result = np.zeros_like(r)
    result[:half, :half] = _inverse_upper(r[:half, :half])
    result[half:, half:] = _inverse_upper(r[half:, half:])
    result[:half, half:] = -result[:half, :half] @ r[:half, half:] @ result[half:, half:]
    return result


def quantize_with_feedback(
    weight: np.ndarray, factor: np.ndarray, group_size: int, fit: Fit, quantize: Quantize
) -> tuple[list[Params], np.ndarray]:
    """Quantize ``weight`` (rows, n) with error feedback.

    Args:
        weight: float32 (rows, n), in the basis in which it is stored.
        factor: float32 (n, n), the ``feedback_factor`` of the second moments in the same basis.
        group_size: Columns that share parameters: a divisor or a multiple of COLUMNS, or n.
        fit: Chooses a group's parameters from its weights as they are when the group is reached.
        quantize: One column and its parameters to codes and values.

    Returns:
        Parameters of each group in order, and uint8 codes (rows, n).
    """
    rows, n = weight.shape
    w = np.ascontiguousarray(weight.T)  # columns become contiguous
    codes = np.empty((n, rows), np.uint8)
    params: list[Params] = []
    for start in range(0, n, COLUMNS):
        stop = min(start + COLUMNS, n)
        errors = np.empty((stop - start, rows), np.float32)
        for j in range(start, stop):
            if j % group_size == 0:
                # All earlier errors have reached the group: it ends in this block, or starts with it.
                params.append(fit(np.ascontiguousarray(w[j : j + group_size].T)))
            codes[j], values = quantize(w[j], params[-1])
            errors[j - start] = (w[j] - values) / factor[j, j]
            w[j:stop] -= np.outer(factor[j, j:stop], errors[j - start])
        w[stop:] -= factor[start:stop, stop:].T @ errors
    return params, codes.T
