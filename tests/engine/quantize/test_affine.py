"""The affine codec: MLX reads its arrays as they are, and its error is below that of MLX's own quantization."""

import mlx.core as mx
import numpy as np
import pytest

from tq.engine.quantize import PackedTensor, QuantSpec, decode, encode
from tq.engine.quantize.affine import best_affine
from tq.engine.quantize.spec import CODEC_BITS, GROUP_SIZES

pytestmark = pytest.mark.filterwarnings("error")
WIDTHS = CODEC_BITS["affine"]


def weights(distribution, *shape):
    rng = np.random.default_rng(0)
    samples = {
        "normal": lambda: rng.standard_normal(shape),
        "heavy-tailed": lambda: rng.standard_t(3, shape),
        "one-sided": lambda: rng.exponential(size=shape),
    }[distribution]()
    return (0.03 * samples).astype(np.float16)


def squared_error(dense, weight):
    return np.sum((np.array(dense, dtype=np.float64) - weight) ** 2)


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_mlx_reads_the_arrays_as_they_are(bits, group_size):
    packed = encode(mx.array(weights("normal", 5, 384)), QuantSpec("affine", bits, group_size, "none"))
    own = mx.quantize(mx.array(weights("normal", 5, 384)), group_size=group_size, bits=bits)
    arrays = [packed.arrays[name] for name in ("weight", "scales", "biases")]
    assert [(a.dtype, a.shape) for a in arrays] == [(a.dtype, a.shape) for a in own]
    dense = mx.dequantize(*(a.astype(mx.float32) if a.dtype == mx.float16 else a for a in arrays), group_size, bits)
    np.testing.assert_allclose(np.array(decode(packed)), np.array(dense), rtol=0, atol=1e-7)


@pytest.mark.parametrize("bits", WIDTHS)
def test_arrays_of_mlx_are_read_as_mlx_reads_them(bits):
    weight = mx.array(weights("normal", 3, 4, 128)).astype(mx.float32)
    arrays = dict(zip(("weight", "scales", "biases"), mx.quantize(weight, group_size=32, bits=bits), strict=True))
    expected = mx.dequantize(*arrays.values(), group_size=32, bits=bits)
    packed = PackedTensor(QuantSpec("affine", bits, 32, "none"), weight.shape, arrays)
    np.testing.assert_allclose(np.array(decode(packed)), np.array(expected), rtol=0, atol=1e-7)


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("distribution", ["normal", "heavy-tailed", "one-sided"])
@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_error_is_a_tenth_below_that_of_mlx(distribution, bits, group_size):
    weight = weights(distribution, 40, 384)
    packed = encode(mx.array(weight), QuantSpec("affine", bits, group_size, "none"))
    own = mx.dequantize(*mx.quantize(mx.array(weight), group_size=group_size, bits=bits), group_size, bits)
    assert squared_error(decode(packed), weight) < 0.9 * squared_error(own, weight)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_error_is_near_that_of_a_scan_of_all_ranges(bits):
    groups = weights("normal", 40, 64).astype(np.float32)
    scales, biases = best_affine(groups, bits)
    top = 2**bits - 1

    def error(scale, bias):
        codes = np.clip(np.rint((groups - bias) / scale), 0, top)
        return np.sum((codes * scale + bias - groups) ** 2, axis=1)

    low, high = groups.min(axis=1, keepdims=True), groups.max(axis=1, keepdims=True)
    scanned = np.full(len(groups), np.inf)
    for a in np.linspace(1.1, 0.3, 60):
        for b in np.linspace(1.1, 0.3, 60):
            scanned = np.minimum(scanned, error((high * b - low * a) / top, low * a))
    assert error(scales[:, None], biases[:, None]).sum() < 1.03 * scanned.sum()


def test_scales_and_biases_are_exact_in_float16():
    for found in best_affine(weights("normal", 30, 64).astype(np.float32), 4):
        np.testing.assert_array_equal(found, found.astype(np.float16))


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("value", [0.0, 0.37, -3.0, 1e-41])
def test_a_constant_group_is_its_bias(bits, value):
    packed = encode(mx.full((2, 64), value), QuantSpec("affine", bits, 64, "none"))
    assert np.all(np.array(packed.arrays["scales"]) == 0)
    np.testing.assert_array_equal(np.array(decode(packed)), np.float32(np.float16(value)))


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("magnitude", [1e-9, 1e-7, 1e-6])
def test_groups_too_narrow_for_a_float16_scale_keep_their_mean(bits, magnitude):
    weight = (0.01 + magnitude * np.random.default_rng(0).standard_normal((3, 64))).astype(np.float32)
    dense = np.array(decode(encode(mx.array(weight), QuantSpec("affine", bits, 64, "none"))))
    spacing = np.spacing(np.float16(0.01)).astype(np.float32)
    assert np.abs(dense.mean(axis=1) - weight.mean(axis=1)).max() < 0.55 * spacing
