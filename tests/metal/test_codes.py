"""fit.py: how exactly kernels decode, and that they take a table where no formula is exact enough."""

import mlx.core as mx
import numpy as np
import pytest

from tq.engine.quantize.codebooks import stored_codebook
from tq.metal import fit
from tq.metal.fit import FROM_TABLE, QUARTIC, decoding


def lloyd_max(bits: int) -> mx.array:
    return mx.array(stored_codebook("lloyd-max" if bits else "ternary", bits)).astype(mx.float16)


def evaluated(codebook: mx.array, bits: int, dtype: mx.Dtype) -> np.ndarray:
    """The levels that a kernel uses."""
    decoder = decoding(codebook, bits, dtype)
    numbers = np.array(decoder.levels)
    return (
        numbers[: codebook.size] if decoder.form == FROM_TABLE else fit.evaluate(numbers, decoder.form, codebook.size)
    )


@pytest.mark.parametrize("bits", range(9))
@pytest.mark.parametrize(("dtype", "allowed"), [(mx.float16, 1.7e-3), (mx.bfloat16, 1.7e-3), (mx.float32, 1e-6)])
def test_levels_are_as_exact_as_promised(bits, dtype, allowed):
    levels = np.array(lloyd_max(bits), np.float64)
    # The weights of the error: how much of N(0, 1) is nearest to each level, counted.
    drawn = np.searchsorted((levels[1:] + levels[:-1]) / 2, np.random.default_rng(0).standard_normal(1 << 20))
    frequency = np.bincount(drawn, minlength=len(levels)) / len(drawn)
    difference = evaluated(lloyd_max(bits), bits, dtype) - levels
    error = np.sqrt(frequency @ difference**2 / (frequency @ levels**2))
    # At 6 bits a level in the tail holds a thousandth of the draws.
    assert error < allowed * 1.05


@pytest.mark.parametrize(
    ("bits", "form"), [(0, 0), (1, 0), (2, 1), (3, QUARTIC + 23), (4, 3), (5, 4), (6, 5), (7, FROM_TABLE)]
)
def test_arithmetic_replaces_the_table_for_half_activations(bits, form):
    assert decoding(lloyd_max(bits), bits, mx.float16).form == form


@pytest.mark.parametrize(("bits", "length"), [(3, 21), (4, 26)])
def test_levels_on_the_quartic_curve_are_found_to_be(bits, length):
    v = ((2 * np.arange(2**bits) + 1) / 2**bits - 1) * length / 32
    codebook = mx.array(2.5 * (v + np.abs(v) ** 3 * v)).astype(mx.float16)
    decoder = decoding(codebook, bits, mx.float16)
    assert decoder.form == QUARTIC + length
    assert decoder.error < 3e-4  # the rounding of the levels to float16


@pytest.mark.parametrize("bits", range(1, 8))
def test_uniform_levels_need_no_polynomial(bits):
    uniform = mx.array((np.arange(2**bits) - (2**bits - 1) / 2) / 2**bits).astype(mx.float16)
    assert decoding(uniform, bits, mx.float16).form == 0


@pytest.mark.parametrize("bits", range(9))
def test_levels_that_are_not_odd_come_from_a_table(bits):
    foreign = np.random.default_rng(bits).standard_normal(2**bits if bits else 3).astype(np.float16)
    for dtype in (mx.float16, mx.float32):
        decoder = decoding(mx.array(foreign), bits, dtype)
        assert decoder.form == FROM_TABLE
        np.testing.assert_array_equal(np.array(decoder.levels)[: len(foreign)], foreign.astype(np.float32))


@pytest.mark.parametrize("levels", [[0, 0], [0, 0, 0, 0], [1, 1, 1, 1], [0, 0, 1, 1], [-1, 0, 0, 1], [1, 0, 0, -1]])
def test_strange_levels_are_decoded_as_they_are(levels):
    codebook = mx.array(levels).astype(mx.float16)
    for dtype in (mx.float16, mx.float32):
        got = evaluated(codebook, (len(levels) - 1).bit_length(), dtype)
        np.testing.assert_allclose(got, levels, atol=1e-6)


def test_an_array_has_at_least_the_8_elements_that_metal_passes_in_device_memory():
    for bits in range(9):
        for dtype in (mx.float16, mx.float32):
            assert decoding(lloyd_max(bits), bits, dtype).levels.size >= 8
