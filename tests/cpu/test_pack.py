"""From stored words to the memory order of the kernels, against the description of both."""

import numpy as np
import pytest
from packed_matrix import pack_codes

from tq.cpu import library

TRITS_PER_WORD = 20
SHAPES = [(1, 1), (1, 64), (15, 20), (16, 64), (17, 100), (33, 321), (3, 576), (48, 639)]


def stored_bits(codes: np.ndarray, bits: int) -> np.ndarray:
    """Code i of a row is bits [i * bits, (i + 1) * bits) of its little-endian words."""
    stream = (codes[..., None] >> np.arange(bits) & 1).astype(np.uint8).reshape(len(codes), -1)
    stream = np.pad(stream, ((0, 0), (0, -stream.shape[1] % 32)))
    return np.packbits(stream, axis=1, bitorder="little").view("<u4")


def stored_trits(codes: np.ndarray) -> np.ndarray:
    """20 base-3 digits in a word, the first code the lowest one."""
    digits = np.pad(codes, ((0, 0), (0, -codes.shape[1] % TRITS_PER_WORD))).reshape(len(codes), -1, TRITS_PER_WORD)
    return (digits.astype(np.uint64) * 3 ** np.arange(TRITS_PER_WORD, dtype=np.uint64)).sum(axis=2).astype(np.uint32)


def pack(words: np.ndarray, columns: int, bits: int, trits: bool) -> np.ndarray:
    """Bytes as they lie in memory, which was full of ones before, with 64 more that must stay so."""
    loaded, rows = library.library(), len(words)
    size = loaded.tq_codes_bytes(rows, columns, bits)
    memory = np.full(size + 64, 0xFF, np.uint8)
    words = np.ascontiguousarray(words)
    loaded.tq_pack(words.ctypes.data, words.shape[1], rows, columns, bits, trits, memory.ctypes.data)
    assert (memory[size:] == 0xFF).all()
    return memory[:size]


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
@pytest.mark.parametrize("bits", range(1, 9))
def test_bit_streams(bits, rows, columns):
    codes = np.random.default_rng(bits).integers(0, 1 << bits, (rows, columns), dtype=np.uint32)
    packed = pack(stored_bits(codes, bits), columns, bits, trits=False)
    assert np.array_equal(packed, pack_codes(codes, bits).reshape(-1))


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_trits(rows, columns):
    codes = np.random.default_rng(0).integers(0, 3, (rows, columns), dtype=np.uint32)
    packed = pack(stored_trits(codes), columns, 2, trits=True)
    assert np.array_equal(packed, pack_codes(codes, 2).reshape(-1))


def test_highest_codes_of_a_trit_word():
    codes = np.full((16, 40), 2, np.uint32)  # the word 3^20 - 1 has its top bit set
    assert np.array_equal(pack(stored_trits(codes), 40, 2, trits=True), pack_codes(codes, 2).reshape(-1))


@pytest.mark.parametrize("bits", [3, 4, 7])
def test_what_follows_the_last_column_does_not_count(bits):
    codes = np.random.default_rng(1).integers(0, 1 << bits, (5, 70), dtype=np.uint32)
    longer = np.concatenate([codes, np.full((5, 90), (1 << bits) - 1, np.uint32)], axis=1)
    packed = pack(stored_bits(longer, bits), 70, bits, trits=False)
    assert np.array_equal(packed, pack_codes(codes, bits).reshape(-1))


def test_any_number_of_threads_gives_the_same_bytes():
    loaded = library.library()
    before = loaded.tq_get_threads()
    codes = np.random.default_rng(2).integers(0, 16, (200, 130), dtype=np.uint32)
    try:
        for threads in (1, 2, 3, 7):
            loaded.tq_set_threads(threads)
            assert np.array_equal(pack(stored_bits(codes, 4), 130, 4, trits=False), pack_codes(codes, 4).reshape(-1))
    finally:
        loaded.tq_set_threads(before)
