"""Error feedback: the algorithm in its plainest form gives the same codes, and outputs err less than without."""

import mlx.core as mx
import numpy as np
import pytest

from tq.engine.quantize import QuantSpec, decode, decode_rotated, encode
from tq.engine.quantize.feedback import COLUMNS, DAMPING, feedback_factor, quantize_with_feedback, rotate_moments
from tq.engine.quantize.rotation import random_signs, rotate
from tq.engine.quantize.spec import GROUP_SIZES, ROW

CODED = [
    QuantSpec("lloyd-max", 2, ROW),
    QuantSpec("lloyd-max", 3, ROW),
    QuantSpec("lloyd-max", 3, 32),
    QuantSpec("lloyd-max", 3, 128, "none"),
    QuantSpec("ternary", 0, 64),
    QuantSpec("affine", 3, 64),
    QuantSpec("affine", 4, 128, "none"),
]


def weights(rows, n, seed=0):
    return np.random.default_rng(seed).standard_normal((rows, n)).astype(np.float32)


def correlated_moments(n, seed=1):
    """Second moments of inputs of which a few directions and channels are strong, as those of language models."""
    rng = np.random.default_rng(seed)
    inputs = rng.standard_normal((4 * n, n)) * np.exp(0.5 * rng.standard_normal(n))
    inputs += 2 * rng.standard_normal((4 * n, 5)) @ rng.standard_normal((5, n))
    return inputs.T @ inputs / len(inputs)


def output_error(dense, weight, moments):
    error = np.array(dense, dtype=np.float64) - weight
    return np.einsum("ij,jk,ik->", error, moments, error)


def fit(group):
    return (np.abs(group).max(axis=1) / 3,)


def quantize(column, params):
    (scale,) = params
    codes = np.clip(np.rint(column / scale), -3, 3)
    return (codes + 3).astype(np.uint8), codes * scale


def one_column_at_a_time(weight, moments, group_size):
    """GPTQ as it is derived: quantize a column, correct all others, and remove it from the inverse by elimination."""
    w = weight.astype(np.float64)
    n = w.shape[1]
    inverse = np.linalg.inv(moments + DAMPING * np.trace(moments) / n * np.eye(n))
    codes = np.empty(w.shape, np.uint8)
    params = []
    for j in range(n):
        if j % group_size == 0:
            params.append(fit(w[:, j : j + group_size]))
        codes[:, j], values = quantize(w[:, j], params[-1])
        w[:, j + 1 :] -= np.outer((w[:, j] - values) / inverse[j, j], inverse[j, j + 1 :])
        inverse -= np.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    return params, codes


def values_of(params, codes):
    scales = np.stack([scale for (scale,) in params], axis=1)
    return (codes.astype(np.float64) - 3) * np.repeat(scales, codes.shape[1] // scales.shape[1], axis=1)


@pytest.mark.parametrize(
    ("n", "group_size"),
    [(256, 32), (192, 64), (256, 128), (384, 128), (192, 192), (100, 100), (77, 77), (1, 1), (64, 64), (96, 32)],
)
def test_codes_are_those_of_one_column_at_a_time(n, group_size):
    weight, moments = weights(24, n), correlated_moments(n)
    params, codes = quantize_with_feedback(weight, feedback_factor(moments), group_size, fit, quantize)
    expected_params, expected_codes = one_column_at_a_time(weight, moments, group_size)
    assert len(params) == n // group_size
    assert (codes.dtype, codes.shape) == (np.uint8, weight.shape)
    # A value beside a boundary may fall on the other side in float32, and changes what follows in its row.
    assert np.mean(codes == expected_codes) > 0.99
    found, expected = (values_of(*result) for result in ((params, codes), (expected_params, expected_codes)))
    assert output_error(found, weight, moments) == pytest.approx(output_error(expected, weight, moments), rel=1e-3)


@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_every_group_ends_in_its_block_or_starts_with_it(group_size):
    """What ``quantize_with_feedback`` needs, so that a group is up to date when its parameters are chosen."""
    assert COLUMNS % group_size == 0 or group_size % COLUMNS == 0


def test_weights_are_left_as_they_were():
    weight = weights(3, 64)
    quantize_with_feedback(weight, feedback_factor(correlated_moments(64)), 64, fit, quantize)
    np.testing.assert_array_equal(weight, weights(3, 64))


def test_factor_is_triangular_and_squares_to_the_inverse():
    for n in (5, 128, 129, 300):
        moments = correlated_moments(n)
        factor = feedback_factor(moments)
        assert factor.dtype == np.float32
        np.testing.assert_array_equal(factor, np.triu(factor))
        damped = moments + DAMPING * np.trace(moments) / n * np.eye(n)
        np.testing.assert_allclose(factor.T.astype(np.float64) @ factor @ damped, np.eye(n), atol=1e-4)


@pytest.mark.parametrize("spec", CODED, ids=QuantSpec.label)
def test_outputs_err_less_with_feedback(spec):
    weight, moments = weights(40, 256), correlated_moments(256)
    plain = output_error(decode(encode(mx.array(weight), spec)), weight, moments)
    fed_back = output_error(decode(encode(mx.array(weight), spec, moments)), weight, moments)
    assert fed_back < 0.8 * plain


@pytest.mark.parametrize("spec", [s for s in CODED if s.rotation == "none"] + [QuantSpec("lloyd-max", 3, ROW, "none")])
@pytest.mark.parametrize("strength", [1.0, 1e-12, 1e12])
def test_uncorrelated_inputs_give_the_plain_codes(spec, strength):
    weight = mx.array(weights(9, 256))
    plain, fed_back = encode(weight, spec), encode(weight, spec, strength * np.eye(256))
    for name in plain.arrays:
        np.testing.assert_array_equal(np.array(fed_back.arrays[name]), np.array(plain.arrays[name]))


def test_inputs_never_seen_give_the_plain_codes():
    weight, spec = mx.array(weights(5, 128)), QuantSpec("lloyd-max", 3)
    plain, fed_back = encode(weight, spec), encode(weight, spec, np.zeros((128, 128)))
    for name in plain.arrays:
        np.testing.assert_array_equal(np.array(fed_back.arrays[name]), np.array(plain.arrays[name]))


@pytest.mark.parametrize("rotation", ["hadamard", "none"])
def test_fewer_inputs_than_columns_and_dead_channels_work(rotation):
    inputs = weights(7, 192, seed=2)
    inputs[:, 50:120] = 0
    moments, weight, spec = inputs.T @ inputs, weights(16, 192), QuantSpec("lloyd-max", 3, ROW, rotation)
    dense = np.array(decode(encode(mx.array(weight), spec, moments)))
    assert np.all(np.isfinite(dense))
    plain = output_error(decode(encode(mx.array(weight), spec)), weight, moments)
    assert output_error(dense, weight, moments) < 0.3 * plain


@pytest.mark.parametrize("scale", [1e-20, 1e20])
def test_the_unit_of_the_inputs_does_not_matter(scale):
    weight, spec, moments = weights(6, 128), QuantSpec("lloyd-max", 3, ROW, "none"), correlated_moments(128)
    one, other = (decode(encode(mx.array(weight), spec, m)) for m in (moments, scale * moments))
    assert output_error(other, weight, moments) == pytest.approx(output_error(one, weight, moments), rel=1e-2)


@pytest.mark.parametrize(
    ("moments", "message"),
    [
        (np.full((64, 64), np.nan), "finite"),
        (np.diag([np.inf] * 64), "finite"),
        (-np.eye(64), "positive semi-definite"),
        (np.diag([1.0, -1.0] * 32), "positive semi-definite"),
        (np.eye(32), "second moments of 64 inputs have the shape"),
        (np.ones(64), "second moments of 64 inputs have the shape"),
    ],
)
def test_moments_that_are_none_are_refused(moments, message):
    with pytest.raises(ValueError, match=message):
        encode(mx.array(weights(3, 64)), QuantSpec(rotation="none"), moments)


@pytest.mark.parametrize("n", [64, 160, 100])
def test_rotated_moments_are_those_of_rotated_inputs(n):
    inputs, signs = weights(50, n, seed=3), random_signs(n)
    rotated = np.array(rotate(mx.array(inputs), mx.array(signs)), dtype=np.float64)
    found = rotate_moments(inputs.T.astype(np.float64) @ inputs, signs)
    np.testing.assert_allclose(found, rotated.T @ rotated, atol=1e-3)


def test_experts_share_the_moments_of_their_inputs():
    experts, moments, spec = weights(12, 128).reshape(3, 4, 128), correlated_moments(128), QuantSpec("lloyd-max", 3, 0)
    together = decode(encode(mx.array(experts), spec, moments))
    for i, expert in enumerate(experts):
        alone = decode(encode(mx.array(expert), spec, moments))
        assert np.mean(np.array(together[i] == alone)) > 0.99


def test_the_sketch_describes_what_feedback_left():
    weight, moments = weights(8, 256), correlated_moments(256)
    plain = encode(mx.array(weight), QuantSpec("lloyd-max", 2, 64, "none"), moments)
    both = encode(mx.array(weight), QuantSpec("lloyd-max", 2, 64, "none", qjl=True), moments)
    left = np.linalg.norm(weight - np.array(decode_rotated(plain)), axis=1)
    np.testing.assert_allclose(np.array(both.arrays["qjl_norms"]), left, rtol=2e-3)
