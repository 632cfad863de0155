"""Packing: codes keep their values and their places in the bit stream, and every width costs exactly its bits."""

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tq.engine.quantize.packing import pack, unpack, words_per_row

WIDTHS = range(1, 9)
TRITS = 0


def random_codes(rows, n, bits, seed=0):
    return np.random.default_rng(seed).integers(0, 2**bits if bits else 3, (rows, n), dtype=np.uint8)


@settings(max_examples=150, deadline=None)
@given(
    bits=st.sampled_from([TRITS, *WIDTHS]),
    n=st.integers(1, 200),
    rows=st.integers(1, 5),
    seed=st.integers(0, 2**32),
)
def test_codes_survive_packing(bits, n, rows, seed):
    codes = random_codes(rows, n, bits, seed)
    words = pack(codes, bits)
    assert words.dtype == np.uint32
    assert words.shape == (rows, words_per_row(n, bits))
    unpacked = unpack(mx.array(words), bits, n)
    assert unpacked.dtype == mx.uint32
    np.testing.assert_array_equal(np.array(unpacked), codes)


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("n", [1, 5, 31, 32, 33, 97, 200])
def test_code_i_occupies_bits_i_times_width_of_its_row(bits, n):
    codes = random_codes(3, n, bits)
    stream = np.zeros((3, words_per_row(n, bits) * 32), np.uint8)  # the rest of the last word is zeros
    for i in range(n):
        for bit in range(bits):
            stream[:, i * bits + bit] = codes[:, i] >> bit & 1
    stored = np.unpackbits(pack(codes, bits).astype("<u4").view(np.uint8), axis=1, bitorder="little")
    np.testing.assert_array_equal(stored, stream)


@pytest.mark.parametrize("n", [1, 19, 20, 21, 64, 199])
def test_trit_i_is_digit_i_of_base_3_numbers_of_20_digits(n):
    codes = random_codes(2, n, TRITS)
    words = pack(codes, TRITS)
    for row, packed in zip(codes.tolist(), words.tolist(), strict=True):
        assert packed == [sum(c * 3**i for i, c in enumerate(row[start : start + 20])) for start in range(0, n, 20)]


@pytest.mark.parametrize("bits", [TRITS, *WIDTHS])
def test_the_largest_codes_fit(bits):
    codes = np.full((2, 77), 2**bits - 1 if bits else 2, np.uint8)
    np.testing.assert_array_equal(np.array(unpack(mx.array(pack(codes, bits)), bits, 77)), codes)


@pytest.mark.parametrize(
    ("n", "bits", "words"),
    [
        *[(64, 3, 6), (128, 3, 12), (32, 5, 5), (1, 1, 1), (33, 1, 2), (10, 3, 1), (11, 3, 2), (4096, 8, 1024)],
        *[(20, TRITS, 1), (21, TRITS, 2), (576, TRITS, 29)],
    ],
)
def test_rows_take_exactly_their_bits_padded_to_words(n, bits, words):
    assert words_per_row(n, bits) == words


@pytest.mark.parametrize("bits", [TRITS, 3, 4, 7])
def test_leading_axes_are_kept(bits):
    codes = random_codes(2 * 3 * 5, 43, bits)
    words = mx.array(pack(codes, bits)).reshape(2, 3, 5, -1)
    np.testing.assert_array_equal(np.array(unpack(words, bits, 43)), codes.reshape(2, 3, 5, 43))


@pytest.mark.parametrize("dtype", [np.uint8, np.int32, np.int64])
def test_codes_may_be_of_any_integer_type(dtype):
    codes = random_codes(2, 50, 5)
    np.testing.assert_array_equal(pack(codes.astype(dtype), 5), pack(codes, 5))


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_the_stream_is_that_of_mlx_quantize(bits):
    weight = mx.array(np.random.default_rng(1).standard_normal((5, 192)).astype(np.float32))
    words, scales, biases = mx.quantize(weight, group_size=64, bits=bits)
    codes = unpack(words, bits, 192)
    assert int(codes.max()) == 2**bits - 1
    decoded = codes.reshape(5, 3, 64) * scales[..., None] + biases[..., None]
    expected = mx.dequantize(words, scales, biases, group_size=64, bits=bits)
    np.testing.assert_allclose(np.array(decoded.reshape(5, 192)), np.array(expected), rtol=0, atol=1e-6)
    np.testing.assert_array_equal(pack(np.array(codes), bits), np.array(words))
