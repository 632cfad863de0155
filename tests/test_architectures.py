"""Every model type that mlx-lm can construct: convert a tiny random one, load it, compare it with dense weights."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_unflatten
from tiny_models import DECODE_DIFFERS, UNSUPPORTED, build, model_types, write_checkpoint

from tq.engine.model.convert import convert
from tq.engine.model.load import load_packed
from tq.engine.model.plan import make_plan
from tq.engine.model.recipe import Recipe
from tq.engine.model.roles import matrices
from tq.engine.model.sources import open_source
from tq.engine.quantize import decode
from tq.errors import TQError

TOKENS = 12
# Model types of checkpoints that are packed already, in a layout of their own.
PACKED = {"prism_hadamard_qwen35": "holds packed matrices of its own kind"}
RUNNABLE = [name for name in model_types() if name not in (*UNSUPPORTED, *PACKED)]


@pytest.fixture(autouse=True)
def no_compile():
    """Compiling every architecture on the CPU would take minutes, and changes nothing that is tested here."""
    mx.disable_compile()
    yield
    mx.enable_compile()


def logits(model: nn.Module, tokens: mx.array, cache=None) -> np.ndarray:
    return np.array(model(tokens[None], cache=cache).astype(mx.float32))[0]


def relative_error(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.sqrt(((a - b) ** 2).mean() / (b**2).mean()))


@pytest.mark.parametrize("model_type", RUNNABLE)
def test_a_converted_model_computes_what_its_dense_weights_compute(model_type, tmp_path):
    from mlx_lm.models.cache import make_prompt_cache

    write_checkpoint(tmp_path / "source", model_type)
    source = open_source(str(tmp_path / "source"))
    plan = make_plan(source, Recipe.from_options(bits=4, group_size=None), dtype="float32")
    quantized = {t.name: t for t in plan.tensors if t.spec}
    assert quantized, "nothing was quantized"
    list(convert(plan, tmp_path / "out"))
    model, _ = load_packed(tmp_path / "out")

    dense = build(model_type)
    found = matrices(dense)
    modules = dict(model.named_modules())
    assert {p for p, m in found.items() if m.quantizable} == set(quantized)
    weights = [(f"{path}.weight", decode(modules[path].packed)) for path in quantized]
    dense.update(tree_unflatten(weights))

    tokens = mx.array(np.random.default_rng(0).integers(3, 90, TOKENS))
    expected = logits(dense, tokens)
    got = logits(model, tokens)
    assert np.isfinite(got).all()
    assert relative_error(got, expected) < 1e-3

    if model_type not in DECODE_DIFFERS:
        cache = make_prompt_cache(model)
        prefill = logits(model, tokens[:-1], cache)
        decoded = logits(model, tokens[-1:], cache)
        assert relative_error(np.concatenate([prefill, decoded]), got) < 1e-3


@pytest.mark.parametrize("model_type", PACKED)
def test_a_packed_architecture_is_refused(model_type, tmp_path):
    write_checkpoint(tmp_path, model_type)
    with pytest.raises(TQError, match=PACKED[model_type]):
        make_plan(open_source(str(tmp_path)), Recipe())


def test_the_unsupported_model_types_say_why():
    assert all(reason.strip() for reason in UNSUPPORTED.values())
