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
    """U, upper triangular with U^T U = (H + damping)^-1: row j tells where the error of column j goes.

    Raises:
        ValueError: ``moments`` is not a finite symmetric positive semi-definite (n, n) matrix.
    """
    h = np.array(moments, dtype=np.float64)
    if h.ndim != 2 or h.shape[0] != h.shape[1] or not np.isfinite(h).all():
        raise ValueError("second moments must be a finite square matrix")
    n = len(h)
    mean = float(np.trace(h)) / n
    if mean <= 0:
        return np.eye(n)  # inputs were never seen: no direction is worth more than another
    h[np.diag_indices(n)] += DAMPING * mean
    try:
        # Cholesky of the flipped matrix gives H = R R^T with R upper, so H^-1 = (R^-1)^T R^-1 without inverting H.
        r = np.linalg.cholesky(h[::-1, ::-1])[::-1, ::-1]
    except np.linalg.LinAlgError as error:
        raise ValueError("second moments must be positive semi-definite") from error
    return np.linalg.inv(r)


def quantize_with_feedback(
    weight: np.ndarray, moments: np.ndarray, group_size: int, fit: Fit, quantize: Quantize
) -> tuple[list[Params], np.ndarray]:
    """Quantize ``weight`` (rows, n) with error feedback.

    Args:
        weight: float32 (rows, n), in the basis in which it is stored.
        moments: (n, n) second moments in the same basis.
        group_size: Columns that share parameters; n for whole rows.
        fit: Chooses a group's parameters from its weights as they are when the group is reached.
        quantize: One column and its parameters to codes and values.

    Returns:
        Parameters of each group in order, and uint8 codes (rows, n).
    """
    rows, n = weight.shape
    factor = feedback_factor(moments).astype(np.float32)
    w = np.ascontiguousarray(weight.T)  # columns become contiguous
    codes = np.empty((n, rows), np.uint8)
    params: list[Params] = []
    for start in range(0, n, COLUMNS):
        stop = min(start + COLUMNS, n)
        errors = np.empty((stop - start, rows), np.float32)
        for j in range(start, stop):
            if j % group_size == 0:
                # Errors of this block have reached its own columns only: bring the group's others up to date.
                pending = w[j : j + group_size].copy()
                if stop < j + group_size and j > start:
                    reach = slice(stop, j + group_size)
                    pending[stop - j :] -= factor[start:j, reach].T @ errors[: j - start]
                params.append(fit(np.ascontiguousarray(pending.T)))
            codes[j], values = quantize(w[j], params[-1])
            errors[j - start] = (w[j] - values) / factor[j, j]
            w[j:stop] -= np.outer(factor[j, j:stop], errors[j - start])
        w[stop:] -= factor[start:stop, stop:].T @ errors
    return params, codes.T
