"""Loading: every kind of model runs, what it runs on does not change its logits, and damage is named."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import psutil
import pytest
from engine.model.conversions import run
from engine.model.test_gguf import write_model
from mlx.utils import tree_flatten, tree_unflatten
from small_models import byte_tokenizer
from tiny_models import build, write_checkpoint

from tq.engine import ops
from tq.engine.model import layers
from tq.engine.model.architecture import parameters
from tq.engine.model.load import activation_dtype, load, load_packed
from tq.engine.model.roles import matrices
from tq.engine.quantize import decode
from tq.errors import TQError

TOKENS = mx.array([[1, 17, 5, 80, 33, 2, 61, 9]])
FIXTURES = Path(__file__).parents[2] / "fixtures" / "turboquant"


def logits(model):
    return np.array(model(TOKENS).astype(mx.float32))[0]


def relative_error(a, b):
    return np.sqrt(((a - b) ** 2).mean() / (b**2).mean())


def with_tokenizer(folder):
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def converted(source, tmp_path_factory):
    """The tiny llama at 4 bits, in float32."""
    out = tmp_path_factory.mktemp("converted") / "out"
    run(source, out, bits=4, dtype="float32")
    return with_tokenizer(out)


@pytest.fixture
def copy(converted, tmp_path):
    """A copy of it to damage."""
    return Path(shutil.copytree(converted, tmp_path / "copy"))


def dense_logits(folder, source):
    """Those of mlx-lm's own model with the weights that the folder decodes to."""
    from mlx_lm.utils import load_model

    packed, _ = load_packed(folder)
    dense, _ = load_model(source)
    weights = {path: m.packed for path, m in packed.named_modules() if isinstance(m, layers.QuantModule)}
    assert weights.keys() == matrices(dense).keys()
    dense.update(tree_unflatten([(f"{path}.weight", decode(weight)) for path, weight in weights.items()]))
    return logits(dense)


# --- every kind of model ---


def test_a_tq_model(converted, source):
    loaded = load(str(converted))
    assert loaded.path == converted
    assert loaded.config["quantization"]["mode"] == "tq"
    data = (converted / "model.safetensors").read_bytes()
    assert loaded.size_bytes == len(data) - 8 - int.from_bytes(data[:8], "little")
    assert loaded.tokenizer.decode(loaded.tokenizer.encode("tq")).endswith("tq")
    assert relative_error(logits(loaded.model), dense_logits(converted, source)) < 1e-5
    assert not loaded.model.training


@pytest.mark.parametrize("codec", ["lloyd-max", "ternary", "affine"])
@pytest.mark.parametrize("rotation", ["hadamard", "none"])
def test_every_codec_computes_what_its_dense_weights_compute(source, tmp_path, codec, rotation):
    run(source, tmp_path / "out", codec=codec, rotation=rotation, dtype="float32")
    model, _ = load_packed(tmp_path / "out")
    assert relative_error(logits(model), dense_logits(tmp_path / "out", source)) < 1e-5


def test_a_turboquant_model():
    loaded = load(str(FIXTURES / "bits3"))
    assert loaded.config["quantization"]["mode"] == "turboquant"
    assert relative_error(logits(loaded.model), logits(load_packed(FIXTURES / "bits3")[0])) == 0
    assert isinstance(loaded.model.model.layers[0].self_attn.q_proj, layers.QuantLinear)


def test_turboquant_as_tq_writes_it(source, tmp_path):
    run(source, tmp_path / "out", format="turboquant", bits=3, dtype="float32")
    model, _ = load_packed(tmp_path / "out")
    assert relative_error(logits(model), dense_logits(tmp_path / "out", source)) < 1e-5


def test_a_plain_folder(source, tmp_path):
    from mlx_lm.utils import load_model

    folder = with_tokenizer(Path(shutil.copytree(source, tmp_path / "m")))
    loaded = load(str(folder))
    assert np.array_equal(logits(loaded.model), logits(load_model(folder)[0]))
    assert loaded.notes == []


@pytest.fixture(params=[None, "there is no compiler"], ids=["kernels", "no kernels"])
def kernels(request, monkeypatch):
    """Whether the CPU kernels are there; if not, the reason."""
    if request.param is not None:
        monkeypatch.setattr(ops.cpu, "unavailable", lambda: request.param)
    ops._select.cache_clear()
    yield ops.cpu.unavailable() is None
    ops._select.cache_clear()


@pytest.mark.parametrize(("mode", "bits", "group_size"), [("affine", 4, 32), ("affine", 6, 32), ("mxfp4", 4, 32)])
def test_a_folder_quantized_by_mlx_lm(tmp_path, make_checkpoint, kernels, mode, bits, group_size):
    from mlx_lm.models import llama

    folder = make_checkpoint(tmp_path / "m", "bfloat16")
    config = json.loads((folder / "config.json").read_text())
    model = llama.Model(llama.ModelArgs.from_dict(config))
    model.load_weights(str(folder / "model.safetensors"))
    nn.quantize(model, group_size, bits, mode=mode)
    mx.save_safetensors(str(folder / "model.safetensors"), dict(tree_flatten(model.parameters())), {"format": "mlx"})
    config["quantization"] = {"group_size": group_size, "bits": bits, "mode": mode}
    (folder / "config.json").write_text(json.dumps(config))
    loaded = load(str(with_tokenizer(folder)))
    up = loaded.model.model.layers[0].mlp.up_proj
    assert type(up) is (layers.QuantLinear if kernels and mode == "affine" else nn.QuantizedLinear)
    model.set_dtype(mx.float32)
    assert relative_error(logits(loaded.model), logits(model)) < 2e-2
    on_cpu = mx.default_device() == mx.Device(mx.cpu)
    assert len(loaded.notes) == on_cpu
    assert loaded.model(TOKENS).dtype == (mx.float32 if on_cpu else mx.bfloat16)


def test_a_gguf_file_and_what_is_converted_from_it(tmp_path):
    original, _ = write_model(tmp_path / "m.gguf", "llama", "Q8_0")
    loaded = load(str(tmp_path / "m.gguf"))
    assert loaded.path == tmp_path / "m.gguf"
    assert relative_error(logits(loaded.model), logits(original)) < 1e-2  # float16 in between
    assert loaded.tokenizer.decode([259]) is not None
    assert loaded.size_bytes == sum(h.size_bytes for h in _headers(tmp_path / "m.gguf"))
    run(tmp_path / "m.gguf", tmp_path / "out", bits=8, dtype="float32")
    assert relative_error(logits(load(str(tmp_path / "out")).model), logits(loaded.model)) < 3e-2


def test_a_gguf_file_runs_in_one_type_although_it_keeps_norms_in_float32(tmp_path, monkeypatch):
    write_model(tmp_path / "m.gguf", "llama", "Q8_0")
    monkeypatch.setattr("tq.engine.model.load.activation_dtype", lambda stored: (stored, []))  # as on a GPU
    model = load(str(tmp_path / "m.gguf")).model
    assert {array.dtype for array in parameters(model).values()} == {mx.bfloat16}


def _headers(path):
    from tq.engine.model.sources import open_source

    return open_source(str(path)).headers.values()


def test_a_file_that_is_no_gguf_is_refused(source):
    with pytest.raises(TQError, match=r"is not a model: give a folder, a \.gguf file or a Hub id"):
        load(str(source / "model.safetensors"))


def test_a_folder_without_tokenizer_is_refused(source):
    with pytest.raises(TQError, match="has no tokenizer that can be loaded"):
        load(str(source))


# --- heads that are not there ---


@pytest.mark.parametrize("model_type", ["gemma3_text", "gemma3", "recurrent_gemma"])
def test_a_head_that_the_checkpoint_leaves_out_is_the_embedding(tmp_path, model_type):
    write_checkpoint(tmp_path / "m", model_type)
    path = str(tmp_path / "m" / "model.safetensors")
    weights = {name: array for name, array in mx.load(path).items() if "lm_head" not in name}
    mx.save_safetensors(path, weights)
    run(tmp_path / "m", tmp_path / "out", bits=8, dtype="float32")
    model, _ = load_packed(tmp_path / "out")
    assert not any("lm_head" in name for name, _ in model.named_modules())
    dense = build(model_type)
    modules = {path.rpartition(".")[2]: module for path, module in dense.named_modules()}
    modules["lm_head"].weight = modules["embed_tokens"].weight
    assert relative_error(logits(model), logits(dense)) < 0.05


def test_a_head_that_is_lost_is_missed(copy):
    weights = mx.load(str(copy / "model.safetensors"))
    mx.save_safetensors(str(copy / "model.safetensors"), {n: a for n, a in weights.items() if "lm_head" not in n})
    with pytest.raises(TQError, match=r"has no tensor for lm_head\.weight"):
        load_packed(copy)


# --- what it runs on ---


def test_weights_in_memory_order_are_all_that_is_kept(converted, source):
    if ops.cpu.unavailable() is not None:
        pytest.skip("no CPU kernels here")
    model, notes = load_packed(converted)
    assert notes == []
    packed = [m.packed for _, m in model.named_modules() if isinstance(m, layers.QuantModule)]
    assert packed
    for matrix in packed:
        assert matrix.decoded is None
        assert matrix.per_matrix_arrays == []
        # Columns are padded to 64, and the codebook takes a kilobyte.
        assert matrix.prepared.size_bytes < 1.2 * matrix.spec.size_bytes(matrix.shape) + 1500
    names = {name for name, _ in tree_flatten(model.parameters())}
    assert all(name.endswith("norm.weight") for name in names)


@pytest.mark.parametrize("why", ["TQ_BACKEND=reference", "no fast kernel for these codes here (there is no compiler)"])
def test_weights_are_decoded_once_where_memory_allows(converted, monkeypatch, why):
    ops._select.cache_clear()
    if why.startswith("TQ"):
        monkeypatch.setenv("TQ_BACKEND", "reference")
    else:
        monkeypatch.setattr(ops.cpu, "unavailable", lambda: "there is no compiler")
    kept, notes = load_packed(converted)
    assert notes == [f"{why}: weights are decoded once and take 0.00 GB of memory"]
    assert kept.model.layers[0].mlp.up_proj.packed.decoded is not None
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=1000))
    packed, notes = load_packed(converted)
    assert notes == [f"{why}: 0.0 GB of weights are decoded for every token"]
    assert packed.model.layers[0].mlp.up_proj.packed.decoded is None
    assert relative_error(logits(kept), logits(packed)) < 1e-6
    ops._select.cache_clear()


@pytest.mark.parametrize("codec", ["lloyd-max", "affine"])
def test_the_reference_backend_gives_the_logits_of_the_chosen_one(source, tmp_path, monkeypatch, codec):
    run(source, tmp_path / "out", codec=codec, dtype="float32")
    chosen, _ = load_packed(tmp_path / "out")
    expected = logits(chosen)
    monkeypatch.setenv("TQ_BACKEND", "reference")
    forced, notes = load_packed(tmp_path / "out")
    assert notes[0].startswith("TQ_BACKEND=reference: weights are decoded once")
    assert relative_error(logits(forced), expected) < 1e-5


def test_a_forced_backend_that_declines_is_an_error(converted, monkeypatch):
    monkeypatch.setenv("TQ_BACKEND", "mlx")
    with pytest.raises(TQError, match="no backend runs matmul on lloyd-max"):
        load_packed(converted)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_half_types_run_in_float32_without_a_gpu_and_tq_says_so(source, tmp_path, dtype):
    run(source, tmp_path / "out", dtype=dtype, codec="affine")
    model, notes = load_packed(tmp_path / "out")
    stored = getattr(mx, dtype)
    expected, said = activation_dtype(stored)
    assert notes == said
    assert model(TOKENS).dtype == expected
    if mx.default_device() == mx.Device(mx.cpu):
        assert expected == mx.float32
        assert len(notes) == (dtype != "float32")
        assert dtype == "float32" or dtype in notes[0]


def test_what_is_kept_in_float32_stays(tmp_path):
    write_checkpoint(tmp_path / "m", "nemotron_h")
    run(tmp_path / "m", tmp_path / "out", dtype="float16", bits=4)
    stored = mx.load(str(tmp_path / "out" / "model.safetensors"))
    model, _ = load_packed(tmp_path / "out")
    parameters = dict(tree_flatten(model.parameters()))
    exact = [name for name in parameters if name.endswith("A_log")]
    assert exact
    for name in exact:
        assert parameters[name].dtype == mx.float32
        assert mx.array_equal(parameters[name], stored[name])


def test_matrices_that_read_one_input_share_its_rotation(converted):
    model, _ = load_packed(converted)
    block = model.model.layers[0]
    rotations = {id(m.rotation) for m in (block.self_attn.q_proj, block.self_attn.v_proj, block.mlp.gate_proj)}
    assert len(rotations) == 1
    assert block.mlp.down_proj.rotation is not block.mlp.up_proj.rotation


def test_biases_of_packed_matrices_are_used(tmp_path, make_checkpoint):
    folder = make_checkpoint(tmp_path / "m", attention_bias=True, mlp_bias=True)
    run(folder, tmp_path / "out", bits=4, dtype="float32")
    model, _ = load_packed(tmp_path / "out")
    bias = mx.load(str(folder / "model.safetensors"))["model.layers.1.mlp.down_proj.bias"]
    assert mx.array_equal(model.model.layers[1].mlp.down_proj.bias, bias)
    assert relative_error(logits(model), dense_logits(tmp_path / "out", folder)) < 1e-5


# --- damage ---


def change_config(**values):
    def damage(folder):
        config = json.loads((folder / "config.json").read_text())
        config["quantization"].update(values)
        (folder / "config.json").write_text(json.dumps(config))

    return damage


def say_of(path, spec):
    def damage(folder):
        config = json.loads((folder / "config.json").read_text())
        config["quantization"]["tensors"][path] = spec
        (folder / "config.json").write_text(json.dumps(config))

    return damage


def change_tensors(change):
    def damage(folder):
        weights = mx.load(str(folder / "model.safetensors"))
        change(weights)
        mx.save_safetensors(str(folder / "model.safetensors"), weights)

    return damage


def drop(name):
    return change_tensors(lambda weights: weights.pop(name))


def put(name, array):
    return change_tensors(lambda weights: weights.update({name: array}))


UP = "model.layers.1.mlp.up_proj"


@pytest.mark.parametrize(
    ("damage", "message", "hint"),
    [
        (change_config(version=2), "has tq format version 2, and this tq reads version 1", "upgrade tq"),
        (change_config(version=None), "has tq format version None", "upgrade tq"),
        (change_config(default=None), "config.json does not say how model.layers.0.self_attn.q_proj is", "download"),
        (change_config(default={"codec": "lloyd"}), "q_proj: codec 'lloyd' is not one of lloyd-max,", "did you mean"),
        (change_config(default={"bit": 4}), "q_proj: unknown field 'bit'", "did you mean bits?"),
        (say_of(UP, 3), f"config.json does not say how {UP} is quantized", "download"),
        (say_of(UP, {"bits": 5}), f"{UP}.weight is mlx.core.uint32 (224, 16), but lloyd-max 5-bit", ""),
        (drop(f"{UP}.weight"), f"{UP}.weight is missing, but lloyd-max 4-bit g64 needs mlx.core.uint32 (224, 16)", ""),
        (drop(f"{UP}.scales"), f"{UP}.scales is missing, but", ""),
        (put(f"{UP}.scales", mx.zeros((224, 3), mx.float16)), f"{UP}.scales is mlx.core.float16 (224, 3), but", ""),
        (put(f"{UP}.scales", mx.zeros((224, 2), mx.float32)), f"{UP}.scales is mlx.core.float32 (224, 2), but", ""),
        (put(f"{UP}.weight", mx.zeros((223, 16), mx.uint32)), f"{UP}.weight is mlx.core.uint32 (223, 16), but", ""),
        (drop("tq.codebook.lloyd-max-4"), "the checkpoint has no tq.codebook.lloyd-max-4, which", ""),
        (drop("tq.signs.128"), "the checkpoint has no tq.signs.128, which", ""),
        (drop("model.norm.weight"), "has no tensor for model.norm.weight", ""),
        (put("model.norm.weight", mx.zeros((64,))), "model.norm.weight has shape (64,), the model wants (128,)", ""),
    ],
)
def test_a_damaged_checkpoint_is_refused_with_what_is_wrong(copy, damage, message, hint):
    damage(copy)
    with pytest.raises(TQError) as error:
        load_packed(copy)
    assert message in error.value.message
    assert error.value.hint.startswith(hint)
    assert "\n" not in error.value.message


def test_a_lost_bias_is_missed(tmp_path, make_checkpoint):
    folder = make_checkpoint(tmp_path / "m", attention_bias=True)
    run(folder, tmp_path / "out", bits=4)
    drop("model.layers.0.self_attn.k_proj.bias")(tmp_path / "out")
    with pytest.raises(TQError, match=r"has no tensor for model\.layers\.0\.self_attn\.k_proj\.bias"):
        load_packed(tmp_path / "out")


def test_a_truncated_shard_is_refused(copy):
    data = (copy / "model.safetensors").read_bytes()
    (copy / "model.safetensors").write_bytes(data[:-1])
    with pytest.raises(TQError, match="is truncated"):
        load(str(copy))


def test_an_unknown_architecture_is_refused(copy):
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"model_type": "lama"}))
    with pytest.raises(TQError, match="mlx-lm has no architecture 'lama'") as error:
        load(str(copy))
    assert "llama" in error.value.hint
