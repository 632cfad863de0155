"""`collect`: the moments are those of what mlx-lm's own modules are called with, and a stopped run goes on."""

import json

import mlx.core as mx
import numpy as np
import pytest
from calibrated_models import linear_inputs
from tiny_models import write_checkpoint

from tq.engine.events import Note, Progress
from tq.engine.model.calibration import CalibratedEncoder, read_index, read_moments
from tq.engine.model.convert import convert
from tq.engine.model.plan import make_plan
from tq.engine.model.recipe import Recipe
from tq.engine.model.sources import open_source
from tq.engine.run.calibrate.collect import Collected, collect, collected_bytes
from tq.engine.run.calibrate.text import Sample
from tq.errors import TQError

WINDOWS = np.random.default_rng(0).integers(3, 90, (3, 11)).astype(np.int32)
SAMPLE = Sample("text", "0", WINDOWS.size, WINDOWS.shape[1])


@pytest.fixture(autouse=True)
def no_compile():
    mx.disable_compile()
    yield
    mx.enable_compile()


def plan_of(folder, **options):
    return make_plan(open_source(str(folder)), Recipe.from_options(**{"bits": 3} | options), dtype="float32")


@pytest.mark.parametrize("model_type", ["llama", "mamba2"])
def test_moments_are_those_of_the_inputs_of_each_linear_module(model_type, tmp_path):
    write_checkpoint(tmp_path / "model", model_type)
    plan = plan_of(tmp_path / "model")
    at_most = collected_bytes(plan)
    *_, done = collect(plan, WINDOWS, SAMPLE, tmp_path / "out")
    assert isinstance(done, Collected)
    assert not (tmp_path / "out.partial").exists()
    index = read_index(tmp_path / "out")
    assert sum(f.stat().st_size for f in (tmp_path / "out").glob("*.safetensors")) < at_most + 1000 * len(
        index.matrices
    )
    expected = linear_inputs(model_type, WINDOWS)
    checked = [path for path, (file, _) in index.matrices.items() if file and path in expected]
    assert len(checked) >= 5
    for path in checked:
        rows = expected[path]
        found = read_moments(tmp_path / "out" / index.matrices[path][0])
        assert found.count == len(rows)
        mean = rows.T @ rows / len(rows)
        strength = np.sqrt(np.outer(np.diagonal(mean), np.diagonal(mean))) + 1e-12
        assert np.abs((found.mean() - mean) / strength).max() < 2e-3


def test_matrices_that_read_one_activation_share_a_file(tmp_path):
    write_checkpoint(tmp_path / "model", "llama")
    list(collect(plan_of(tmp_path / "model"), WINDOWS, SAMPLE, tmp_path / "out"))
    matrices = read_index(tmp_path / "out").matrices
    layer = "model.layers.1"
    files = {name: matrices[f"{layer}.{name}"][0] for name in ("self_attn.q_proj", "self_attn.k_proj", "mlp.gate_proj")}
    assert files["self_attn.q_proj"] == files["self_attn.k_proj"] != files["mlp.gate_proj"]
    assert files["mlp.gate_proj"] == matrices[f"{layer}.mlp.up_proj"][0]
    read = {file for file, _ in matrices.values() if file}
    assert read == {path.name for path in (tmp_path / "out").glob("*.safetensors")}


def test_experts_are_counted_once_a_layer(tmp_path):
    write_checkpoint(tmp_path / "model", "qwen3_moe")
    plan = plan_of(tmp_path / "model")
    config = plan.source.config
    list(collect(plan, WINDOWS, SAMPLE, tmp_path / "out"))
    experts = read_index(tmp_path / "out").experts
    blocks = {path.rpartition(".")[0] for path, matrix in plan.outline.matrices.items() if matrix.kind == "switch"}
    assert {path.rpartition(".")[0] for path in experts} == blocks
    assert len(experts) == len(blocks) > 0
    for counts in experts.values():
        assert len(counts) == config["num_experts"]
        assert sum(counts) == WINDOWS.size * config["num_experts_per_tok"]


def stop_after(events, n):
    for i, _ in enumerate(e for e in events if isinstance(e, Progress)):
        if i == n:
            break
    events.close()


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_stopped_calibration_goes_on_and_gives_the_same_bytes(tmp_path):
    write_checkpoint(tmp_path / "model", "qwen3_moe")
    list(collect(plan_of(tmp_path / "model"), WINDOWS, SAMPLE, tmp_path / "whole"))
    stop_after(collect(plan_of(tmp_path / "model"), WINDOWS, SAMPLE, tmp_path / "out"), 7)
    begun = {path: path.stat().st_mtime_ns for path in (tmp_path / "out.partial").glob("*.safetensors")}
    assert 0 < len(begun) < len(list((tmp_path / "whole").glob("*.safetensors")))
    events = list(collect(plan_of(tmp_path / "model"), WINDOWS, SAMPLE, tmp_path / "out"))
    assert any(isinstance(e, Note) and "resuming" in e.message for e in events)
    assert files(tmp_path / "out") == files(tmp_path / "whole")
    for path, written in begun.items():
        assert (tmp_path / "out" / path.name).stat().st_mtime_ns == written, "it was measured again"


def test_another_text_does_not_go_on_with_what_was_begun(tmp_path):
    write_checkpoint(tmp_path / "model", "llama")
    stop_after(collect(plan_of(tmp_path / "model"), WINDOWS, SAMPLE, tmp_path / "out"), 3)
    other = Sample("other", "1", WINDOWS.size, WINDOWS.shape[1])
    with pytest.raises(TQError, match="holds an unfinished calibration with other settings"):
        list(collect(plan_of(tmp_path / "model"), WINDOWS, other, tmp_path / "out"))
    list(collect(plan_of(tmp_path / "model"), WINDOWS, other, tmp_path / "out", restart=True))
    assert read_index(tmp_path / "out").sample["text"] == "other"


def test_a_conversion_uses_them_and_says_so(tmp_path):
    write_checkpoint(tmp_path / "model", "llama")
    list(collect(plan_of(tmp_path / "model"), WINDOWS, SAMPLE, tmp_path / "calibration"))
    encoder = CalibratedEncoder(tmp_path / "calibration")
    plan = plan_of(tmp_path / "model")
    assert encoder.check(plan) == []
    list(convert(plan, tmp_path / "out", encoder=encoder))
    recorded = open_recorded(tmp_path / "out")
    assert (recorded["method"], recorded["text"], recorded["tokens"]) == ("moments", "text", WINDOWS.size)


def open_recorded(folder):
    return json.loads((folder / "config.json").read_text())["quantization"]["calibration"]


@pytest.mark.parametrize(
    ("model_type", "message"), [("mamba2", "inputs here and"), ("mixtral", "inputs here and does not exist there")]
)
def test_the_calibration_of_another_model_is_refused(model_type, message, tmp_path):
    write_checkpoint(tmp_path / "model", "llama")
    write_checkpoint(tmp_path / "other", model_type)
    list(collect(plan_of(tmp_path / "model"), WINDOWS, SAMPLE, tmp_path / "calibration"))
    with pytest.raises(TQError, match=f"is the calibration of another model: .*{message}"):
        CalibratedEncoder(tmp_path / "calibration").check(plan_of(tmp_path / "other"))


def test_what_was_measured_for_a_journal_that_is_lost_is_measured_again(tmp_path):
    """A power cut may leave whole files and an empty journal: whose they are, nobody knows."""
    write_checkpoint(tmp_path / "model", "llama")
    list(collect(plan_of(tmp_path / "model"), WINDOWS + 1, SAMPLE, tmp_path / "whole"))
    stop_after(collect(plan_of(tmp_path / "model"), WINDOWS, SAMPLE, tmp_path / "out"), 7)
    assert list((tmp_path / "out.partial").glob("*.safetensors"))
    (tmp_path / "out.partial" / "conversion.jsonl").write_bytes(b"")
    list(collect(plan_of(tmp_path / "model"), WINDOWS + 1, SAMPLE, tmp_path / "out"))
    assert files(tmp_path / "out") == files(tmp_path / "whole")


def test_a_calibration_with_another_number_of_experts_is_refused(tmp_path):
    write_checkpoint(tmp_path / "model", "qwen3_moe")
    list(collect(plan_of(tmp_path / "model"), WINDOWS, SAMPLE, tmp_path / "calibration"))
    document = json.loads((tmp_path / "calibration" / "calibration.json").read_text())
    document["experts"] = {path: [*counts, 3] for path, counts in document["experts"].items()}
    (tmp_path / "calibration" / "calibration.json").write_text(json.dumps(document))
    with pytest.raises(TQError, match=r"is the calibration of another model: .* experts here and"):
        CalibratedEncoder(tmp_path / "calibration").check(plan_of(tmp_path / "model"))


def test_a_conversion_does_not_go_on_with_moments_of_other_weights(tmp_path):
    write_checkpoint(tmp_path / "model", "llama")
    list(collect(plan_of(tmp_path / "model"), WINDOWS, SAMPLE, tmp_path / "calibration"))
    encoder = CalibratedEncoder(tmp_path / "calibration")
    stop_after(convert(plan_of(tmp_path / "model"), tmp_path / "out", encoder=encoder), 5)
    (index,) = (tmp_path / "calibration").glob("*.json")
    document = json.loads(index.read_text())
    index.write_text(json.dumps(document | {"source": "other files"}))
    encoder = CalibratedEncoder(tmp_path / "calibration")
    with pytest.raises(TQError, match="holds an unfinished conversion with other settings"):
        list(convert(plan_of(tmp_path / "model"), tmp_path / "out", encoder=encoder))
