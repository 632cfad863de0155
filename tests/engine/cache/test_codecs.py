"""Codecs of head vectors leave the distortion that theory says, cost the bytes they name, and agree with float64."""

import math
from itertools import pairwise

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings, strategies

from tq.engine.cache import bitstream
from tq.engine.cache.codecs import make, size_bytes
from tq.engine.cache.outliers import Outliers
from tq.engine.cache.polar import codebook
from tq.engine.cache.qjl import QJL
from tq.engine.cache.rotation import rotation
from tq.engine.quantize import packing
from tq.errors import TQError

MSE = {1: 0.3634, 2: 0.1175, 3: 0.03454, 4: 0.0095}  # TurboQuant, theorem 1
INNER_PRODUCT = {1: 1.57, 2: 0.56, 3: 0.18, 4: 0.047}  # times 1/d, theorem 2
DIMS = [33, 40, 56, 64, 72, 80, 96, 112, 120, 128, 160, 224, 256, 576]


def unit_vectors(n, dim, seed=0):
    x = np.random.default_rng(seed).standard_normal((1, 1, n, dim))
    return mx.array((x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32))


def through(codec, x):
    fitted = codec.fit(x)
    return codec.unrotate(codec.decode(codec.encode(codec.rotate(x, fitted))), fitted)


def square_error(got, expected):
    """Mean over vectors of |got - expected|^2 / |expected|^2."""
    got, expected = np.array(got, np.float64), np.array(expected, np.float64)
    return (np.square(got - expected).sum(-1) / np.square(expected).sum(-1)).mean()


@settings(max_examples=40, deadline=None)
@given(bits=strategies.integers(1, 8), n=strategies.integers(1, 70), seed=strategies.integers(0, 99))
def test_bit_streams_are_those_of_weights(bits, n, seed):
    codes = np.random.default_rng(seed).integers(0, 2**bits, (3, n), dtype=np.uint32)
    packed = bitstream.pack(mx.array(codes), bits)
    assert np.array_equal(np.array(packed), packing.pack(codes, bits))
    assert np.array_equal(np.array(bitstream.unpack(packed, bits, n)), codes)


@pytest.mark.parametrize("dim", DIMS)
def test_rotations_are_orthonormal_and_mix_all_numbers(dim):
    r = np.array(rotation(dim), np.float64)
    assert np.abs(r @ r.T - np.eye(dim)).max() < 1e-5
    assert np.abs(r).max() < 6 / math.sqrt(dim)


@pytest.mark.parametrize("dim", [128, 576, 1536])
@pytest.mark.parametrize("bits", MSE)
def test_distortion_is_that_of_the_paper(bits, dim):
    error = square_error(through(make("lloyd-max", bits, dim, 0), unit_vectors(200, dim)), unit_vectors(200, dim))
    # A searched scale leaves less, the more so the shorter a vector is.
    assert 0.8 * MSE[bits] < error < 1.005 * MSE[bits]


@pytest.mark.parametrize("dim", DIMS)
def test_channels_with_large_numbers_cost_nothing(dim):
    x = np.array(unit_vectors(300, dim))
    x[..., :2] *= 20
    assert square_error(through(make("lloyd-max", 3, dim, 0), mx.array(x)), x) < MSE[3]


@pytest.mark.parametrize("dim", [128, 512])
@pytest.mark.parametrize("bits", INNER_PRODUCT)
def test_inner_products_of_two_stages(bits, dim):
    x, y = unit_vectors(1500, dim), unit_vectors(1500, dim, seed=1)
    error = np.array(((through(QJL(bits, dim), x) - x) * y).sum(-1), np.float64)
    assert 0.75 < np.square(error).mean() * dim / INNER_PRODUCT[bits] < 1.2


def test_two_stages_are_unbiased_where_one_is_not():
    dim, n, projections = 64, 40, 150
    x = unit_vectors(n, dim)
    y = x + 0.3 * unit_vectors(n, dim, seed=1)  # products that are not small
    exact = np.array((x * y).sum(-1), np.float64)
    estimates = np.stack([np.array((through(QJL(2, dim, seed=s), x) * y).sum(-1)) for s in range(1, projections + 1)])
    error = estimates.mean(axis=0) - exact
    noise = estimates.std(axis=0, ddof=1) / math.sqrt(projections)
    assert np.abs(error / noise).max() < 4.5
    assert abs(error.mean()) < 4 * np.sqrt(np.square(noise).sum()) / n
    one = np.array((through(make("lloyd-max", 1, dim, 0), x) * y).sum(-1)) - exact
    assert one.mean() < -0.3  # the first stage alone shrinks


@pytest.mark.parametrize(("bits", "less_than"), [(3, 0.12), (4, 0.034), (5, 0.009)])
@pytest.mark.parametrize("dim", [40, 120, 128])
def test_polar_distortion(bits, less_than, dim):
    assert (
        square_error(through(make("polar", bits, dim, 0), unit_vectors(300, dim)), unit_vectors(300, dim)) < less_than
    )


def test_polar_angles_follow_their_densities():
    assert np.allclose(codebook(0, 2), np.pi * np.array([0.25, 0.75, 1.25, 1.75]))
    for level in (1, 2, 3):
        found = codebook(level, 2)
        assert np.allclose(found + found[::-1], np.pi / 2, atol=1e-3)  # symmetric about the diagonal
        assert (np.diff(found) > 0).all()
    assert np.ptp(codebook(3, 2)) < np.ptp(codebook(2, 2)) < np.ptp(codebook(1, 2))
    with pytest.raises(TQError, match="head dimensions that 4 divides, not 33"):
        make("polar", 4, 33, 0)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize(("dim", "group"), [(128, 64), (128, 32), (80, 80), (33, 33)])
def test_affine_is_within_half_a_step(bits, dim, group):
    x = unit_vectors(50, dim)
    codec = make("affine", bits, dim, 0 if group in (64, dim) else group)
    assert codec.group == group
    groups = np.array(x).reshape(50, -1, group)
    step = np.ptp(groups, axis=-1, keepdims=True) / (2**bits - 1)
    error = np.abs(np.array(through(codec, x)).reshape(groups.shape) - groups)
    assert (error <= step * 0.51 + 2e-4).all()


@pytest.mark.parametrize(("bits", "ratio"), [(2.5, 0.7), (3.5, 0.7)])
def test_half_bits_give_large_channels_more(bits, ratio):
    """Where a quarter of the channels holds most of the energy, as keys have it."""
    x = np.random.default_rng(3).standard_normal((2, 3, 200, 128)).astype(np.float32)
    large = [np.random.default_rng(h).permutation(128)[:32] for h in range(3)]
    for head, channels in enumerate(large):
        x[:, head, :, channels] *= 5
    x = mx.array(x)
    codec = make("lloyd-max", bits, 128, 0)
    assert isinstance(codec, Outliers)
    order = np.array(codec.fit(x))
    for head, channels in enumerate(large):
        assert set(order[0, head, 0, :32]) == set(channels)
    whole = square_error(through(make("lloyd-max", int(bits), 128, 0), x), x)
    assert square_error(through(codec, x), x) < ratio * whole
    assert size_bytes(codec) * 8 == 128 * bits + 32  # two float16 scales


def test_half_bits_keep_scores_of_grouped_queries():
    codec = make("lloyd-max", 3.5, 64, 0)
    keys, queries = mx.random.normal((1, 2, 9, 64)), mx.random.normal((1, 6, 4, 64))
    fitted = codec.fit(keys)
    grouped = codec.rotate(queries, fitted).reshape(1, 2, 12, 64)
    got = grouped @ codec.rotate(keys, fitted).swapaxes(-1, -2)
    expected = queries.reshape(1, 2, 12, 64) @ keys.swapaxes(-1, -2)
    assert np.allclose(np.array(got), np.array(expected), atol=1e-4)
    assert np.allclose(np.array(codec.unrotate(codec.rotate(queries, fitted), fitted)), np.array(queries), atol=1e-5)


@pytest.mark.parametrize(
    ("codec", "bits"),
    [("lloyd-max", 1), ("lloyd-max", 5), ("lloyd-max", 7), ("lloyd-max", 8), ("qjl", 1), ("qjl", 4), ("affine", 4),
     ("polar", 4), ("lloyd-max", 2.5)],
)  # fmt: skip
@pytest.mark.parametrize("scale", [0.0, 1e-4, 1.0, 1e4])
def test_any_size_of_numbers(codec, bits, scale):
    x = unit_vectors(20, 64) * scale
    made = make(codec, bits, 64, 0)
    arrays = made.encode(made.rotate(x, made.fit(x)))
    assert tuple((a.dtype, a.shape[-1]) for a in arrays) == made.layout
    assert sum(a.nbytes for a in arrays) == 20 * size_bytes(made)
    got = np.array(through(made, x))
    assert np.isfinite(got).all()
    assert (got == 0).all() if scale == 0 else square_error(got, x) < 2


def test_more_bits_leave_less():
    errors = [square_error(through(make("lloyd-max", b, 128, 0), unit_vectors(200, 128)), unit_vectors(200, 128))
              for b in (1, 2, 2.5, 3, 3.5, 4, 5, 6, 7, 8)]  # fmt: skip
    assert all(a > b for a, b in pairwise(errors))
    assert errors[-1] < 6e-5


def test_groups_follow_what_varies_within_a_vector():
    x = np.array(unit_vectors(100, 128))
    x[..., :64] *= 30
    plain, grouped = (make("affine", 4, 128, g) for g in (128, 32))
    assert square_error(through(grouped, mx.array(x))[..., 64:], x[..., 64:]) < 0.02
    assert square_error(through(plain, mx.array(x))[..., 64:], x[..., 64:]) > 0.5
