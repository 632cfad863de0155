"""Packing of keys and values against the codec in plain mx: the same codes and scales, up to ties."""

import mlx.core as mx
import numpy as np
import pytest

from tq.engine.cache.lloyd_max import LloydMax
from tq.engine.cache.rotation import rotation
from tq.engine.quantize.packing import unpack
from tq.metal.attend import Codes
from tq.metal.kv_encode import declines, encode

pytestmark = pytest.mark.usefixtures("metal")


def codes_of(bits: int, dim: int, group: int = 0) -> Codes:
    return Codes(bits, mx.array(LloydMax(bits, dim).levels), rotation(dim), group)


@pytest.mark.parametrize(
    ("bits", "dim", "group", "dtype", "shape"),
    [
        (1, 64, 0, mx.float32, (1, 2, 5)),
        (2, 40, 0, mx.float16, (2, 1, 7)),
        (3, 128, 32, mx.bfloat16, (1, 3, 9)),
        (4, 80, 0, mx.float32, (1, 1, 1)),
        (5, 96, 0, mx.float16, (1, 2, 3)),
        (6, 128, 64, mx.float32, (1, 2, 4)),
        (7, 33, 0, mx.float32, (2, 2, 2)),
        (8, 256, 0, mx.bfloat16, (1, 2, 3)),
    ],
)
def test_equals_the_codec(bits, dim, group, dtype, shape):
    random = np.random.default_rng(0)
    x = random.standard_normal((*shape, dim)) * random.uniform(0.01, 50, (*shape, 1))
    x[..., 0] *= 4  # an outlier in some bases
    x[0, 0, 1:2] = 0  # nothing at all
    x = mx.array(x.astype(np.float32)).astype(dtype)
    codes = codes_of(bits, dim, group)
    assert declines(dtype, codes) is None
    words, scales = encode(x, codes)
    codec = LloydMax(bits, dim, group)
    expected_words, expected_scales = codec.encode(codec.rotate(x))
    assert words.shape == expected_words.shape and scales.shape == expected_scales.shape
    assert words.dtype == mx.uint32 and scales.dtype == mx.float16
    np.testing.assert_allclose(np.array(scales, np.float32), np.array(expected_scales, np.float32), rtol=2e-3)
    got, expected = (np.array(unpack(w, bits, dim)).astype(int) for w in (words, expected_words))
    assert np.abs(got - expected).max() <= 1
    assert np.mean(got != expected) < 0.01
    # Bits beyond the last code are zero, as packing.py has them.
    rest = dim * bits % 32
    assert not rest or not np.any(np.array(words)[..., -1] >> rest)

    exact = np.array(codec.rotate(x), np.float64)
    error, expected_error = (np.mean((np.array(codec.decode(list(a)), np.float64) - exact) ** 2)
                             for a in ((words, scales), (expected_words, expected_scales)))  # fmt: skip
    assert error < expected_error * 1.001


def test_declines_what_it_cannot_do():
    assert "int32" in declines(mx.int32, codes_of(4, 64))
    assert "groups of 48" in declines(mx.float16, Codes(4, mx.zeros(16), mx.eye(96), 48))
    assert "1024" in declines(mx.float16, Codes(4, mx.zeros(16), mx.eye(1024)))
