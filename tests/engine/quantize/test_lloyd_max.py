"""The codebook codecs: nearest codes for searched scales, and decoding with whatever codebook and groups are stored."""

import mlx.core as mx
import numpy as np
import pytest

from tq.engine.quantize import PackedTensor, QuantSpec, decode_rotated, encode
from tq.engine.quantize.codebooks import stored_codebook
from tq.engine.quantize.packing import pack, unpack

SPECS = [
    QuantSpec("lloyd-max", 3, 32, "none"),
    QuantSpec("lloyd-max", 4, 0, "none"),
    QuantSpec("ternary", 0, 32, "none"),
    QuantSpec("lloyd-max", 8, 32, "none"),
]


def weights(rows, n):
    return (0.1 * np.random.default_rng(0).standard_normal((rows, n))).astype(np.float32)


@pytest.mark.parametrize("spec", SPECS, ids=QuantSpec.label)
def test_every_code_is_the_nearest_for_its_scale(spec):
    weight = weights(7, 96)
    packed = encode(mx.array(weight), spec)
    codes = np.array(unpack(packed.arrays["weight"], spec.bits, 96))
    scales = np.repeat(np.array(packed.arrays["scales"], dtype=np.float64), 96 // spec.n_groups(96), axis=1)
    levels = stored_codebook(spec.codec, spec.bits).astype(np.float64)
    distance = np.abs(weight[..., None] - scales[..., None] * levels)
    chosen = np.take_along_axis(distance, codes[..., None].astype(int), axis=-1)[..., 0]
    assert np.all(chosen <= distance.min(axis=-1) + 1e-8)


@pytest.mark.parametrize("spec", SPECS, ids=QuantSpec.label)
def test_the_stored_codebook_is_the_one_of_the_codec(spec):
    packed = encode(mx.array(weights(2, 64)), spec)
    np.testing.assert_array_equal(np.array(packed.arrays["codebook"]), stored_codebook(spec.codec, spec.bits))


def test_decoding_uses_the_codebook_that_is_stored():
    codes = np.array([[0, 1, 2, 3] * 8], np.uint8)
    arrays = {
        "weight": mx.array(pack(codes, 2)),
        "scales": mx.array([[2.0]], dtype=mx.float16),
        "codebook": mx.array([-3, -0.5, 0.25, 7], dtype=mx.float16),
    }
    dense = decode_rotated(PackedTensor(QuantSpec("lloyd-max", 2, 32, "none"), (1, 32), arrays))
    assert dense.tolist() == [[-6, -1, 0.5, 14] * 8]


def test_each_scale_covers_its_own_group():
    n_groups, group = 3, 32
    codes = np.ones((2, n_groups * group), np.uint8)
    scales = np.arange(1, 7, dtype=np.float16).reshape(2, 3)
    arrays = {
        "weight": mx.array(pack(codes, 1)),
        "scales": mx.array(scales),
        "codebook": mx.array([-1, 1], dtype=mx.float16),
    }
    dense = decode_rotated(PackedTensor(QuantSpec("lloyd-max", 1, group, "none"), (2, 96), arrays))
    np.testing.assert_array_equal(np.array(dense), np.repeat(scales, group, axis=1))
