"""The bit layout of codes: one little-endian bit stream per row, or 20 base-3 digits per word. Its only definition.

Code i of a row occupies bits [i*b, (i+1)*b) of that row's stream; the stream is cut into uint32 words, the lowest bit
first, and padded with zeros to a whole word. Every width from 1 to 8 costs exactly its bits.
"""

import mlx.core as mx
import numpy as np

TRITS_PER_WORD = 20  # 3^20 = 3486784401 < 2^32


def words_per_row(n_codes: int, bits: int) -> int:
    """uint32 words of one row; ``bits`` 0 means trits."""
    if bits == 0:
        return -(-n_codes // TRITS_PER_WORD)
    return -(-n_codes * bits // 32)


def pack(codes: np.ndarray, bits: int) -> np.ndarray:
    """Pack codes (rows, n) of any integer type into uint32 (rows, words_per_row(n, bits))."""
    rows, n = codes.shape
    if bits == 0:
        return _pack_trits(codes)
    # Eight codes fill exactly `bits` bytes, whatever the width: gather them in a 64-bit number and keep its low bytes.
    octets = -(-n // 8)
    padded = np.zeros((rows, octets * 8), np.uint8)
    padded[:, :n] = codes
    gathered = np.zeros((rows, octets), "<u8")
    for i in range(8):
        gathered |= padded[:, i::8].astype("<u8") << np.uint64(i * bits)
    stream = gathered.view(np.uint8).reshape(rows, octets, 8)[:, :, :bits].reshape(rows, octets * bits)
    size = 4 * words_per_row(n, bits)
    padded_stream = np.zeros((rows, size), np.uint8)
    padded_stream[:, : stream.shape[1]] = stream[:, :size]
    return padded_stream.view("<u4")


def unpack(words: mx.array, bits: int, n: int) -> mx.array:
    """Codes (..., n) as uint32 from words (..., words_per_row(n, bits))."""
    if bits == 0:
        return _unpack_trits(words, n)
    first_bit = mx.arange(n, dtype=mx.uint32) * bits
    word, shift = first_bit // 32, first_bit % 32
    codes = mx.take(words, word, axis=-1) >> shift
    if 32 % bits:
        spills = shift + bits > 32
        next_word = mx.take(words, mx.minimum(word + 1, words.shape[-1] - 1), axis=-1)
        # Where nothing spills the shift would be 32 or more, which is undefined: use 0 and drop the result.
        spilled = next_word << mx.where(spills, 32 - shift, 0)
        codes = codes | mx.where(spills, spilled, 0)
    return codes & (2**bits - 1)


def _pack_trits(codes: np.ndarray) -> np.ndarray:
    rows, n = codes.shape
    n_words = words_per_row(n, 0)
    padded = np.zeros((rows, n_words * TRITS_PER_WORD), np.uint32)
    padded[:, :n] = codes
    words = np.zeros((rows, n_words), np.uint32)
    for digit in range(TRITS_PER_WORD - 1, -1, -1):  # Horner: the first trit is the lowest digit
        words = words * np.uint32(3) + padded[:, digit::TRITS_PER_WORD]
    return words


def _unpack_trits(words: mx.array, n: int) -> mx.array:
    powers = mx.array([3**i for i in range(TRITS_PER_WORD)], dtype=mx.uint32)
    digits = words[..., None] // powers
    digits = digits - 3 * (digits // 3)
    return digits.reshape(*words.shape[:-1], -1)[..., :n]
