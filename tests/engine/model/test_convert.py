"""Conversions: what the result holds, what comes beside the weights, and where nothing can be written."""

import json
import os
import shutil
from types import SimpleNamespace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from engine.model.conversions import content, n_tensors, plan_of, run, stop
from mlx.utils import tree_flatten

from tq.engine.events import Progress
from tq.engine.model import convert as convert_module
from tq.engine.model.convert import Converted, convert
from tq.engine.model.journal import NAME
from tq.engine.model.load import load_packed
from tq.engine.model.unfinished import partial_folder
from tq.engine.quantize import decode
from tq.errors import TQError

# --- the result ---


def test_the_result_holds_the_decoded_weights(source, tmp_path):
    *events, done = run(source, tmp_path / "out", bits=8)
    assert done == Converted(tmp_path / "out", done.size_bytes, done.weights, done.seconds, done.encode_seconds)
    assert 0 < done.encode_seconds < done.seconds
    assert done.weights == sum(t.weights for t in plan_of(source).tensors)
    progress = [event for event in events if isinstance(event, Progress)]
    assert [event.done for event in progress] == sorted(event.done for event in progress)
    assert {event.total for event in progress} == {done.weights}
    assert progress[0].done == 0 and progress[-1].done == done.weights
    model, _ = load_packed(tmp_path / "out")
    weights = mx.load(str(source / "model.safetensors"))
    for path, module in model.named_modules():
        if hasattr(module, "packed"):
            error = decode(module.packed) - weights[f"{path}.weight"]
            assert mx.linalg.norm(error) < 0.02 * mx.linalg.norm(weights[f"{path}.weight"]), path


@pytest.mark.parametrize("format", ["tq", "turboquant"])
def test_a_second_run_writes_the_same_bytes(source, tmp_path, format):
    for name in ("a", "b"):
        run(source, tmp_path / name, format=format, bits=3)
    assert content(tmp_path / "a") == content(tmp_path / "b")
    assert NAME not in content(tmp_path / "a")
    assert not partial_folder(tmp_path / "a").exists()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_sources_of_every_type(tmp_path, make_checkpoint, dtype):
    folder = make_checkpoint(tmp_path / "m", dtype)
    run(folder, tmp_path / "out", dtype="float32", bits=8, head_bits="none")
    stored, weights = (mx.load(str(path / "model.safetensors")) for path in (tmp_path / "out", folder))
    assert stored["lm_head.weight"].dtype == mx.float32
    assert mx.array_equal(stored["lm_head.weight"], weights["lm_head.weight"].astype(mx.float32))
    model, _ = load_packed(tmp_path / "out")
    dense = weights["model.layers.0.mlp.up_proj.weight"].astype(mx.float32)
    error = decode(model.model.layers[0].mlp.up_proj.packed) - dense
    assert mx.linalg.norm(error) < 0.02 * mx.linalg.norm(dense)


@pytest.mark.parametrize(
    ("mode", "bits", "group_size"), [("affine", 4, 64), ("affine", 8, 32), ("mxfp4", 4, 32), ("mxfp8", 8, 32)]
)
def test_a_source_quantized_by_mlx_lm_gives_the_bytes_of_its_dense_weights(
    tmp_path, make_checkpoint, mode, bits, group_size
):
    from mlx_lm.models import llama

    dense = make_checkpoint(tmp_path / "dense", "bfloat16")
    config = json.loads((dense / "config.json").read_text())
    model = llama.Model(llama.ModelArgs.from_dict(config))
    model.load_weights(str(dense / "model.safetensors"))

    def fits(path, module):
        return hasattr(module, "to_quantized") and module.weight.shape[-1] % group_size == 0

    nn.quantize(model, group_size, bits, mode=mode, class_predicate=fits)
    (tmp_path / "packed").mkdir()
    weights = dict(tree_flatten(model.parameters()))
    mx.save_safetensors(str(tmp_path / "packed" / "model.safetensors"), weights, {"format": "mlx"})
    quantization = {"group_size": group_size, "bits": bits, "mode": mode}
    config |= {"quantization": quantization, "quantization_config": quantization}
    (tmp_path / "packed" / "config.json").write_text(json.dumps(config))
    plain = {name: array for name, array in weights.items() if f"{name.rpartition('.')[0]}.scales" not in weights}
    for path, module in model.named_modules():
        if hasattr(module, "scales"):
            arrays = (module.weight, module.scales, module.get("biases"))
            plain[f"{path}.weight"] = mx.dequantize(*arrays, group_size=group_size, bits=bits, mode=mode)
    mx.save_safetensors(str(dense / "model.safetensors"), plain, {"format": "mlx"})

    for name in ("dense", "packed"):
        run(tmp_path / name, tmp_path / f"{name}-out")
    a, b = content(tmp_path / "dense-out"), content(tmp_path / "packed-out")
    assert a["model.safetensors"] == b["model.safetensors"]
    assert a["config.json"] == b["config.json"]


def test_a_damaged_weight_is_named_and_the_state_kept(tmp_path, make_checkpoint):
    folder = make_checkpoint(tmp_path / "m")
    weights = mx.load(str(folder / "model.safetensors"))
    weights["model.layers.1.mlp.up_proj.weight"][3, 5] = mx.nan
    mx.save_safetensors(str(folder / "model.safetensors"), weights)
    with pytest.raises(TQError, match=r"model\.layers\.1\.mlp\.up_proj: the weight holds NaN"):
        run(folder, tmp_path / "out")
    assert partial_folder(tmp_path / "out").is_dir()
    assert not (tmp_path / "out").exists()


# --- where it cannot write ---


def test_an_existing_output_is_refused_and_left_alone(source, tmp_path):
    for out in (tmp_path / "folder", tmp_path / "file"):
        out.mkdir() if out.name == "folder" else out.write_text("mine")
        with pytest.raises(TQError, match="exists already") as error:
            run(source, out, restart=True)
        assert error.value.hint
        assert not partial_folder(out).exists()
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("restart", [False, True])
def test_a_folder_of_somebody_else_is_left_alone(source, tmp_path, restart):
    """Its name is that of an unfinished output, but tq did not make it."""
    partial_folder(tmp_path / "out").mkdir()
    (partial_folder(tmp_path / "out") / "thesis.txt").write_text("mine")
    with pytest.raises(TQError, match=r"out\.partial exists and is no unfinished conversion"):
        run(source, tmp_path / "out", restart=restart)
    assert content(partial_folder(tmp_path / "out")) == {"thesis.txt": b"mine"}


def test_a_missing_parent_is_made(source, tmp_path):
    run(source, tmp_path / "a" / "b" / "out")
    assert (tmp_path / "a" / "b" / "out" / "config.json").is_file()


def test_a_parent_that_is_a_file_is_said(source, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(TQError, match=r"file/out.partial cannot be written: Not a directory"):
        run(source, tmp_path / "file" / "out")


def test_a_parent_without_permission_is_said(source, tmp_path):
    (tmp_path / "closed").mkdir(mode=0o500)
    if os.access(tmp_path / "closed", os.W_OK):
        pytest.skip("this user may write everywhere")
    with pytest.raises(TQError, match="cannot be written: Permission denied"):
        run(source, tmp_path / "closed" / "out")


def test_too_small_a_disk_is_known_before_anything_is_written(source, tmp_path, monkeypatch):
    plan = plan_of(source)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=plan.size_bytes))
    with pytest.raises(TQError) as error:
        list(convert(plan, tmp_path / "out"))
    assert "GB free, and the result needs 0.06 GB" in error.value.message
    assert error.value.hint
    assert not list(partial_folder(tmp_path / "out").glob("*.safetensors"))


def test_what_is_written_already_needs_no_space_again(source, tmp_path, monkeypatch):
    stop(source, tmp_path / "out", n_tensors(source) - 1)
    there = sum(path.stat().st_size for path in partial_folder(tmp_path / "out").glob("*.safetensors"))
    plan = plan_of(source)
    free = plan.size_bytes - there + convert_module.SPARE_BYTES
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free - 1))
    with pytest.raises(TQError, match="GB free"):
        list(convert(plan_of(source), tmp_path / "out"))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
    list(convert(plan_of(source), tmp_path / "out"))


# --- beside the weights ---


def test_the_config_says_nothing_of_the_source_any_more(tmp_path, make_checkpoint):
    folder = make_checkpoint(tmp_path / "m", "bfloat16")
    config = json.loads((folder / "config.json").read_text())
    stale = {"torch_dtype": "float64", "dtype": "float32", "quantization_config": {"bits": 4}}
    (folder / "config.json").write_text(json.dumps(config | stale | {"text_config": stale | {"rope_theta": 5.0}}))
    run(folder, tmp_path / "out", bits=3, dtype="float16")
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written.pop("quantization") == plan_of(folder, bits=3, dtype="float16").quantization
    assert written.pop("text_config") == {"rope_theta": 5.0}
    assert written.pop("dtype") == "float16"
    assert written == {key: value for key, value in config.items() if key != "torch_dtype"}


def test_without_quantization_the_result_is_a_plain_folder(source, tmp_path):
    from mlx_lm.utils import load_model

    run(source, tmp_path / "out", bits="none", dtype="float32")
    assert "quantization" not in json.loads((tmp_path / "out" / "config.json").read_text())
    tokens = mx.array([[1, 17, 5, 80]])
    logits = [load_model(path)[0](tokens) for path in (source, tmp_path / "out")]
    assert mx.array_equal(*logits)
    assert "quantized" not in (tmp_path / "out" / "README.md").read_text().replace("not quantized", "")


def test_side_files_come_along(tmp_path, make_checkpoint):
    folder = make_checkpoint(tmp_path / "m")
    for name in ("tokenizer.json", "chat_template.jinja", "LICENSE", "README.md", "pytorch_model.bin"):
        (folder / name).write_text(f"source's {name}")
    run(folder, tmp_path / "out")
    written = content(tmp_path / "out")
    assert sorted(written) == [
        "LICENSE", "README.md", "chat_template.jinja", "config.json", "model.safetensors", "tokenizer.json",
    ]  # fmt: skip
    assert written["LICENSE"] == b"source's LICENSE"
    assert written["README.md"].startswith(b"---\nlibrary_name: mlx\n")


def test_memory_is_that_of_one_tensor(tmp_path, make_checkpoint):
    """Many layers: what MLX holds at the worst moment does not grow with their number."""

    def peak(n_layers):
        folder = make_checkpoint(tmp_path / f"m{n_layers}", num_hidden_layers=n_layers, hidden_size=256)
        plan = plan_of(folder, bits=4)
        mx.clear_cache()
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        list(convert(plan, tmp_path / f"out{n_layers}"))
        return mx.get_peak_memory() - before

    assert np.isclose(peak(8), peak(2), rtol=0.3)


def test_everything_is_on_the_disk_before_the_output_appears(source, tmp_path, monkeypatch):
    synchronised: set[str] = set()
    fsync = os.fsync

    def record(descriptor):
        synchronised.add(os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    move = os.rename

    def rename(old, new):
        assert {str(path) for path in [old, *old.rglob("*")]} <= synchronised
        move(old, new)

    if not os.path.isdir("/proc/self/fd"):
        pytest.skip("names of open files are known on Linux only")
    monkeypatch.setattr(os, "fsync", record)
    monkeypatch.setattr(os, "rename", rename)
    run(source, tmp_path / "out")
    assert str(tmp_path) in synchronised
