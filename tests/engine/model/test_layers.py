"""Modules over packed arrays compute what mlx's and mlx-lm's compute with the decoded weight."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from tq.engine import ops
from tq.engine.model.layers import QuantEmbedding, QuantLinear, QuantMultiLinear, QuantSwitchLinear, Rotation
from tq.engine.quantize import QuantSpec, decode, encode
from tq.engine.quantize.packed import SHARED

CODED = [
    QuantSpec("lloyd-max", 3, 32),
    QuantSpec("lloyd-max", 4, 0, "none"),
    QuantSpec("ternary", 0, 32),
    QuantSpec("affine", 4, 32),
    QuantSpec("affine", 8, 32, "none"),
    QuantSpec("lloyd-max", 2, 32, qjl=True),
]
by_label = pytest.mark.parametrize("spec", CODED, ids=QuantSpec.label)
by_decoding = pytest.mark.parametrize("keep", [False, True], ids=["packed", "decoded"])


def samples(*shape, seed=0):
    return mx.array(np.random.default_rng(seed).standard_normal(shape).astype(np.float32))


def make(kind, spec, *shape, keep=False, **arguments):
    """The module, and the dense weight that its twin holds."""
    packed = encode(samples(*shape, seed=1), spec)
    rotation = Rotation(packed.arrays["signs"]) if spec.rotation == "hadamard" else None
    module = kind(packed, rotation, **arguments)
    if keep:
        module.keep_decoded(mx.float32)
    return module, decode(packed)


def twin(module, weight, bias=None):
    module.weight = weight
    if bias is not None:
        module.bias = bias
    return module


def assert_close(found, expected, atol=2e-4):
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
    np.testing.assert_allclose(np.array(found), np.array(expected), rtol=0, atol=atol)


@by_label
@by_decoding
@pytest.mark.parametrize("bias", [None, samples(11, seed=2)], ids=["no bias", "bias"])
def test_linear(spec, keep, bias):
    module, weight = make(QuantLinear, spec, 11, 96, keep=keep, bias=bias)
    dense = twin(nn.Linear(96, 11, bias=bias is not None), weight, bias)
    for x in (samples(96), samples(1, 1, 96), samples(2, 7, 96)):
        assert_close(module(x), dense(x))


@by_label
@by_decoding
def test_embedding_and_tied_head(spec, keep):
    module, weight = make(QuantEmbedding, spec, 13, 96, keep=keep, dtype=mx.float32)
    dense = twin(nn.Embedding(13, 96), weight)
    for ids in (mx.array([[3, 12, 0], [7, 7, 1]]), mx.array([4]), mx.array(5)):
        assert_close(module(ids), dense(ids))
    x = samples(2, 3, 96)
    assert_close(module.as_linear(x), dense.as_linear(x))


@by_label
@by_decoding
@pytest.mark.parametrize("bias", [None, samples(7, 5, seed=2)], ids=["no bias", "bias"])
@pytest.mark.parametrize(("batch", "length", "top_k"), [(1, 1, 2), (2, 3, 3), (1, 25, 3)])
def test_switch_linear_as_mlx_lm_calls_it(spec, keep, bias, batch, length, top_k):
    from mlx_lm.models.switch_layers import SwitchLinear, _gather_sort

    module, weight = make(QuantSwitchLinear, spec, 7, 5, 96, keep=keep, bias=bias)
    dense = twin(SwitchLinear(96, 5, 7, bias=bias is not None), weight, bias)
    assert (module.input_dims, module.output_dims, module.num_experts) == (96, 5, 7)
    x = mx.expand_dims(samples(batch, length, 96), (-2, -3))
    indices = mx.array(np.random.default_rng(3).integers(0, 7, (batch, length, top_k)))
    assert_close(module(x, indices), dense(x, indices))
    x, indices, _ = _gather_sort(x, indices)
    assert_close(module(x, indices, sorted_indices=True), dense(x, indices, sorted_indices=True))


@by_label
@by_decoding
def test_multi_linear_both_ways(spec, keep):
    from mlx_lm.models.mla import MultiLinear

    module, weight = make(QuantMultiLinear, spec, 3, 8, 96, keep=keep)
    dense = twin(MultiLinear(96, 8, 3), weight)
    x, y = samples(2, 3, 5, 96), samples(2, 3, 5, 8)
    assert_close(module(x), dense(x))
    assert_close(module(y, transpose=False), dense(y, transpose=False))


class TestRotation:
    @pytest.fixture
    def rotated(self, monkeypatch):
        """The activations that were rotated."""
        arrays = []
        rotate = ops.rotate
        monkeypatch.setattr(ops, "rotate", lambda x, *rest: arrays.append(x) or rotate(x, *rest))
        return arrays

    @pytest.fixture
    def layers(self):
        rotation = Rotation(encode(samples(5, 96), QuantSpec(group_size=32)).arrays["signs"])
        return [QuantLinear(encode(samples(5, 96, seed=i), QuantSpec(group_size=32)), rotation) for i in range(3)]

    def test_modules_that_read_one_activation_rotate_it_once(self, layers, rotated):
        x = samples(2, 96)
        for layer in layers:
            layer(x)
        assert len(rotated) == 1

    def test_another_activation_is_rotated_again_even_if_it_is_equal(self, layers, rotated):
        for x in (samples(2, 96), samples(2, 96), samples(2, 96) + 1):
            for i, layer in enumerate(layers):
                assert_close(layer(x), x @ decode(encode(samples(5, 96, seed=i), QuantSpec(group_size=32))).T)
        assert len(rotated) == 3

    def test_a_new_activation_at_the_address_of_a_forgotten_one_is_rotated(self, layers, rotated):
        for _ in range(20):
            layers[0](mx.ones((1, 96)))
        assert len(rotated) == 20

    def test_unrotated_modules_rotate_nothing(self, rotated):
        module, _ = make(QuantLinear, QuantSpec(group_size=32, rotation="none"), 5, 96)
        module(samples(2, 96))
        assert rotated == []

    def test_experts_share_the_rotation_of_their_input(self, rotated):
        gate, _ = make(QuantSwitchLinear, QuantSpec(group_size=32), 4, 5, 96)
        up = QuantSwitchLinear(encode(samples(4, 5, 96), QuantSpec(group_size=32)), gate.rotation)
        x, indices = samples(1, 3, 1, 1, 96), mx.array([[[0, 1], [2, 3], [1, 1]]])
        gate(x, indices), up(x, indices)
        assert len(rotated) == 1


@by_label
@by_decoding
def test_parameters_are_the_arrays_of_the_matrix_alone(spec, keep):
    module, _ = make(QuantLinear, spec, 5, 96, keep=keep, bias=mx.zeros(5))
    names = {name for name, _ in tree_flatten(module.parameters())}
    assert names == {*module.packed.per_matrix_arrays, "bias"}
    assert not names & set(SHARED)
    assert module.trainable_parameters() == {}


@by_label
def test_the_packed_tensor_of_a_module_is_the_one_it_was_made_from(spec):
    packed = encode(samples(3, 5, 96), spec)
    module = QuantSwitchLinear(packed, None, samples(3, 5))
    assert (module.packed.spec, module.packed.shape, module.dense_shape) == (spec, (3, 5, 96), (3, 5, 96))
    assert module.packed.arrays.keys() == packed.arrays.keys()
    assert all(module.packed.arrays[name] is array for name, array in packed.arrays.items())


def test_new_arrays_replace_old_ones():
    """As ``load_weights`` and the conversion of a module's type do."""
    spec = QuantSpec("lloyd-max", 3, 32)
    module, _ = make(QuantLinear, spec, 5, 96)
    other = encode(samples(5, 96, seed=9), spec)
    x = samples(2, 96)
    module(x)
    module.load_weights([(name, other.arrays[name]) for name in other.per_matrix_arrays])
    assert_close(module(x), x @ decode(other).T)


@by_label
@by_decoding
def test_activations_keep_their_type(spec, keep):
    x, dtype = samples(2, 96).astype(mx.float16), mx.float16
    bias = mx.zeros(5, dtype)
    assert make(QuantLinear, spec, 5, 96, keep=keep, bias=bias)[0](x).dtype == dtype
    embedding, _ = make(QuantEmbedding, spec, 5, 96, keep=keep, dtype=dtype)
    assert embedding(mx.array([1, 2])).dtype == dtype
    assert embedding.as_linear(x).dtype == dtype
    experts, _ = make(QuantSwitchLinear, spec, 3, 5, 96, keep=keep, bias=mx.zeros((3, 5), dtype))
    assert experts(x[:, None], mx.array([0, 2])).dtype == dtype
    heads, _ = make(QuantMultiLinear, spec, 1, 5, 96, keep=keep)
    assert heads(x[None]).dtype == dtype
    assert heads(samples(1, 2, 5).astype(dtype), transpose=False).dtype == dtype


def test_a_module_says_what_it_is():
    module, _ = make(QuantLinear, QuantSpec("lloyd-max", 3, 32), 5, 96)
    assert repr(module) == "QuantLinear(shape=(5, 96), lloyd-max 3-bit g32)"
