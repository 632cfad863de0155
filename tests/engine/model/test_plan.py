"""Plans: exact to the byte, made from headers alone, and honest about what becomes of each tensor."""

import json
import shutil

import mlx.core as mx
import numpy as np
import pytest
from tiny_models import write_checkpoint

from tq.engine.model import plan as plan_module
from tq.engine.model.convert import convert
from tq.engine.model.plan import make_plan
from tq.engine.model.recipe import Recipe
from tq.engine.model.safetensors import INDEX_NAME, plan_shards, read_folder_headers, size_bytes
from tq.engine.model.sources import open_source
from tq.errors import TQError, UsageError


def plan_of(folder, *, dtype=None, format="tq", **options):
    return make_plan(open_source(str(folder)), Recipe.from_options(**options), dtype=dtype, format=format)


def by_name(plan):
    return {tensor.name: tensor for tensor in plan.tensors}


# --- exact ---


@pytest.mark.parametrize(
    ("options", "format"),
    [
        ({"bits": 3}, "tq"),
        ({"bits": "ternary", "head_bits": "none"}, "tq"),
        ({"codec": "affine", "bits": 5}, "tq"),
        ({"bits": 2, "group_size": "row", "protect": "1"}, "tq"),
        ({"bits": "none"}, "tq"),
        ({"bits": 3, "attention_bits": 4}, "turboquant"),
    ],
)
@pytest.mark.parametrize("limit", [5_000_000_000, 40_000])
def test_every_byte_is_known_before(source, tmp_path, monkeypatch, options, format, limit):
    monkeypatch.setattr(plan_module, "plan_shards", lambda tensors: plan_shards(tensors, limit))
    plan = plan_of(source, format=format, **options)
    list(convert(plan, tmp_path / "out"))
    headers = read_folder_headers(tmp_path / "out")
    planned = {name: size_bytes(dtype, shape) for t in plan.tensors for name, dtype, shape in t.stored}
    planned |= {name: array.nbytes for name, array in plan.shared.items()}
    assert {name: header.size_bytes for name, header in headers.items()} == planned
    assert plan.size_bytes == sum(header.size_bytes for header in headers.values())
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    data = sum(f.stat().st_size - 8 - int.from_bytes(f.read_bytes()[:8], "little") for f in files)
    assert data == plan.size_bytes
    assert (len(files) > 1) == (limit == 40_000)
    if len(files) > 1:
        index = json.loads((tmp_path / "out" / INDEX_NAME).read_text())
        assert index["metadata"]["total_size"] == plan.size_bytes
        assert index["weight_map"] == {name: header.path.name for name, header in headers.items()}
    assert sum(record["bytes"] for record in plan.by_role()) == sum(tensor.size_bytes for tensor in plan.tensors)
    assert sum(record["weights"] for record in plan.by_role()) == plan.weights
    assert plan.bits_per_weight == pytest.approx(8 * data / plan.weights)


def test_3_bits_take_3_bits_and_the_scales(source, tmp_path):
    """Measured from the file: 3 bits and a float16 for 64 weights are 3.25 bits per weight."""
    plan = plan_of(source, bits=3)
    list(convert(plan, tmp_path / "out"))
    headers = read_folder_headers(tmp_path / "out")
    three = [t for t in plan.tensors if t.spec and t.spec.bits == 3 and t.spec.group_size == 64]
    assert len(three) == 2 * 5  # q, k, o, gate and up of two layers
    for tensor in three:
        weights = tensor.shape[0] * tensor.shape[1]
        stored = headers[f"{tensor.name}.weight"].size_bytes + headers[f"{tensor.name}.scales"].size_bytes
        assert 8 * stored / weights == 3.25
    attention = next(r for r in plan.by_role() if r["role"] == "attention")
    assert (attention["codes"], attention["bits_per_weight"]) == ("lloyd-max 3-bit g64", 3.25)


def test_the_source_is_measured_as_it_is_stored(tmp_path, make_checkpoint):
    for dtype, size in (("float32", 4), ("bfloat16", 2)):
        plan = plan_of(make_checkpoint(tmp_path / dtype, dtype))
        assert plan.source_bytes == size * plan.weights


def test_a_plan_without_quantization_has_no_bits_of_it(source):
    assert plan_of(source, bits="none").quantized_bits_per_weight is None
    assert plan_of(source, bits=2, embedding_bits="none", head_bits="none").quantized_bits_per_weight < 2.6


# --- from headers alone ---


def test_a_plan_reads_no_weights(tmp_path, make_checkpoint, monkeypatch):
    """The same plan from a file of garbage; and MLX, which reads when it evaluates, holds nothing after it."""
    folder = make_checkpoint(tmp_path / "m")
    expected = plan_of(folder, bits=3)
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    data = 8 + int.from_bytes(content[:8], "little")
    content[data:] = b"\xff" * (len(content) - data)  # NaN
    path.write_bytes(content)
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    plan = plan_of(folder, bits=3)
    assert [(t.name, t.spec, t.stored) for t in plan.tensors] == [(t.name, t.spec, t.stored) for t in expected.tensors]
    largest = max(header.size_bytes for header in plan.source.headers.values())
    assert mx.get_peak_memory() - before < largest / 4


def test_the_plan_of_a_large_model_takes_no_memory(tmp_path):
    """The file is a hole of 10 GB: a header and nothing else."""
    config = {
        "model_type": "llama",
        "hidden_size": 8192,
        "num_hidden_layers": 2,
        "intermediate_size": 49152,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-5,
        "vocab_size": 128_000,
        "tie_word_embeddings": False,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    shapes = {"model.embed_tokens.weight": (128_000, 8192), "lm_head.weight": (128_000, 8192)}
    shapes["model.norm.weight"] = (8192,)
    for i in range(2):
        layer = f"model.layers.{i}."
        for name, rows, columns in (
            ("self_attn.q_proj", 8192, 8192), ("self_attn.k_proj", 1024, 8192), ("self_attn.v_proj", 1024, 8192),
            ("self_attn.o_proj", 8192, 8192), ("mlp.gate_proj", 49152, 8192), ("mlp.up_proj", 49152, 8192),
            ("mlp.down_proj", 8192, 49152),
        ):  # fmt: skip
            shapes[f"{layer}{name}.weight"] = (rows, columns)
        shapes |= {f"{layer}{name}.weight": (8192,) for name in ("input_layernorm", "post_attention_layernorm")}
    header, offset = {}, 0
    for name, shape in shapes.items():
        end = offset + size_bytes("BF16", shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        try:
            file.truncate(8 + len(text) + offset)
        except OSError:
            pytest.skip("the file system has no holes of that size")
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    plan = plan_of(tmp_path, bits=4)
    assert plan.source_bytes == offset > 9e9
    assert plan.size_bytes == sum(tensor.size_bytes for tensor in plan.tensors) + sum(
        array.nbytes for array in plan.shared.values()
    )
    assert mx.get_peak_memory() - before < 1e6
    # One tensor: the embedding as bfloat16, twice, and its codes.
    assert plan.peak_memory_bytes - 3 * 128_000 * 8192 * 2 < 1e9


def test_the_plan_outlives_its_conversion(source, tmp_path):
    plan = plan_of(source)
    before = (plan.size_bytes, plan.peak_memory_bytes, plan.by_role())
    list(convert(plan, tmp_path / "out"))
    assert (plan.size_bytes, plan.peak_memory_bytes, plan.by_role()) == before


# --- types of what stays ---


@pytest.mark.parametrize(
    ("config", "asked", "expected"),
    [
        ({"torch_dtype": "float16"}, None, "F16"),
        ({"torch_dtype": "bfloat16"}, None, "BF16"),
        ({"torch_dtype": "float32"}, None, "BF16"),  # has the range of float32
        ({"torch_dtype": None}, None, "BF16"),
        ({"torch_dtype": "float32", "dtype": "float16"}, None, "F16"),
        ({"torch_dtype": None, "text_config": {"dtype": "float16"}}, None, "F16"),
        ({"torch_dtype": "float16"}, "float32", "F32"),
        ({"torch_dtype": "float32"}, "float16", "F16"),
    ],
)
def test_the_type_of_what_stays(tmp_path, make_checkpoint, config, asked, expected):
    folder = make_checkpoint(tmp_path / "m")
    own = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({k: v for k, v in (own | config).items() if v is not None}))
    plan = plan_of(folder, dtype=asked)
    kept = {dtype for t in plan.tensors if t.spec is None for _, dtype, _ in t.stored}
    assert kept == {expected}
    assert plan.quantization["dtype"] == plan.dtype
    norms = next(record for record in plan.by_role() if record["role"] == "norm")
    assert norms["codes"] == f"kept ({expected.lower()})"


@pytest.mark.parametrize(
    ("model_type", "exact"), [("nemotron_h", ".A_log"), ("bailing_moe", "expert_bias"), ("qwen3_5", ".A_log")]
)
def test_what_an_architecture_wants_in_float32_stays_float32(tmp_path, model_type, exact):
    write_checkpoint(tmp_path / "m", model_type)
    plan = plan_of(tmp_path / "m", dtype="float16")
    kept = {name: dtype for t in plan.tensors if t.spec is None for name, dtype, _ in t.stored}
    assert {dtype for name, dtype in kept.items() if name.endswith(exact)} == {"F32"}
    assert {dtype for name, dtype in kept.items() if "norm" in name} == {"F16"}
    list(convert(plan, tmp_path / "out"))
    headers = read_folder_headers(tmp_path / "out")
    assert {headers[name].dtype for name in kept} == {"F16", "F32"}


# --- what a person is told ---


def test_other_modalities_are_left_out_with_a_note(tmp_path):
    write_checkpoint(tmp_path / "m", "qwen2_vl")
    path = str(tmp_path / "m" / "model.safetensors")
    tower = {"visual.blocks.0.weight": mx.zeros((100, 50), mx.float16), "visual.bias": mx.zeros((50,), mx.float16)}
    mx.save_safetensors(path, mx.load(path) | tower)
    plan = plan_of(tmp_path / "m")
    assert plan.notes == ["left out: 2 vision or audio tensors (0.00 GB), which mlx-lm does not run"]
    assert not any("visual" in tensor.name for tensor in plan.tensors)


def test_tensors_that_the_model_does_not_use_are_named(tmp_path, make_checkpoint):
    folder = make_checkpoint(tmp_path / "m")
    path = str(folder / "model.safetensors")
    mx.save_safetensors(path, mx.load(path) | {"model.mtp.weight": mx.zeros((4,))})
    assert plan_of(folder).notes == ["left out: 1 tensors that the model does not use, such as model.mtp.weight"]


def test_inputs_that_no_group_divides_are_noted(tmp_path, make_checkpoint):
    folder = make_checkpoint(tmp_path / "m", intermediate_size=120)
    plan = plan_of(folder)
    assert plan.notes == ["one scale per row: 2 matrices with 120 inputs, which no group size divides"]
    assert by_name(plan)["model.layers.0.mlp.down_proj"].spec.group_size == 0
    plan = plan_of(folder, codec="affine")
    assert plan.notes == ["kept in full precision: 2 matrices with 120 inputs, which no group size divides"]
    assert plan_of(folder, mlp_bits="none").notes == []


def test_what_mlx_lm_does_not_let_quantize_is_noted(tmp_path):
    write_checkpoint(tmp_path / "m", "bailing_moe_v3")
    (note,) = plan_of(tmp_path / "m").notes
    assert note.startswith("kept in full precision: model.word_embeddings and ")
    assert note.endswith(" more, which mlx-lm does not quantize")


def test_unused_parts_of_a_recipe_are_noted(source):
    assert plan_of(source, protect="7").notes == ["the model has none of the protected layers 7"]


def test_biases_and_norms_of_a_matrix_stay(tmp_path, make_checkpoint):
    plan = plan_of(make_checkpoint(tmp_path / "m", attention_bias=True), bits=2)
    found = by_name(plan)
    assert found["model.layers.0.self_attn.q_proj"].spec.bits == 2
    assert found["model.layers.0.self_attn.q_proj.bias"].spec is None
    assert found["model.layers.0.input_layernorm.weight"].role == "norm"


@pytest.mark.parametrize(("model_type", "tied"), [("llama", False), ("qwen2", True), ("talkie", False)])
def test_a_tied_head_is_noticed(tmp_path, model_type, tied):
    """talkie's head is a parameter, not a layer."""
    write_checkpoint(tmp_path / "m", model_type)
    plan = plan_of(tmp_path / "m", head_bits=8)
    assert plan.outline.tied_head == tied
    embedding = next(t for t in plan.tensors if t.role == "embedding")
    assert embedding.spec.bits == (8 if tied else 6)


# --- what cannot be ---


@pytest.mark.parametrize(
    ("arguments", "message", "hint"),
    [
        ({"format": "gguf"}, "--format 'gguf' is not one of tq, turboquant", None),
        ({"dtype": "int8"}, "--dtype 'int8' is not one of float32, float16, bfloat16", None),
        (
            {"group_size": 64},
            "model.layers.0.mlp.down_proj (mlp): group size 64 does not divide 224 input features",
            "use one of 32, row",
        ),
    ],
)
def test_usage_errors(source, arguments, message, hint):
    with pytest.raises(UsageError) as error:
        plan_of(source, **arguments)
    assert (error.value.message, error.value.hint) == (message, hint)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"group_size": "row"}, "layers.0.self_attn.q_proj as lloyd-max 4-bit row: one scale per row would run on"),
        ({"bits": 5}, "5-bit is not one of 2, 3, 4 bits"),
        ({"mlp_bits": "ternary"}, "only experts can be ternary there"),
        ({"codec": "affine"}, "affine matrices are not rotated there"),
    ],
)
def test_what_turboquant_cannot_hold_is_refused_with_its_reason(source, options, message):
    with pytest.raises(TQError, match="the turboquant format cannot hold") as error:
        plan_of(source, format="turboquant", **options)
    assert message in error.value.message


def test_turboquant_has_affine_codes_for_the_vocabulary(source):
    for options, bits in (({}, 6), ({"head_bits": 8}, 8)):
        spec = by_name(plan_of(source, format="turboquant", **options))["lm_head"].spec
        assert (spec.codec, spec.bits, spec.rotation) == ("affine", bits, "none")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda w: w.pop("model.layers.1.mlp.up_proj.weight"), "has no tensor for model.layers.1.mlp.up_proj.weight"),
        (lambda w: w.update({"lm_head.weight": mx.zeros((160, 64))}), r"lm_head.weight has shape \(160, 64\), but"),
    ],
)
def test_a_source_that_is_not_its_config_is_refused(tmp_path, source, damage, message):
    shutil.copytree(source, tmp_path / "m")
    weights = mx.load(str(source / "model.safetensors"))
    damage(weights)
    mx.save_safetensors(str(tmp_path / "m" / "model.safetensors"), weights)
    with pytest.raises(TQError, match=message):
        plan_of(tmp_path / "m")


def test_an_unknown_architecture_names_similar_ones(tmp_path, source):
    shutil.copytree(source, tmp_path / "m")
    config = json.loads((source / "config.json").read_text())
    (tmp_path / "m" / "config.json").write_text(json.dumps(config | {"model_type": "qwen33"}))
    with pytest.raises(TQError, match="mlx-lm has no architecture 'qwen33'") as error:
        plan_of(tmp_path / "m")
    assert "qwen3" in error.value.hint


def test_the_order_is_that_of_the_model_not_of_the_files(tmp_path, source):
    """So a source in other shards gives the same bytes."""
    shutil.copytree(source, tmp_path / "m")
    weights = mx.load(str(source / "model.safetensors"))
    names = sorted(weights, key=lambda name: np.random.default_rng(len(name)).random())
    (tmp_path / "m" / "model.safetensors").unlink()
    for i in range(2):
        part = {name: weights[name] for name in names[i::2]}
        mx.save_safetensors(str(tmp_path / "m" / f"model-0000{i + 1}-of-00002.safetensors"), part)
    assert [t.name for t in plan_of(tmp_path / "m").tensors] == [t.name for t in plan_of(source).tensors]
