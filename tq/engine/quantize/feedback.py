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
# Columns updated one by one before the rest of their span is updated by one matrix product, and columns of a span,
# after which all the rest is: with spans, 4096 x 4096 weights take a fifth less time.
COLUMNS, SPAN = 64, 512

Params = tuple[np.ndarray, ...]
Fit = Callable[[np.ndarray], Params]  # (rows, group) -> per-row parameters of the group
Quantize = Callable[[np.ndarray, Params], tuple[np.ndarray, np.ndarray]]  # (rows,) -> codes, values


class Feedback:
    """The second moments of one activation. What is derived from them is computed once for all matrices that read it.

    Args:
        moments: E[x x^T] of the un-rotated inputs, float (n, n).
    """

    def __init__(self, moments: np.ndarray):
        self.moments = moments
        self._factors: dict[bool, np.ndarray] = {}

    def factor(self, signs: np.ndarray | None) -> np.ndarray:
        """The ``feedback_factor`` in the basis of the rotation with these signs, which are a function of n; None: none.

        Raises:
            ValueError: The moments are not a finite positive semi-definite matrix.
        """
        rotated = signs is not None
        if rotated not in self._factors:
            moments = self.moments if signs is None else rotate_moments(self.moments, signs)
            self._factors[rotated] = feedback_factor(moments)
        return self._factors[rotated]


def rotate_moments(moments: np.ndarray, signs: np.ndarray) -> np.ndarray:
    """R H R^T for the rotation R of ``rotation.rotate``, float32. moments: (n, n) of un-rotated inputs."""
    with mx.stream(mx.cpu):
        half = rotate(mx.array(moments.astype(np.float32)), mx.array(signs))
        return np.array(rotate(half.T, mx.array(signs)))


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
    del h  # in float64, that of 14336 inputs has 1.6 GB
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
        group_size: Columns that share parameters: a divisor of COLUMNS, a multiple of it that divides SPAN, or n.
        fit: Chooses a group's parameters from its weights as they are when the group is reached.
        quantize: One column and its parameters to codes and values.

    Returns:
        Parameters of each group in order, and uint8 codes (rows, n).
    """
    rows, n = weight.shape
    w = np.ascontiguousarray(weight.T)  # columns become contiguous
    codes = np.empty((n, rows), np.uint8)
    params: list[Params] = []
    errors = np.empty((SPAN, rows), np.float32)
    for first in range(0, n, SPAN):
        last = min(first + SPAN, n)
        for start in range(first, last, COLUMNS):
            stop = min(start + COLUMNS, last)
            applied = start  # columns before this one have given their errors to the rest of the block
            for j in range(start, stop):
                if j % group_size == 0:
                    if applied < j:
                        w[j:stop] -= factor[applied:j, j:stop].T @ errors[applied - first : j - first]
                        applied = j
                    # All earlier errors have reached the group: it ends in this block, or starts with it.
                    params.append(fit(np.ascontiguousarray(w[j : j + group_size].T)))
                # A column takes the errors of those before it at once, which moves a third of the memory that each
                # column giving its error to those after it would.
                column = w[j] - factor[applied:j, j] @ errors[applied - first : j - first]
                codes[j], values = quantize(column, params[-1])
                errors[j - first] = (column - values) / factor[j, j]
            w[stop:last] -= factor[start:stop, stop:last].T @ errors[start - first : stop - first]
        w[last:] -= factor[first:last, last:].T @ errors[: last - first]
    return params, codes.T
