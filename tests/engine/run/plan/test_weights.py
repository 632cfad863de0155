"""Bytes of weights, from headers: those of real conversions, and of models that everybody knows."""

import big_models
import mlx.core as mx
import pytest
import tiny_models

from tq.engine.model.convert import convert
from tq.engine.model.plan import make_plan
from tq.engine.model.recipe import Recipe
from tq.engine.model.remote import open_headers
from tq.engine.model.safetensors import read_headers
from tq.engine.model.sources import FolderSource, open_source
from tq.engine.run.plan.weights import is_packed, of_checkpoint, of_plan


def stored_bytes(folder):
    """Of all tensors of a folder, from its files."""
    total = 0
    for path in folder.glob("*.safetensors"):
        headers, _ = read_headers(path)
        total += path.stat().st_size - min(header.offset for header in headers.values())
    return total


def converted(tmp_path, model_type, format="tq", **options):
    """The plan of a conversion of a tiny model, and the folder that it made."""
    tiny_models.write_checkpoint(tmp_path / "source", model_type)
    recipe = Recipe.from_options(**options)
    plan = make_plan(open_source(str(tmp_path / "source")), recipe, format=format)
    planned = of_plan(plan)
    list(convert(plan, tmp_path / "out"))
    return planned, tmp_path / "out"


@pytest.mark.parametrize(
    ("model_type", "options"),
    [
        ("llama", {"bits": 3, "protect": "0", "codec": "lloyd-max"}),
        ("gemma3_text", {"bits": 4, "codec": "affine"}),
        ("gpt_oss", {"bits": 4, "expert_bits": "ternary"}),
        ("deepseek_v3", {"bits": 2, "head_bits": 8}),
        ("qwen3_moe", {"bits": "none"}),
        ("mamba2", {"bits": 5}),
        ("qwen3_moe", {"bits": 3, "format": "turboquant"}),
    ],
)
def test_planned_bytes_are_those_on_the_disk_and_of_the_checkpoint(tmp_path, model_type, options):
    planned, out = converted(tmp_path, model_type, **options)
    source = FolderSource(out, name="out")
    found = of_checkpoint(source)
    assert planned.size_bytes == stored_bytes(out) == found.size_bytes
    assert (planned.weights, planned.active, planned.tied_head) == (found.weights, found.active, found.tied_head)
    assert (planned.experts_bytes, planned.token_bytes) == (found.experts_bytes, found.token_bytes)
    assert planned.dtype == found.dtype == mx.bfloat16
    assert is_packed(source) == (options["bits"] != "none")
    assert not is_packed(open_source(str(tmp_path / "source")))


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text", "qwen3_moe", "gpt_oss"])
def test_a_token_reads_what_the_loaded_model_says(tmp_path, model_type):
    """The same count, made from the modules that run."""
    from tq.engine.model.load import load_packed
    from tq.engine.run.weights import weights_of

    planned, out = converted(tmp_path, model_type, bits=4)
    model, _ = load_packed(out)
    loaded = weights_of(model, FolderSource(out, name="out").config)
    # A loaded model on a CPU holds what is kept in float32, and counts no biases of packed matrices.
    assert planned.weights == pytest.approx(loaded.parameters, rel=0.02)
    assert planned.token_bytes == pytest.approx(loaded.token_bytes, rel=0.1)


def test_a_checkpoint_of_mlx_is_taken_as_it_is(tmp_path):
    import json

    import mlx.nn as nn
    from mlx.utils import tree_flatten

    model = tiny_models.build("qwen3")
    nn.quantize(model, group_size=32, bits=4)
    arrays = dict(tree_flatten(model.parameters()))
    mx.save_safetensors(str(tmp_path / "model.safetensors"), arrays)
    config = tiny_models.config("qwen3") | {"quantization": {"group_size": 32, "bits": 4}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    source = open_headers(str(tmp_path))
    found = of_checkpoint(source)
    assert is_packed(source)
    assert found.size_bytes == sum(array.nbytes for array in arrays.values())
    dense = sum(value.size for _, value in tree_flatten(tiny_models.build("qwen3").parameters()))
    assert found.weights == dense


def test_kept_halves_are_float32_on_a_cpu(tmp_path):
    planned, _ = converted(tmp_path, "llama", bits=4)
    kept = sum(part.size_bytes for part in planned.parts if part.dtype is not None and part.dtype == mx.bfloat16)
    assert kept and planned.memory_bytes(gpu=False) == planned.size_bytes + kept
    assert planned.memory_bytes(gpu=True) == planned.size_bytes
    assert set(planned.kept(gpu=False).values()) == {mx.float32}


@pytest.fixture(scope="session")
def big(tmp_path_factory):
    """big(name): the weights of a large model at 4 bits, planned from its headers."""
    known = {}

    def plan(name):
        if name not in known:
            folder = big_models.write(tmp_path_factory.mktemp("big") / name, name)
            known[name] = of_plan(make_plan(open_source(str(folder)), Recipe.from_options(bits=4)))
        return known[name]

    return plan


# DeepSeek-V3 has 90 thousand tensors, which take longer to list than a test should.
@pytest.mark.parametrize("name", ["llama-3.3-70b", "qwen3-30b-a3b", "gpt-oss-120b"])
def test_parameters_are_those_that_the_makers_state(big, name):
    weights = big(name)
    assert weights.weights == pytest.approx(big_models.PARAMETERS[name] * 1e9, rel=0.002)
    # Makers count the embedding as they like: it takes part, and is not read.
    assert weights.active_weights == pytest.approx(big_models.ACTIVE[name] * 1e9, rel=0.15)


def test_experts_of_a_large_model(big):
    qwen = big("qwen3-30b-a3b")
    assert (qwen.experts, qwen.active) == (128, 8)
    matrix = 768 * 2048
    assert qwen.expert_bytes == 3 * matrix * 4.25 / 8  # 4 bits, and a float16 scale for 64
    assert qwen.experts_bytes == 48 * 128 * qwen.expert_bytes
    dense = qwen.size_bytes - qwen.experts_bytes
    embedding = sum(part.size_bytes for part in qwen.parts if part.role == "embedding")
    assert qwen.token_bytes == dense - embedding + qwen.experts_bytes * 8 // 128
    assert qwen.rotated == {2048: 8, 4096: 1, 768: 8}


def test_biases_of_experts_belong_to_them(big):
    gpt = big("gpt-oss-120b")
    biases = 36 * 128 * (2880 * 3) * 2
    matrices = 36 * 128 * 3 * 2880 * 2880 * 4.25 / 8
    assert gpt.experts_bytes == pytest.approx(matrices + biases)
