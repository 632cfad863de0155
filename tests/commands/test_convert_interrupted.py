"""`tq convert` as a process of its own that is killed, interrupted, stopped and started twice."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

ROOT = Path(__file__).parents[2]
JOURNAL = Path("out.partial/conversion.jsonl")
N_LAYERS = 24  # small matrices, but many: a second of work
SETTINGS = ["-o", "out", "--bits", "3", "--mlp-bits", "ternary"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    from mlx_lm.models import llama

    config = {
        "model_type": "llama",
        "hidden_size": 64,
        "num_hidden_layers": N_LAYERS,
        "intermediate_size": 96,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-5,
        "vocab_size": 160,
        "tie_word_embeddings": False,
    }
    folder = tmp_path_factory.mktemp("model")
    mx.random.seed(5)
    weights = dict(tree_flatten(llama.Model(llama.ModelArgs.from_dict(config)).parameters()))
    mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "mlx"})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def start(folder, model, *settings):
    command = [sys.executable, "-m", "tq", "convert", "-m", str(model), *(settings or SETTINGS)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def finish(folder, model, *settings):
    process = start(folder, model, *settings)
    out, err = process.communicate(timeout=240)
    return process.returncode, out, err


def lines(folder):
    try:
        return (folder / JOURNAL).read_bytes().count(b"\n")
    except FileNotFoundError:
        return 0


def send(process, number, folder, at_line):
    """Sends a signal once the journal has that many lines."""
    deadline = time.monotonic() + 240
    while lines(folder) < at_line and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.001)
    process.send_signal(number)
    if number == signal.SIGSTOP:
        return None
    _, err = process.communicate(timeout=240)
    assert process.returncode != 0, "the conversion was done before the signal came"
    assert not (folder / "out").exists()
    return err


def content(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def whole(model, tmp_path_factory):
    """What an uninterrupted run writes."""
    folder = tmp_path_factory.mktemp("whole")
    assert finish(folder, model)[0] == 0
    return content(folder / "out")


def n_lines(whole):
    """Lines of a complete journal: one for each tensor, and its head."""
    data = whole["model.safetensors"]
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return len(header.keys() - {"__metadata__"}) + 1


@pytest.mark.parametrize("at_line", [1, 2, 101, -30])
def test_killed_and_run_again_the_bytes_are_the_same(model, tmp_path, whole, at_line):
    at_line %= n_lines(whole)
    process = start(tmp_path, model)
    send(process, signal.SIGKILL, tmp_path, at_line)
    assert process.returncode == -signal.SIGKILL
    assert at_line <= lines(tmp_path) < n_lines(whole)
    code, _, err = finish(tmp_path, model)
    assert code == 0, err
    assert ("resuming: " in err) or at_line < 100
    assert content(tmp_path / "out") == whole
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_killed_again_and_again(model, tmp_path, whole):
    reached = 0
    for at_line in (50, 150, 250):
        send(start(tmp_path, model), signal.SIGKILL, tmp_path, at_line)
        assert reached < lines(tmp_path) < n_lines(whole)
        reached = lines(tmp_path)
    code, _, err = finish(tmp_path, model)
    assert code == 0, err
    assert content(tmp_path / "out") == whole


def test_ctrl_c_says_how_to_go_on(model, tmp_path, whole):
    process = start(tmp_path, model)
    err = send(process, signal.SIGINT, tmp_path, 60)
    assert process.returncode == 130
    assert err.endswith("warning: stopped; the same command goes on from here, with --restart it starts over\n")
    assert "Traceback" not in err
    code, _, err = finish(tmp_path, model)
    assert code == 0 and "resuming: " in err
    assert content(tmp_path / "out") == whole


def test_other_settings_need_restart(model, tmp_path, whole):
    other = ["-o", "out", "--bits", "4"]
    send(start(tmp_path, model, *other), signal.SIGKILL, tmp_path, 60)
    code, out, err = finish(tmp_path, model)
    assert (code, out) == (1, "")
    assert "error: out.partial holds an unfinished conversion with other settings or of another source" in err
    assert "--restart" in err
    code, _, err = finish(tmp_path, model, *SETTINGS, "--restart")
    assert code == 0, err
    assert "resuming: " not in err
    assert content(tmp_path / "out") == whole


@pytest.mark.parametrize("more", [[], ["--restart"]])
def test_a_second_process_is_sent_away_and_disturbs_nothing(model, tmp_path, whole, more):
    first = start(tmp_path, model)
    send(first, signal.SIGSTOP, tmp_path, 60)
    try:
        before = content(tmp_path / "out.partial")
        code, out, err = finish(tmp_path, model, *SETTINGS, *more)
        assert (code, out) == (1, "")
        assert "error: another tq convert is writing out.partial" in err
        assert content(tmp_path / "out.partial") == before
    finally:
        first.send_signal(signal.SIGCONT)
    first.communicate(timeout=240)
    assert first.returncode == 0
    assert content(tmp_path / "out") == whole


def test_a_finished_output_is_not_touched(model, tmp_path, whole):
    (tmp_path / "out").mkdir()
    for name, data in whole.items():
        (tmp_path / "out" / name).write_bytes(data)
    code, out, err = finish(tmp_path, model, *SETTINGS, "--restart")
    assert (code, out) == (1, "")
    assert "error: out exists already" in err
    assert content(tmp_path / "out") == whole
