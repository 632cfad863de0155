"""Folders and GGUF files as sources: what is read, how lazily, and what a person is told."""

import json
import math
import os
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import safetensors.numpy

from tq.engine.model import gguf
from tq.engine.model.safetensors import INDEX_NAME
from tq.engine.model.sources import FolderSource, open_source, read_config
from tq.errors import TQError, UsageError

CONFIG = {"model_type": "llama", "hidden_size": 8, "eos_token_id": 1}


def model_folder(folder: Path, config: object = CONFIG, shards: int = 1) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    for i in range(shards):
        name = "model.safetensors" if shards == 1 else f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        tensors = {f"layers.{i}.weight": np.full((3, 5), i + 1, np.float16), f"layers.{i}.norm": np.ones(5, np.float32)}
        safetensors.numpy.save_file(tensors, folder / name)
    return folder


# --- folders ---


@pytest.mark.parametrize("shards", [1, 3])
def test_a_folder_gives_its_tensors_with_names_and_dtypes(tmp_path, shards):
    source = open_source(str(model_folder(tmp_path / "m", shards=shards)))
    weights = source.weights()
    assert list(weights) == list(source.headers)
    assert len(weights) == 2 * shards
    for i in range(shards):
        array = source.materialize(weights[f"layers.{i}.weight"])
        assert array.dtype == mx.float16
        assert mx.array_equal(array, mx.full((3, 5), i + 1, mx.float16))
        assert source.headers[f"layers.{i}.norm"].dtype == "F32"
    assert (source.name, source.base_model, source.revision) == (str(tmp_path / "m"), None, None)


def test_tensors_are_read_when_they_are_evaluated(tmp_path):
    source = open_source(str(model_folder(tmp_path / "m")))
    weights = source.weights()
    header = source.headers["layers.0.weight"]
    with header.path.open("r+b") as file:
        file.seek(header.offset)
        file.write(np.full((3, 5), 9, np.float16).tobytes())
    assert mx.array_equal(weights["layers.0.weight"], mx.full((3, 5), 9, mx.float16))


def test_a_tensor_that_was_read_is_freed_when_it_is_taken_out(tmp_path):
    folder = model_folder(tmp_path / "m")
    size = 1 << 20
    safetensors.numpy.save_file({f"t{i}": np.zeros(size, np.uint8) for i in range(8)}, folder / "model.safetensors")
    weights = open_source(str(folder)).weights()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    for name in list(weights):
        mx.eval(weights.pop(name))
    assert mx.get_peak_memory() - before < 2 * size


@pytest.mark.parametrize("counts", [1, 2])
def test_the_index_decides_which_copy_is_read(tmp_path, counts):
    folder = model_folder(tmp_path / "m", shards=2)
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    for value, name in enumerate(names, 1):
        tensors = {"twice": np.full(3, value, np.float16), f"only{value}": np.ones(1, np.float16)}
        safetensors.numpy.save_file(tensors, folder / name)
    placed = {"twice": names[counts - 1], "only1": names[0], "only2": names[1]}
    (folder / INDEX_NAME).write_text(json.dumps({"weight_map": placed}))
    assert open_source(str(folder)).weights()["twice"].tolist() == [counts] * 3


def test_float8_arrives_as_bytes(tmp_path):
    folder = model_folder(tmp_path / "m")
    header = {"w": {"dtype": "F8_E4M3", "shape": [2, 2], "data_offsets": [0, 4]}}
    text = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes([56, 184, 0, 126]))
    source = open_source(str(folder))
    assert source.headers["w"].dtype == "F8_E4M3"
    assert mx.from_fp8(source.weights()["w"], mx.float32).tolist() == [[1.0, -1.0], [0.0, 448.0]]


def test_side_files_are_copied_and_nothing_else(tmp_path):
    folder = model_folder(tmp_path / "m")
    kept = ["tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja", "LICENSE"]
    kept += ["merges.txt", "spiece.model", "qwen.tiktoken", "additional_chat_templates/tools.jinja"]
    left = ["README.md", "pytorch_model.bin", "modeling_x.py", "hf_quant_config.json", "original/x.json"]
    for name in kept + left:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("{}")
    index = {"weight_map": {"layers.0.norm": "model.safetensors"}}
    (folder / INDEX_NAME).write_text(json.dumps(index))
    source = FolderSource(folder, name="m")
    (tmp_path / "out").mkdir()
    source.copy_side_files(tmp_path / "out")
    copied = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert copied == set(kept)
    FolderSource(folder, name="m", trust_remote_code=True).copy_side_files(tmp_path / "out")
    assert (tmp_path / "out" / "modeling_x.py").exists()


def test_the_fingerprint_changes_with_the_weights(tmp_path):
    folder = model_folder(tmp_path / "m", shards=2)
    seen = {open_source(str(folder)).fingerprint()}
    assert open_source(str(folder)).fingerprint() in seen
    shard = folder / "model-00001-of-00002.safetensors"
    os.utime(shard, ns=(1, 1))
    seen.add(open_source(str(folder)).fingerprint())
    safetensors.numpy.save_file({"other": np.zeros(1, np.float32)}, shard)
    os.utime(shard, ns=(1, 1))
    seen.add(open_source(str(folder)).fingerprint())
    shard.rename(folder / "model-1.safetensors")
    seen.add(open_source(str(folder)).fingerprint())
    assert len(seen) == 4


# --- config.json ---


def test_the_config_is_what_mlx_lm_reads(tmp_path):
    from mlx_lm.utils import load_config

    tagged = {"__float__": "-Infinity"}
    folder = model_folder(
        tmp_path / "m", CONFIG | {"a": [tagged, {"b": {"__float__": "NaN"}}], "c": {"__float__": "x"}}
    )
    (folder / "generation_config.json").write_text('{"eos_token_id": [5, 6]}')
    config, expected = read_config(folder), load_config(folder)
    assert math.isnan(config["a"][1].pop("b")) and math.isnan(expected["a"][1].pop("b"))
    assert config == expected
    assert (config["a"][0], config["c"], config["eos_token_id"]) == (-math.inf, {"__float__": "x"}, [5, 6])


def test_the_quantization_is_found_in_its_three_places(tmp_path):
    fp8 = {"quant_method": "fp8"}
    folder = model_folder(tmp_path / "m", CONFIG | {"text_config": {"quantization_config": fp8}})
    assert read_config(folder)["quantization_config"] == fp8
    folder = model_folder(tmp_path / "m")
    (folder / "hf_quant_config.json").write_text('{"quantization": {"quant_algo": "NVFP4"}}')
    assert read_config(folder)["quantization_config"] == {"quantization": {"quant_algo": "NVFP4"}}
    folder = model_folder(tmp_path / "m", CONFIG | {"quantization_config": fp8})
    assert read_config(folder)["quantization_config"] == fp8


@pytest.mark.parametrize(
    "text, message",
    [
        ("{", "config.json is not valid JSON"),
        ("[" * 100_000, "config.json is not valid JSON"),
        ("[]", "config.json is not a JSON object"),
        ("{}", "config.json has no model_type"),
        ('{"model_type": 3}', "config.json has no model_type"),
    ],
)
def test_a_bad_config_is_refused(tmp_path, text, message):
    with pytest.raises(TQError, match=message):
        open_source(str(model_folder(tmp_path / "m", text)))


# --- what is no source ---


def test_a_name_that_is_nothing_is_no_such_model(tmp_path):
    for model in (str(tmp_path / "absent"), "./absent", "llama", "a/b/c", "absent/model.gguf", "org/na me", ""):
        with pytest.raises(TQError, match="no such model: ") as caught:
            open_source(model)
        assert ".gguf" in caught.value.hint


def test_a_folder_says_what_it_lacks(tmp_path):
    def message():
        with pytest.raises(TQError) as caught:
            open_source(str(tmp_path))
        return caught.value.message.replace(str(tmp_path), "F"), caught.value.hint

    assert message() == ("not a model folder: F has no config.json and no model*.safetensors", None)
    (tmp_path / "x.gguf").touch()
    assert message()[1] == f"give the file itself: {tmp_path / 'x.gguf'}"
    (tmp_path / "x.gguf").unlink()
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    assert message()[0] == "not a model folder: F has no model*.safetensors"
    (tmp_path / "consolidated.safetensors").touch()
    assert "consolidated.safetensors" in message()[1]
    (tmp_path / "pytorch_model.bin").touch()
    assert message()[0] == "F holds pickle weights (pytorch_model.bin), which tq does not read"
    (tmp_path / "config.json").unlink()
    (tmp_path / "model.safetensors").touch()
    assert message()[0] == "not a model folder: F has no config.json"


def test_a_file_must_be_gguf_and_a_path_has_no_revision(tmp_path):
    folder = model_folder(tmp_path / "m")
    with pytest.raises(TQError, match=r"must be a \.gguf") as caught:
        open_source(str(folder / "model.safetensors"))
    assert caught.value.hint == "give the folder that holds it"
    with pytest.raises(UsageError, match="is a local path: --revision"):
        open_source(str(folder), revision="main")


@pytest.mark.parametrize("mode", ["tq", "turboquant"])
@pytest.mark.parametrize("key", ["quantization", "quantization_config"])
def test_a_converted_model_is_not_converted_again(tmp_path, mode, key):
    folder = model_folder(tmp_path / "m", CONFIG | {key: {"mode": mode, "bits": 3}})
    with pytest.raises(TQError, match=f"was already converted \\({mode}\\)"):
        open_source(str(folder))


def test_code_of_the_model_runs_only_when_asked(tmp_path):
    folder = model_folder(tmp_path / "m", CONFIG | {"model_file": "evil.py", "auto_map": {"AutoModel": "x.Y"}})
    with pytest.raises(TQError, match=r"runs its own code \(evil\.py\)") as caught:
        open_source(str(folder))
    assert "--trust-remote-code" in caught.value.hint
    assert open_source(str(folder), trust_remote_code=True).config["model_file"] == "evil.py"


def test_auto_map_alone_is_no_obstacle(tmp_path):
    # mlx-lm has an implementation of its own and never runs it.
    folder = model_folder(tmp_path / "m", CONFIG | {"auto_map": {"AutoModelForCausalLM": "modeling_x.X"}})
    assert open_source(str(folder)).headers


# --- GGUF ---


class FakeTensor:
    def __init__(self, values, quantization):
        self.values, self.shape, self.quantization = values, values.shape, quantization
        self.size_bytes = values.size // 2
        self.reads = 0

    def read(self):
        self.reads += 1
        return self.values


class FakeGGUF:
    def __init__(self, path):
        self.config = {"model_type": "llama"}
        self.base_model = "org/base"
        self.tensors = {
            "q": FakeTensor(np.linspace(-1, 1, 15, dtype=np.float32).reshape(3, 5), "Q4_K"),
            "h": FakeTensor(np.ones((2, 2), np.float16), "F16"),
            "b": FakeTensor(np.full((2,), 3.0, np.float32), "BF16"),
            "n": FakeTensor(np.full((2,), 1 / 3, np.float32), "F32"),
        }

    def write_tokenizer(self, folder):
        (folder / "tokenizer.json").write_text("{}")


@pytest.fixture
def gguf_source(tmp_path, monkeypatch):
    monkeypatch.setattr(gguf, "GGUFFile", FakeGGUF)
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF")
    return open_source(str(path))


def test_a_gguf_file_is_read_tensor_by_tensor(gguf_source):
    weights = gguf_source.weights()
    dtypes = {"q": mx.float16, "h": mx.float16, "b": mx.bfloat16, "n": mx.float32}
    assert {name: array.dtype for name, array in weights.items()} == dtypes
    assert gguf_source.base_model == "org/base"
    assert gguf_source.headers["q"].size_bytes == 7
    renamed = {f"model.{name}": array for name, array in weights.items()}
    for name, tensor in gguf_source.file.tensors.items():
        assert tensor.reads == 0
        array = gguf_source.materialize(renamed[f"model.{name}"])
        assert (array.dtype, array.shape, tensor.reads) == (dtypes[name], tensor.shape, 1)
        assert np.allclose(np.array(array.astype(mx.float32)), tensor.values, atol=1e-3)


def test_an_array_made_from_a_placeholder_is_refused_not_zero(gguf_source):
    weights = gguf_source.weights()
    with pytest.raises(ValueError, match="none of the tensors"):
        gguf_source.materialize(weights["q"].T)


def test_a_gguf_file_brings_its_tokenizer_and_has_a_fingerprint(gguf_source, tmp_path):
    (tmp_path / "out").mkdir()
    gguf_source.copy_side_files(tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.json").exists()
    before = gguf_source.fingerprint()
    gguf_source.path.write_bytes(b"GGUF and more")
    assert gguf_source.fingerprint() != before
