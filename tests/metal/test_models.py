"""Whole models on the backend `metal`, against the reference: prompts, single tokens and a few at a time."""

import mlx.core as mx
import numpy as np
import pytest
from metal.emulator import Kernel
from tiny_models import write_checkpoint

from tq.engine import ops
from tq.engine.model.convert import convert
from tq.engine.model.load import load_packed
from tq.engine.model.plan import make_plan
from tq.engine.model.recipe import Recipe
from tq.engine.model.sources import open_source
from tq.engine.ops import proof

STEPS = (12, 1, 4, 1)  # tokens at a time: a prompt, and what each number of rows takes another kernel for
MODELS = {
    "llama": {"bits": 4},
    "qwen2": {"bits": 3, "group_size": "row"},
    "qwen3_moe": {"bits": 3},
    "gpt_oss": {"bits": 4},
    "deepseek_v3": {"bits": 4},
}


@pytest.fixture(autouse=True)
def uncompiled():
    """Compiling the small functions of a model on the CPU takes longer than all the rest."""
    mx.disable_compile()
    yield
    mx.enable_compile()


@pytest.fixture
def backend(metal, monkeypatch):
    """Models run on Metal kernels, here or emulated: without checks, which each kernel has its own tests for."""
    monkeypatch.setitem(Kernel.defaults, "check", False)
    monkeypatch.setattr(ops.metal, "unavailable", lambda: None)
    monkeypatch.setattr(ops.cpu, "unavailable", lambda: "models run on Metal kernels here")
    monkeypatch.setattr(ops.metal, "switched_off", {})
    monkeypatch.setattr(proof, "switch_off_wrong", lambda work, dtype: [])
    ops.forget_choices()
    yield
    ops.forget_choices()


def logits(model, tokens: np.ndarray) -> np.ndarray:
    from mlx_lm.models.cache import make_prompt_cache

    cache, found, at = make_prompt_cache(model), [], 0
    for n in STEPS:
        found.append(np.array(model(mx.array(tokens[None, at : at + n]), cache=cache).astype(mx.float32))[0])
        at += n
    return np.concatenate(found).astype(np.float64)


def converted(folder, model_type, bits, group_size=None):
    write_checkpoint(folder / "source", model_type)
    plan = make_plan(
        open_source(str(folder / "source")), Recipe.from_options(bits=bits, group_size=group_size), dtype="float32"
    )
    list(convert(plan, folder / "out"))
    return folder / "out"


@pytest.mark.parametrize("model_type", MODELS)
def test_a_model_computes_what_the_reference_computes(model_type, tmp_path, backend, monkeypatch):
    folder = converted(tmp_path, model_type, **MODELS[model_type])
    tokens = np.random.default_rng(0).integers(3, 90, sum(STEPS))
    model, notes = load_packed(folder)
    assert notes == []
    got = logits(model, tokens)

    monkeypatch.setenv("TQ_BACKEND", "reference")
    expected = logits(load_packed(folder)[0], tokens)
    assert np.linalg.norm(got - expected) < 1e-4 * np.linalg.norm(expected)
