"""How a kernel turns codes into values: the cheapest odd function that is exact enough, or a table.

A table costs a shift, a mask and a load from threadgroup memory for each weight. A polynomial in the centred code
u, from -1 to 1, costs a multiply-add per degree (codes.metal), and Lloyd-Max levels are a smooth odd function of u:
with n positive levels, degree n - 1 in u^2 meets all, and lower degrees come close. For the 4 positive levels of 3
bits, v + |v|^3 v comes close too, in two instructions; it was found by trying all such short programs. (For 4 bits it
does not, but such levels, with v = 13/16 u, quantize normal weights with only 0.6 % more error than Lloyd-Max's.)
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import mlx.core as mx
import numpy as np

FROM_TABLE, QUARTIC = 15, 16  # as in codes.metal
MOST_TERMS = 7
# Of v, in 32nds of u: those that codes.metal computes exactly, by bits.
LENGTHS = {3: range(1, 32), 4: range(2, 32, 2)}
# Above this degree a table is as cheap, by Apple's cycles: a multiply-add 1, a shift and mask 4, a load 4 to 8. For 8
# bits it is all there is: a code and the half in its centre do not fit under the exponent (codes.metal).
MOST_DEGREE = 5
# Relative RMS error of the fitted levels. Results are promised to 2e-3 for half activations, to 1e-5 for float. (The
# levels' own distance from the weights is 0.1 at 4 bits, 0.19 at 3.)
HALF_ERROR, FLOAT_ERROR = 1.7e-3, 1e-6


@dataclass(frozen=True)
class Decoding:
    """What codes.metal is given of a codebook.

    Attributes:
        form: Degree of the polynomial in u^2, FROM_TABLE, or QUARTIC + the length of v.
        levels: float32, at least 8: gain, terms of the polynomial and 2^23; or the table.
        error: Relative RMS error of the fit, levels weighted as often as they occur among normal weights.
    """

    form: int
    levels: mx.array
    error: float

    @property
    def table_size(self) -> int:
        """Elements of the table in threadgroup memory. (Metal has no arrays of none.)"""
        return self.levels.size if self.form == FROM_TABLE else 1


@lru_cache(maxsize=1 << 14)
def decoding(codebook: mx.array, bits: int, dtype: mx.Dtype, half_error: float = HALF_ERROR) -> Decoding:
    """How activations of ``dtype`` are multiplied with codes. codebook: (2^bits,), or (3,) of trits with bits 0.

    The codebook's values are read once, and MLX waits for them: arrays are told apart by identity, a model keeps few.
    """
    with mx.stream(mx.cpu):
        levels = np.array(codebook.astype(mx.float32), np.float64)
    tolerance = FLOAT_ERROR if dtype == mx.float32 else half_error
    for form in _forms(bits):
        numbers = fit(levels, form)
        error = relative_error(levels, evaluate(numbers, form, len(levels)))
        if error <= tolerance:
            unused = np.zeros(1 + MOST_TERMS - len(numbers), np.float32)
            return Decoding(form, mx.array(np.concatenate([numbers, unused, np.array([2**23], np.float32)])), error)
    table = np.pad(levels.astype(np.float32), (0, max(0, 8 - len(levels))))
    return Decoding(FROM_TABLE, mx.array(table), 0.0)


def _forms(bits: int) -> Iterator[int]:
    """What to try for codes of a width, the cheapest first."""
    if bits == 8:
        return
    positive_levels = 2 ** (bits - 1) if bits else 1
    for degree in range(min(MOST_DEGREE + 1, positive_levels)):
        if degree == 2:
            yield from (QUARTIC + length for length in LENGTHS.get(bits, ()))
        yield degree


def fit(levels: np.ndarray, form: int) -> np.ndarray:
    """Gain and terms, float32, with which a form comes nearest to the levels: see ``level_of`` in codes.metal.

    gain * u * (y^n + terms[1] y^(n-2) + ... + terms[n-1]) with y = u^2 + terms[0], n the degree.
    """
    u = _centred(len(levels))
    weight = np.sqrt(_frequency(levels))
    if form >= QUARTIC:
        shape = evaluate(np.ones(1, np.float32), form, len(levels)) * weight
        return np.array([shape @ (levels * weight) / (shape @ shape)], np.float32)
    columns = u[:, None] * (u[:, None] ** 2) ** np.arange(form + 1)
    coefficients = np.linalg.lstsq(columns * weight[:, None], levels * weight, rcond=None)[0]
    gain = coefficients[-1] or 1e-30  # levels of which a lower degree meets all
    if form == 0:
        return np.array([gain], np.float32)
    shift = coefficients[-2] / gain / form
    shifted = np.polynomial.Polynomial(coefficients / gain)(np.polynomial.Polynomial([-shift, 1.0])).coef
    # The highest power first, without y^n and y^(n-1), whose coefficients are 1 and 0.
    return np.array([gain, shift, *shifted[:-2][::-1]], np.float32)


def evaluate(numbers: np.ndarray, form: int, n_levels: int) -> np.ndarray:
    """The levels as codes.metal computes them, rounding included; float32 (n_levels,)."""
    u = _centred(n_levels).astype(np.float32)
    if form == 0:
        return numbers[0] * u
    if form >= QUARTIC:
        v = u * np.float32((form - QUARTIC) / 32)
        square = v * np.abs(v)
        return numbers[0] * (square * np.abs(square) + v)
    y = u * u + numbers[1]
    p = y
    for i in range(1, form):
        p = p * y + numbers[1 + i]
    return numbers[0] * (u * p)


def relative_error(levels: np.ndarray, fitted: np.ndarray) -> float:
    """RMS of the difference by the RMS of the levels, weighted as often as normal weights have each level."""
    frequency = _frequency(levels)
    power = np.sum(frequency * levels**2)
    return float(np.sqrt(np.sum(frequency * (fitted - levels) ** 2) / power)) if power else 0.0


def _centred(n_levels: int) -> np.ndarray:
    """u of each code, as codes.metal has it: (2 code + 1) / n - 1, or -1, 0, 1 of a trit."""
    codes = np.arange(n_levels)
    return codes - 1.0 if n_levels == 3 else (2 * codes + 1) / n_levels - 1


def _frequency(levels: np.ndarray) -> np.ndarray:
    """About how often N(0, 1) is nearest to each level, which holds for codebooks of the standard normal."""
    density = np.exp(-(levels**2) / 2) * np.abs(np.gradient(levels))
    return density / density.sum() if density.sum() > 0 else np.full(len(levels), 1 / len(levels))
