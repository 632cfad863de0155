"""Codecs: an independent float64 decoder reads from exactly the stated bytes what was encoded."""

import math

import mlx.core as mx
import numpy as np
import pytest

from tq.engine.quantize import CODECS, QuantSpec, codecs, decode, decode_rotated, encode, layout, shared_arrays
from tq.engine.quantize.codebooks import mean_square_error, stored_codebook
from tq.engine.quantize.rotation import hadamard_block
from tq.engine.quantize.spec import CODEC_BITS, GROUP_SIZES, ROW
from tq.errors import TQError, UsageError

pytestmark = pytest.mark.filterwarnings("error")

# Every codec and width, each group size, both rotations, and dimensions that are rotated whole and in blocks.
CASES = [
    *((QuantSpec("lloyd-max", bits, 64), (6, 192)) for bits in CODEC_BITS["lloyd-max"]),
    *((QuantSpec("affine", bits, 64), (6, 192)) for bits in CODEC_BITS["affine"]),
    (QuantSpec("ternary", 0, 64), (6, 192)),
    (QuantSpec("lloyd-max", 3, 32), (5, 96)),
    (QuantSpec("lloyd-max", 3, 128), (5, 640)),
    (QuantSpec("lloyd-max", 3, ROW), (5, 100)),
    (QuantSpec("lloyd-max", 5, ROW), (5, 77)),
    (QuantSpec("lloyd-max", 1, ROW, "none"), (3, 7)),
    (QuantSpec("lloyd-max", 4, 64, "none"), (5, 576)),
    (QuantSpec("ternary", 0, ROW), (5, 576)),
    (QuantSpec("ternary", 0, 32, "none"), (1, 32)),
    (QuantSpec("affine", 3, 32, "none"), (5, 96)),
    (QuantSpec("affine", 4, 128), (5, 384)),
    (QuantSpec("lloyd-max", 3, 64, qjl=True), (6, 192)),
    (QuantSpec("lloyd-max", 2, ROW, "none", qjl=True), (4, 100)),
    (QuantSpec("lloyd-max", 3, 32), (2, 3, 5, 96)),
    (QuantSpec("affine", 4, 32), (2, 5, 96)),
]
each_case = pytest.mark.parametrize(("spec", "shape"), CASES, ids=lambda value: str(getattr(value, "label", str)()))


def weights(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32) * 0.05


def stored_codes(words, bits, n):
    words = np.array(words)
    if bits == 0:
        digits = words[..., None].astype(np.uint64) // 3 ** np.arange(20, dtype=np.uint64) % 3
        return digits.reshape(*words.shape[:-1], -1)[..., :n].astype(int)
    stream = np.unpackbits(words.astype("<u4").view(np.uint8), axis=-1, bitorder="little")[..., : n * bits]
    return stream.reshape(*words.shape[:-1], n, bits).astype(int) @ (1 << np.arange(bits))


def rotation_matrix(signs):
    """R with rotated = R x, in float64: blocks of a Hadamard matrix, its columns taken from MLX and made exact."""
    n, block = len(signs), hadamard_block(len(signs))
    if block == 1:
        return np.diag(signs)
    columns = np.array(mx.hadamard_transform(mx.eye(block)))
    return np.kron(np.eye(n // block), np.sign(columns).T / math.sqrt(block)) * signs


def reference_decode(packed):
    """The dense matrix from docs and arrays alone: codes, levels, scales, sketch, and the inverse rotation."""
    spec, n = packed.spec, packed.shape[-1]
    arrays = {
        name: np.array(array, dtype=np.uint32 if array.dtype == mx.uint32 else np.float64)
        for name, array in packed.arrays.items()
    }
    codes = stored_codes(arrays["weight"], spec.bits, n)
    scales = np.repeat(arrays["scales"], n // arrays["scales"].shape[-1], axis=-1)
    if spec.codec == "affine":
        dense = codes * scales + np.repeat(arrays["biases"], spec.group_size, axis=-1)
    else:
        dense = arrays["codebook"][codes] * scales
    if spec.qjl:
        sketch = 2 * stored_codes(arrays["qjl_packed"], 1, n) - 1
        norms = arrays["qjl_norms"][..., None]
        dense = dense + math.sqrt(math.pi / (2 * n)) * norms * (sketch @ rotation_matrix(arrays["qjl_signs"]))
    return dense @ rotation_matrix(arrays["signs"]) if spec.rotation == "hadamard" else dense


@each_case
def test_decoding_is_what_the_format_says(spec, shape):
    packed = encode(mx.array(weights(*shape)), spec)
    np.testing.assert_allclose(np.array(decode(packed)), reference_decode(packed), rtol=0, atol=1e-6)


@each_case
def test_decoding_gives_the_weights_back_to_within_the_error_of_the_codes(spec, shape):
    weight = weights(*shape)
    error = np.mean((np.array(decode(encode(mx.array(weight), spec))) - weight) ** 2) / np.mean(weight**2)
    if spec.codec == "affine":
        limit = {2: 0.14, 3: 0.034, 4: 0.0085, 5: 0.0021, 6: 0.00052, 8: 0.00004}[spec.bits]
    else:
        limit = 1.05 * mean_square_error(stored_codebook(spec.codec, spec.bits))
        limit *= math.pi / 2 if spec.qjl else 1  # the sketch is unbiased, and not better
    assert limit / 10 < error < limit


@each_case
def test_layout_states_the_exact_arrays(spec, shape):
    packed = encode(mx.array(weights(*shape)), spec)
    stored = {name: (packed.arrays[name].dtype, packed.arrays[name].shape) for name in packed.per_matrix_arrays}
    assert stored == {name: (array.dtype, array.shape) for name, array in layout(spec, shape).items()}
    assert spec.size_bytes(shape) == sum(packed.arrays[name].nbytes for name in packed.per_matrix_arrays)
    assert packed.arrays.keys() - stored.keys() == shared_arrays(spec, shape[-1]).keys()


def test_every_codec_of_a_spec_is_registered():
    assert CODECS.keys() == CODEC_BITS.keys()


def test_three_bits_take_three_bits_and_the_scales():
    packed = encode(mx.array(weights(16, 128)), QuantSpec("lloyd-max", 3, 64))
    assert 8 * sum(packed.arrays[name].nbytes for name in packed.per_matrix_arrays) == 3.25 * 16 * 128


@pytest.mark.parametrize(
    "spec", [QuantSpec("lloyd-max", 3, 32, qjl=True), QuantSpec("ternary", 0), QuantSpec("affine", 4)]
)
def test_each_expert_is_encoded_as_a_matrix_of_its_own(spec):
    experts = weights(3, 7, 192)
    together = encode(mx.array(experts), spec)
    assert together.shape == (3, 7, 192)
    for i, expert in enumerate(experts):
        alone = encode(mx.array(expert), spec)
        for name in alone.per_matrix_arrays:
            np.testing.assert_array_equal(np.array(together.arrays[name][i]), np.array(alone.arrays[name]))


@each_case
def test_encoding_in_blocks_gives_the_same_bytes(spec, shape, monkeypatch):
    weight = mx.array(weights(*shape))
    whole = encode(weight, spec)
    monkeypatch.setattr(codecs, "ENCODE_VALUES", 2 * shape[-1] + 1)
    blocks = encode(weight, spec)
    for name in whole.arrays:
        np.testing.assert_array_equal(np.array(blocks.arrays[name]), np.array(whole.arrays[name]))


def test_a_row_longer_than_a_block_is_encoded(monkeypatch):
    monkeypatch.setattr(codecs, "ENCODE_VALUES", 10)
    assert encode(mx.array(weights(3, 64)), QuantSpec()).arrays["scales"].shape == (3, 1)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
@pytest.mark.parametrize("spec", [QuantSpec("lloyd-max", 3), QuantSpec("affine", 4, rotation="none")])
def test_half_precision_weights_are_encoded_from_their_exact_values(spec, dtype):
    weight = mx.array(weights(5, 128)).astype(dtype)
    half, full = encode(weight, spec), encode(weight.astype(mx.float32), spec)
    for name in full.arrays:
        np.testing.assert_array_equal(np.array(half.arrays[name]), np.array(full.arrays[name]))


@pytest.mark.parametrize(
    "spec", [QuantSpec("lloyd-max", 4, 32, qjl=True), QuantSpec("ternary", 0), QuantSpec("affine", 4)]
)
@pytest.mark.parametrize("dtype", [mx.float16, mx.float32])
def test_decoding_gives_the_type_asked_for(spec, dtype):
    packed = encode(mx.array(weights(4, 64)), spec)
    dense = decode(packed, dtype)
    assert dense.dtype == dtype
    np.testing.assert_allclose(np.array(dense), reference_decode(packed), rtol=0, atol=1e-3)


def test_rotated_decoding_leaves_the_rotation_in_place():
    packed = encode(mx.array(weights(4, 96)), QuantSpec("lloyd-max", 4, 32))
    rotation = rotation_matrix(np.array(packed.arrays["signs"], dtype=np.float64))
    np.testing.assert_allclose(np.array(decode_rotated(packed)) @ rotation, reference_decode(packed), rtol=0, atol=1e-6)


def test_matrices_with_equal_inputs_share_codebook_and_signs():
    spec = QuantSpec("lloyd-max", 3)
    first, second = (encode(mx.array(weights(rows, 128, seed=rows)), spec) for rows in (3, 5))
    assert set(shared_arrays(spec, 128)) == {"codebook", "signs"}
    for name, shared in shared_arrays(spec, 128).items():
        assert shared.dtype == mx.float16
        for packed in (first, second):
            np.testing.assert_array_equal(np.array(packed.arrays[name]), np.array(shared))
    assert set(shared_arrays(QuantSpec("affine", 4, rotation="none"), 128)) == set()


@pytest.mark.parametrize("codec", CODECS)
def test_zeros_decode_to_zeros(codec):
    spec = QuantSpec(codec, CODEC_BITS[codec][0], 32)
    assert np.array_equal(np.array(decode(encode(mx.zeros((3, 64)), spec))), np.zeros((3, 64)))


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("rotation", ["hadamard", "none"])
def test_weights_that_are_not_finite_are_refused(codec, value, rotation):
    weight = weights(40, 64)
    weight[33, 5] = value
    with pytest.raises(TQError, match="the weight holds NaN or infinite values"):
        encode(mx.array(weight), QuantSpec(codec, CODEC_BITS[codec][0], 64, rotation))


@pytest.mark.parametrize("sign", [1, -1])
def test_weights_beyond_float16_are_refused(sign):
    weight = weights(4, 64)
    weight[2, 3] = sign * 1e30
    with pytest.raises(TQError, match=r"values up to 1e\+30, beyond float16"):
        encode(mx.array(weight), QuantSpec(rotation="none"))


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("magnitude", [1e-43, 1e-39, 1e-23, 1e-7, 1e-3, 1e3])
def test_tiny_and_large_weights_are_at_worst_rounded_to_zero(codec, magnitude):
    weight = weights(4, 64) / 0.05 * np.float32(magnitude)
    dense = np.array(decode(encode(mx.array(weight), QuantSpec(codec, CODEC_BITS[codec][-1]))))
    assert np.all(np.isfinite(dense))
    # In units of the weights: their squares would be zeros.
    error, size = (dense - weight) / np.float32(magnitude), weight / np.float32(magnitude)
    assert np.linalg.norm(error) <= 1.001 * np.linalg.norm(size)


@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_a_group_that_does_not_divide_the_inputs_is_refused(group_size):
    with pytest.raises(UsageError, match=f"group size {group_size} does not divide 100 input features"):
        encode(mx.array(weights(2, 100)), QuantSpec(group_size=group_size))
