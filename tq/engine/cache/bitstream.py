"""Packing of codes on any device, in the bit layout of tq.engine.quantize.packing, which unpacks them."""

import mlx.core as mx

from tq.engine.quantize import packing

PERIOD = 32  # codes that fill `bits` whole words, whatever the width


def pack(codes: mx.array, bits: int) -> mx.array:
    """Codes (..., n), below 2^bits, as uint32 (..., words)."""
    *lead, n = codes.shape
    periods = -(-n // PERIOD)
    codes = mx.pad(codes.astype(mx.uint32), [(0, 0)] * len(lead) + [(0, periods * PERIOD - n)])
    codes = codes.reshape(*lead, periods, PERIOD)
    first_bit = mx.arange(PERIOD, dtype=mx.uint32) * bits
    shift = first_bit % 32
    low = codes << shift  # what is shifted out begins the next word
    high = mx.where(shift + bits > 32, codes >> mx.where(shift > 0, 32 - shift, 0), 0)
    words = []
    for word in range(bits):
        # Codes that begin in this word, and the one that spills into it: their bits are disjoint, a sum joins them.
        first, last = -(-word * 32 // bits), -(-(word + 1) * 32 // bits)
        joined = low[..., first:last].sum(axis=-1)
        if first * bits > word * 32:
            joined = joined + high[..., first - 1]
        words.append(joined)
    stream = mx.stack(words, axis=-1).reshape(*lead, periods * bits)
    return stream[..., : -(-n * bits // 32)]


def unpack(words: mx.array, bits: int, n: int) -> mx.array:
    """Codes (..., n) as uint32."""
    if 32 % bits == 0:  # no code spills: a shift for each place
        shifts = mx.arange(0, 32, bits, dtype=mx.uint32)
        codes = (words[..., None] >> shifts) & (2**bits - 1)
        return codes.reshape(*words.shape[:-1], -1)[..., :n]
    return packing.unpack(words, bits, n)
