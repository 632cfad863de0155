"""Lloyd-Max codebooks of the standard normal, computed to convergence. Not the search for a code: see nearest.py."""

import math
from functools import lru_cache
from statistics import NormalDist

import numpy as np


def _phi(x: float) -> float:
    return math.exp(-0.5 * x * x) / math.sqrt(2 * math.pi) if math.isfinite(x) else 0.0


def _mass(a: float, b: float) -> float:
    """P(a < N(0,1) < b) for 0 <= a < b; erfc keeps the digits of far tails."""
    return 0.5 * (math.erfc(a / math.sqrt(2)) - math.erfc(b / math.sqrt(2)))


@lru_cache
def lloyd_max(n_levels: int) -> np.ndarray:
    """The minimum mean-square-error codebook of ``n_levels`` for N(0,1) (Lloyd 1957, Max 1960).

    Each level is the mean of its cell, each boundary the middle of two levels. The positive half is solved by
    Newton's method on ``c_k * mass_k - moment_k = 0``, whose Jacobian is tridiagonal.

    Returns:
        float64 (n_levels,), ascending, antisymmetric.
    """
    half, odd = divmod(n_levels, 2)
    if half == 0:
        return np.zeros(1)
    # High-rate theory: levels are dense as pdf^(1/3), that is as N(0, 3).
    start = NormalDist(0, math.sqrt(3))
    c = np.array([start.inv_cdf((half + odd + k + 0.5) / n_levels) for k in range(half)])
    for step in range(200):
        lower = np.concatenate([[c[0] / 2 if odd else 0.0], (c[1:] + c[:-1]) / 2])
        upper = np.concatenate([lower[1:], [math.inf]])
        mass = np.array([_mass(a, b) for a, b in zip(lower, upper, strict=True)])
        pdf_lower = np.array([_phi(a) for a in lower])
        pdf_upper = np.append(pdf_lower[1:], 0.0)
        centroid = (pdf_lower - pdf_upper) / mass
        if step < 20:  # plain Lloyd steps first: Newton needs a start in its basin
            c = centroid
            continue
        by_lower = -(c - lower) * pdf_lower / 2
        by_upper = np.append((c[:-1] - upper[:-1]) * pdf_upper[:-1] / 2, 0.0)
        jacobian = np.diag(mass + by_lower + by_upper)
        jacobian += np.diag(by_lower[1:], -1) + np.diag(by_upper[:-1], 1)
        if not odd:
            jacobian[0, 0] -= by_lower[0]  # the boundary at 0 does not move with the first level
        delta = np.linalg.solve(jacobian, mass * (c - centroid))
        c = c - delta
        if np.max(np.abs(delta)) < 1e-13:
            break
    return np.concatenate([-c[::-1], np.zeros(odd), c])


@lru_cache
def stored_codebook(codec: str, bits: int) -> np.ndarray:
    """The codebook as files hold it: float32 (n_levels,), each value exact in float16."""
    levels = lloyd_max(3 if codec == "ternary" else 2**bits)
    stored = levels.astype(np.float16).astype(np.float32)
    stored.setflags(write=False)
    return stored


def mean_square_error(codebook: np.ndarray) -> float:
    """Exact E[(x - nearest(x))^2] for x ~ N(0,1) and any ascending codebook."""
    edges = [-math.inf, *((codebook[1:] + codebook[:-1]) / 2), math.inf]

    def cdf(x: float) -> float:
        return 0.5 * math.erfc(-x / math.sqrt(2))

    def x_pdf(x: float) -> float:
        return x * _phi(x) if math.isfinite(x) else 0.0

    total = 0.0
    for level, a, b in zip(map(float, codebook), edges[:-1], edges[1:], strict=True):
        mass = cdf(b) - cdf(a)
        moment = _phi(a) - _phi(b)
        total += mass + x_pdf(a) - x_pdf(b) - 2 * level * moment + level * level * mass
    return total
