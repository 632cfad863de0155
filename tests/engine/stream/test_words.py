"""Stored numbers and words as kernels want them: the same as MLX and the resident loader make of them."""

import mlx.core as mx
import numpy as np
import pytest

from tq.engine.model.turboquant import _from_stream, _to_stream
from tq.engine.stream.words import converted, to_stream

TYPES = {"F32": mx.float32, "F16": mx.float16, "BF16": mx.bfloat16}


@pytest.mark.parametrize("stored", TYPES)
@pytest.mark.parametrize("wanted", TYPES)
def test_numbers_are_converted_as_mlx_does(stored, wanted):
    values = np.random.default_rng(0).standard_normal(4000).astype(np.float32) * 10.0 ** np.arange(-20, 20).repeat(100)
    values = np.concatenate([values, [0.0, -0.0, 1.0, 65504.0, 1.00390625, 1.01171875, 6e-8]]).astype(np.float32)
    source = mx.array(np.clip(values, -6e4, 6e4)).astype(TYPES[stored])
    numbers = np.array(source.view(mx.uint16)) if stored == "BF16" else np.array(source)
    expected = source.astype(TYPES[wanted])
    got = converted(numbers, stored, wanted)
    as_bits = mx.uint32 if wanted == "F32" else mx.uint16
    assert np.array_equal(got.view(np.uint32 if wanted == "F32" else np.uint16), np.array(expected.view(as_bits)))


@pytest.mark.parametrize(("bits", "n"), [(2, 64), (3, 96), (3, 37), (4, 100), (5, 64), (6, 70), (7, 33), (8, 12)])
def test_words_become_the_stream_that_the_loader_makes(bits, n):
    used, n_stream = 32 // bits * bits, -(-n * bits // 32)
    rng = np.random.default_rng(bits)
    codes = rng.integers(0, 2**bits, (5, n))
    stream = mx.array(_packed(codes, bits))
    stored = _from_stream(stream, used, -(-n // (32 // bits)))
    got = to_stream(np.array(stored), used, n_stream)
    assert np.array_equal(got, np.array(stream))
    assert np.array_equal(got, np.array(_to_stream(stored, used, n_stream)))


def _packed(codes: np.ndarray, bits: int) -> np.ndarray:
    from tq.engine.quantize.packing import pack

    return pack(codes, bits)
