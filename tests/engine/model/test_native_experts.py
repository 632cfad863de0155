"""Fused experts compute what the module that they replace computes with the same packed matrices."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from tiny_models import build

from tq.engine import ops
from tq.engine.model import layers, native_experts
from tq.engine.quantize import QuantSpec, encode

pytestmark = pytest.mark.skipif(ops.cpu.unavailable() is not None, reason=f"no CPU kernels: {ops.cpu.unavailable()}")

SPECS = [
    QuantSpec("lloyd-max", 4, 32),
    QuantSpec("lloyd-max", 3, 0),
    QuantSpec("ternary", 0, 32),
    QuantSpec("affine", 4, 32, "none"),
]
E, D, H = 5, 96, 160  # experts, inputs and outputs, hidden features
by_label = pytest.mark.parametrize("spec", SPECS, ids=QuantSpec.label)


def activations():
    from mlx_lm.models.activations import SwigluOAI
    from mlx_lm.models.gemma4_text import GeGLU
    from mlx_lm.models.switch_layers import SwiGLU

    return {"swiglu": SwiGLU(), "geglu": GeGLU(), "swiglu_oai": SwigluOAI(alpha=1.3, limit=0.9)}


class Block(nn.Module):
    def __init__(self, spec, activation, bias):
        from mlx_lm.models.switch_layers import SwitchGLU

        super().__init__()
        mx.random.seed(1)
        self.experts = SwitchGLU(D, H, E, activation, bias=bias)
        rotations = {}
        for name in ("gate_proj", "up_proj", "down_proj"):
            dense = self.experts[name]
            packed = encode(mx.random.normal(dense.weight.shape) * 0.3, spec)
            n = packed.in_features
            if spec.rotation == "hadamard":
                rotations.setdefault(n, layers.Rotation(packed.arrays["signs"]))
            own_bias = mx.random.normal(dense.bias.shape) if bias else None
            self.experts[name] = layers.QuantSwitchLinear(packed, rotations.get(n), own_bias)
            self.experts[name].prepare()

    def __call__(self, x, indices):
        return self.experts(x, indices)


def inputs(*lead, k=2):
    generator = np.random.default_rng(2)
    indices = np.stack([generator.permutation(E)[:k] for _ in range(int(np.prod(lead)))])
    x = generator.standard_normal((*lead, D)).astype(np.float32)
    return mx.array(x), mx.array(indices.reshape(*lead, k).astype(np.uint32))


def relative_error(found, expected):
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
    found, expected = np.array(found.astype(mx.float32)), np.array(expected.astype(mx.float32))
    return np.sqrt(((found - expected) ** 2).mean() / (expected**2).mean())


@by_label
@pytest.mark.parametrize("activation", ["swiglu", "geglu", "swiglu_oai"])
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
def test_every_activation_with_and_without_biases(spec, activation, bias):
    model = Block(spec, activations()[activation], bias)
    x, indices = inputs(2, 3)
    expected = model(x, indices)
    assert native_experts.fuse(model) == 1
    assert type(model.experts) is native_experts.FusedExperts
    assert relative_error(model(x, indices), expected) < 1e-5


@by_label
@pytest.mark.parametrize("lead", [(1, 1), (1, 7), (3, 1), (2, 50), (4,)], ids=str)
@pytest.mark.parametrize("k", [1, 3])
def test_every_shape(spec, lead, k):
    """100 tokens and more are what the module sorts by their experts."""
    model = Block(spec, activations()["swiglu"], bias=False)
    x, indices = inputs(*lead, k=k)
    expected = model(x, indices)
    native_experts.fuse(model)
    assert relative_error(model(x, indices), expected) < 1e-5


def test_8_bit_activations_come_close(monkeypatch):
    expected = Block(SPECS[0], activations()["swiglu"], bias=True)(*inputs(3, 40))
    monkeypatch.delenv("TQ_CPU_EXACT")
    model = Block(SPECS[0], activations()["swiglu"], bias=True)
    native_experts.fuse(model)
    assert 1e-4 < relative_error(model(*inputs(3, 40)), expected) < 0.02  # twice quantized


def test_zero_tokens_and_other_types():
    model = Block(SPECS[0], activations()["swiglu"], bias=False)
    native_experts.fuse(model)
    x, indices = inputs(2, 3)
    assert model(x[:, :0], indices[:, :0]).shape == (2, 0, 2, D)
    assert (
        relative_error(model(x.astype(mx.float16), indices.astype(mx.int32)), model(x, indices).astype(mx.float16))
        < 1e-2
    )


def test_paths_stay_the_same():
    model = Block(SPECS[0], activations()["swiglu"], bias=True)
    before = [path for path, _ in model.named_modules()]
    native_experts.fuse(model)
    assert sorted(path for path, _ in model.named_modules()) == sorted(before)


def unknown_activation(experts):
    experts.activation = nn.ReLU()


def dense_matrix(experts):
    from mlx_lm.models.switch_layers import SwitchLinear

    experts.up_proj = SwitchLinear(D, H, E, bias=False)


def stored_arrays(experts):
    experts.up_proj = layers.QuantSwitchLinear(
        encode(mx.random.normal((E, H, D)), SPECS[0]), experts.gate_proj.rotation
    )


def other_rotation(experts):
    experts.up_proj.rotation = layers.Rotation(experts.gate_proj.rotation.signs)


@pytest.mark.parametrize("change", [unknown_activation, dense_matrix, stored_arrays, other_rotation])
def test_what_the_kernel_cannot_do_stays(change):
    model = Block(SPECS[0], activations()["swiglu"], bias=False)
    change(model.experts)
    assert native_experts.fuse(model) == 0
    assert type(model.experts).__name__ == "SwitchGLU"


def test_dense_models_stay():
    assert native_experts.fuse(build("qwen3_moe")) == 0
