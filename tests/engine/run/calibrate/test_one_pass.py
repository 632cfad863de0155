"""`tq convert --calibrate`: matrices are encoded while a text goes through the model, and outputs err less."""

import json

import mlx.core as mx
import numpy as np
import pytest
from calibrated_models import linear_inputs
from tiny_models import build, write_checkpoint

from tq.engine.events import Note, Progress
from tq.engine.model.convert import convert
from tq.engine.model.load import load_packed
from tq.engine.model.plan import make_plan
from tq.engine.model.recipe import Recipe
from tq.engine.model.sources import open_source
from tq.engine.quantize import decode
from tq.engine.run.calibrate.one_pass import OnePassEncoder
from tq.engine.run.calibrate.text import Sample
from tq.errors import TQError

WINDOWS = np.random.default_rng(0).integers(3, 90, (6, 16)).astype(np.int32)
SAMPLE = Sample("text", "0", WINDOWS.size, WINDOWS.shape[1])


@pytest.fixture(autouse=True)
def no_compile():
    mx.disable_compile()
    yield
    mx.enable_compile()


def plan_of(folder, **options):
    return make_plan(open_source(str(folder)), Recipe.from_options(**{"bits": 3} | options), dtype="float32")


def run(folder, out, **options):
    return list(convert(plan_of(folder, **options), out, encoder=OnePassEncoder(WINDOWS, SAMPLE)))


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


# Dense, experts stacked and as modules, heads as a stack, recurrent, two passes through its layers, own readers of
# weights: what differs in how matrices are called. All others were converted by hand.
@pytest.mark.parametrize(
    "model_type", ["dbrx", "deepseek_v3", "deepseek_v41", "gemma3n", "gpt_oss", "iquestloopcoder", "mamba", "minicpm"]
)
def test_models_of_every_kind_are_converted(model_type, tmp_path):
    write_checkpoint(tmp_path / "model", model_type)
    *_, done = run(tmp_path / "model", tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "out"]
    assert not (tmp_path / "out" / "encoded").exists()
    model, _ = load_packed(tmp_path / "out")
    tokens = mx.array(WINDOWS[:2])
    expected = np.array(build(model_type)(tokens))
    found = np.array(model(tokens))
    assert np.sqrt(((found - expected) ** 2).mean() / (expected**2).mean()) < 0.75
    assert json.loads((tmp_path / "out" / "config.json").read_text())["quantization"]["calibration"] == {
        "method": "one pass",
        **SAMPLE.to_json(),
    }
    assert done.path == tmp_path / "out"


def output_errors(folder, model_type, paths):
    """tr((W - Q) H (W - Q)^T) of matrices, with the inputs that they have in the unquantized model."""
    inputs = linear_inputs(model_type, WINDOWS)
    dense = dict(build(model_type).named_modules())
    packed = dict(load_packed(folder)[0].named_modules())
    found = []
    for path in paths:
        error = np.array(decode(packed[path].packed) - dense[path].weight, dtype=np.float64)
        found.append(((inputs[path] @ error.T) ** 2).sum())
    return np.array(found)


def test_outputs_err_less_than_without(tmp_path):
    write_checkpoint(tmp_path / "model", "llama")
    run(tmp_path / "model", tmp_path / "calibrated")
    list(convert(plan_of(tmp_path / "model"), tmp_path / "plain"))
    # Of the first layer, whose inputs are those of the unquantized model but for the embedding's error.
    names = ("self_attn.q_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    paths = [f"model.layers.0.{name}" for name in names]
    calibrated, plain = (output_errors(tmp_path / out, "llama", paths) for out in ("calibrated", "plain"))
    assert (calibrated < 0.8 * plain).all()


def test_only_what_the_recipe_quantizes_is_encoded(tmp_path):
    write_checkpoint(tmp_path / "model", "llama")
    run(tmp_path / "model", tmp_path / "out", mlp_bits="none")
    packed = [path for path, module in load_packed(tmp_path / "out")[0].named_modules() if hasattr(module, "packed")]
    assert packed
    assert not any("mlp" in path for path in packed)


def test_a_stopped_pass_goes_on_and_gives_the_same_bytes(tmp_path):
    write_checkpoint(tmp_path / "model", "qwen3_moe")
    run(tmp_path / "model", tmp_path / "whole")
    events = convert(plan_of(tmp_path / "model"), tmp_path / "out", encoder=OnePassEncoder(WINDOWS, SAMPLE))
    for i, _ in enumerate(event for event in events if isinstance(event, Progress)):
        if i == 6:
            break
    events.close()
    encoded = list((tmp_path / "out.partial/encoded").glob("*.safetensors"))
    assert encoded
    events = run(tmp_path / "model", tmp_path / "out")
    assert any(isinstance(e, Note) and "are encoded" in e.message for e in events)
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_a_failure_inside_of_the_model_is_told(tmp_path):
    write_checkpoint(tmp_path / "model", "llama")
    folder = tmp_path / "model"
    weights = mx.load(str(folder / "model.safetensors"))
    name = "model.layers.0.mlp.up_proj.weight"
    mx.save_safetensors(str(folder / "model.safetensors"), {**weights, name: weights[name] + mx.inf})
    with pytest.raises(TQError, match=r"model\.layers\.0\.mlp\.up_proj: the weight holds NaN or infinite values"):
        run(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()
