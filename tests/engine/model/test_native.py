"""Whole models on the CPU kernels as they come: 8-bit activations, batches, threads, and where nothing is native."""

import threading

import mlx.core as mx
import numpy as np
import pytest
from engine.model.conversions import run
from tiny_models import write_checkpoint

from tq.engine import ops
from tq.engine.model import layers, native, native_attention
from tq.engine.model.load import load_packed

pytestmark = pytest.mark.skipif(ops.cpu.unavailable() is not None, reason=f"no CPU kernels: {ops.cpu.unavailable()}")

# Plain, windows and sinks with experts, latent attention, recurrent, experts.
MODEL_TYPES = ["llama", "gpt_oss", "deepseek_v3", "mamba2", "qwen3_moe"]
TOKENS = np.random.default_rng(5).integers(3, 90, (3, 11))


@pytest.fixture(autouse=True)
def no_compile():
    mx.disable_compile()
    yield
    mx.enable_compile()


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """converted(model_type): a folder with a 4-bit model."""
    folder = tmp_path_factory.mktemp("native")

    def convert(model_type):
        out = folder / model_type
        if not out.exists():
            write_checkpoint(folder / f"{model_type}-source", model_type)
            run(folder / f"{model_type}-source", out, bits=4, dtype="float32")
        return out

    return convert


def logits(model, tokens, **arguments):
    return np.array(model(mx.array(tokens), **arguments).astype(mx.float32))


def relative_error(found, expected):
    assert found.shape == expected.shape
    return np.sqrt(((found - expected) ** 2).mean() / (expected**2).mean())


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_8_bit_activations_change_little(converted, monkeypatch, model_type):
    exact = logits(load_packed(converted(model_type))[0], TOKENS)
    monkeypatch.delenv("TQ_CPU_EXACT")
    model, notes = load_packed(converted(model_type))
    assert notes == []
    assert all(m.packed.prepared is not None for m in model.modules() if isinstance(m, layers.QuantModule))
    # Tiny random models: every error is as large as in a large one, and nothing averages them out.
    assert 1e-4 < relative_error(logits(model, TOKENS), exact) < 0.1


@pytest.mark.parametrize("model_type", MODEL_TYPES)
@pytest.mark.parametrize("exact", ["1", "0"], ids=["exact", "int8"])
def test_a_batch_computes_what_its_sequences_compute(converted, monkeypatch, model_type, exact):
    monkeypatch.setenv("TQ_CPU_EXACT", exact)
    model, _ = load_packed(converted(model_type))
    alone = np.concatenate([logits(model, row[None]) for row in TOKENS])
    # A batch takes other kernels, whose sums differ in the last bit, which may be what rounds an 8-bit code.
    assert relative_error(logits(model, TOKENS), alone) < (1e-5 if exact == "1" else 0.01)


@pytest.mark.parametrize("model_type", ["llama", "qwen3_moe"])
def test_two_threads_may_use_one_model(converted, model_type):
    model, _ = load_packed(converted(model_type))
    expected = logits(model, TOKENS)
    errors = []

    def work():
        for _ in range(10):
            errors.append(relative_error(logits(model, TOKENS), expected))

    workers = [threading.Thread(target=work) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(errors) == 20
    assert max(errors) < 1e-6


@pytest.mark.parametrize("forced", ["reference", "mlx"])
def test_another_backend_gets_nothing_native(converted, monkeypatch, forced):
    native_attention.uninstall()
    monkeypatch.setenv("TQ_BACKEND", forced)
    classes = []
    monkeypatch.setattr(native.native_experts, "fuse", lambda model: classes.append(model))
    monkeypatch.setattr(native.native_attention, "install", lambda model: classes.append(model))
    monkeypatch.setattr(native.native_proof, "install", lambda model: classes.append(model))
    native.accelerate(layers.nn.Module())
    assert classes == []
    monkeypatch.setenv("TQ_BACKEND", "cpu")
    native.accelerate(layers.nn.Module())
    assert len(classes) == 3
