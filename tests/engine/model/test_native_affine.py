"""mlx-lm's affine modules as tq's: the same results, whatever they are in, and nothing else is touched."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from tiny_models import build

from tq.engine import ops
from tq.engine.model import layers, native_affine
from tq.errors import TQError

pytestmark = pytest.mark.skipif(ops.cpu.unavailable() is not None, reason=f"no CPU kernels: {ops.cpu.unavailable()}")

TOKENS = mx.array([[1, 17, 5, 80, 33, 2, 61, 9]])


@pytest.fixture(autouse=True)
def no_compile():
    mx.disable_compile()
    yield
    mx.enable_compile()


def quantized(model_type, bits=4, group_size=32, mode="affine", dtype=mx.float32):
    model = build(model_type)
    nn.quantize(
        model,
        group_size,
        bits,
        mode=mode,
        class_predicate=lambda _, m: hasattr(m, "to_quantized") and m.weight.shape[-1] % 32 == 0,
    )
    model.set_dtype(dtype)
    return model


def logits(model):
    return np.array(model(TOKENS).astype(mx.float32))


def relative_error(found, expected):
    return np.sqrt(((found - expected) ** 2).mean() / (expected**2).mean())


# Linear layers and a tied embedding; experts, with biases too; one matrix per head.
@pytest.mark.parametrize("model_type", ["llama", "gemma2", "qwen2", "qwen3_moe", "gpt_oss", "deepseek_v3"])
def test_a_model_computes_the_same(model_type):
    model = quantized(model_type)
    expected = logits(model)
    theirs = [m for m in model.modules() if hasattr(m, "bits")]
    assert native_affine.adopt(model, mx.float32) == len(theirs) > 0
    assert not any(hasattr(m, "bits") for m in model.modules())
    # Their float32 scales are float16 in memory order.
    assert relative_error(logits(model), expected) < 3e-3
    names = {name.rpartition(".")[2] for name, _ in tree_flatten(model.parameters())}
    assert "scales" not in names


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_every_width_and_type(bits, dtype):
    model = quantized("llama", bits, dtype=dtype)
    model.set_dtype(mx.float32)
    expected = logits(model)
    model.set_dtype(dtype)
    native_affine.adopt(model, mx.float32)
    model.set_dtype(mx.float32)
    assert relative_error(logits(model), expected) < 1e-5


def test_a_module_in_two_places_stays_one():
    model = quantized("llama")
    model.model.layers[1].mlp.up_proj = model.model.layers[0].mlp.up_proj
    expected = logits(model)
    native_affine.adopt(model, mx.float32)
    assert model.model.layers[1].mlp.up_proj is model.model.layers[0].mlp.up_proj
    assert relative_error(logits(model), expected) < 3e-3


def test_other_modes_stay_as_they_are():
    model = quantized("llama", mode="mxfp4")
    assert native_affine.adopt(model, mx.float32) == 0
    assert type(model.model.layers[0].mlp.up_proj) is nn.QuantizedLinear


def test_a_subclass_may_compute_something_else():
    class Own(nn.QuantizedLinear):
        pass

    model = quantized("llama")
    model.model.layers[0].mlp.up_proj = Own(64, 96)
    native_affine.adopt(model, mx.float32)
    assert type(model.model.layers[0].mlp.up_proj) is Own
    assert type(model.model.layers[0].mlp.gate_proj) is layers.QuantLinear


def test_a_weight_that_is_read_without_calling_its_module_stays():
    model = quantized("seed_oss")
    native_affine.adopt(model, mx.float32)
    assert type(model.model.embed_tokens) is nn.QuantizedEmbedding
    assert type(model.model.layers[0].mlp.up_proj) is layers.QuantLinear


def test_another_backend_leaves_them_to_mlx_lm(monkeypatch):
    for name in ("mlx", "reference"):
        monkeypatch.setenv("TQ_BACKEND", name)
        assert native_affine.adopt(quantized("llama"), mx.float32) == 0


def test_a_forced_backend_that_is_not_there_is_an_error(monkeypatch):
    ops._select.cache_clear()
    monkeypatch.setenv("TQ_BACKEND", "cpu")
    monkeypatch.setattr(ops.cpu, "unavailable", lambda: "there is no compiler")
    with pytest.raises(TQError, match="there is no compiler"):
        native_affine.adopt(quantized("llama"), mx.float32)
    ops._select.cache_clear()
