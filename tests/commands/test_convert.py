"""`tq convert`: the plan, the result, what it refuses, and a state to go on from after Ctrl-C."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from tq.commands.convert import default_out


@pytest.mark.parametrize(
    ("model", "given", "name"),
    [
        ("HuggingFaceTB/SmolLM2-135M", {}, "SmolLM2-135M-tq4"),
        ("/models/x/", {"bits": "3"}, "x-tq3"),
        ("a.Q4_1.gguf", {"bits": "ternary"}, "a.Q4_1-tq-ternary"),
        ("x", {"recipe": "profiles/16gb.toml"}, "x-tq-16gb"),
        ("x", {"codec": "none"}, "x-tq-none"),
        ("x", {"format": "turboquant", "bits": "2"}, "x-turboquant2"),
    ],
)
def test_the_default_output_is_named_for_model_and_bits(model, given, name):
    given = {"format": "tq", "bits": None, "codec": None, "recipe": None} | given
    assert str(default_out(model, given.pop("format"), **given)) == name


def test_dry_run_shows_the_plan_and_writes_nothing(tq, checkpoint, tmp_path):
    result = tq("convert", "-m", checkpoint, "--bits", "3", "--dry-run")
    assert result.code == 0
    table, facts = result.out.split("\n\n")
    assert table.splitlines()[0].split() == ["role", "codes", "tensors", "weights", "bytes", "bits_per_weight"]
    assert {line.split()[0] for line in table.splitlines()[1:]} == {"attention", "value", "mlp", "embedding", "norm"}
    assert [line.split("  ")[0] for line in facts.splitlines()] == [
        "model", "output", "size", "bits per weight", "peak memory", "free disk",
    ]  # fmt: skip
    assert list(tmp_path.iterdir()) == []


def test_dry_run_as_json_is_exact_to_the_byte(tq, checkpoint, tmp_path):
    plan = json.loads(tq("convert", "-m", checkpoint, "-b", "3", "--head-bits", "8", "--dry-run", "--json").out)
    assert (plan["model"], plan["out"]) == (str(checkpoint), "tiny-tq3")
    done = tq("convert", "-m", checkpoint, "-b", "3", "--head-bits", "8", "--json")
    document = json.loads(done.out)
    assert document["size_bytes"] == plan["size_bytes"]
    assert document["seconds"] > 0
    stored = (tmp_path / "tiny-tq3" / "model.safetensors").read_bytes()
    header = int.from_bytes(stored[:8], "little")
    assert len(stored) - 8 - header == plan["size_bytes"]
    assert {tensor["spec"]["bits"] for tensor in plan["tensors"] if tensor["role"] == "attention"} == {3}
    assert {tensor["spec"]["bits"] for tensor in plan["tensors"] if tensor["role"] == "embedding"} == {8}


def test_result_names_the_next_command(tq, checkpoint, tmp_path):
    done = tq("convert", "-m", checkpoint, "-o", "my model")
    assert done.code == 0
    assert done.out.startswith("my model: ")
    assert done.err.endswith("Try it: tq run -m 'my model' \"What is gravity?\"\n")
    assert (tmp_path / "my model" / "config.json").is_file()


def test_quiet_leaves_only_the_result(tq, checkpoint):
    done = tq("convert", "-m", checkpoint, "-o", "out", "-q")
    assert done.err == ""
    assert len(done.out.splitlines()) == 1


def test_aliases_of_mlx_lm_work_and_are_hidden(tq, checkpoint, tmp_path):
    assert tq("convert", "--hf-path", checkpoint, "--mlx-path", "out").code == 0
    assert (tmp_path / "out").is_dir()
    assert "--hf-path" not in tq("convert", "--help").out


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--bits", "9"], 2, "error: --bits 9 is not one of 1 to 8, ternary, none"),
        (["--group-size", "48"], 2, "error: --group-size 48 is not one of 32, 64, 128, row"),
        (["--codec", "lloydmax"], 2, "error: --codec 'lloydmax' is not one of lloyd-max, ternary, affine, none"),
        (["--rotation", "x"], 2, "error: --rotation 'x' is not one of hadamard, none"),
        (["--protect", "1-x"], 2, "error: layers '1-x' are not a list such as 0-1,30"),
        (["--recipe", "missing.toml"], 2, "error: no recipe file or profile 'missing.toml'"),
        (["-o", "."], 1, "error: . exists already"),
        (["--revision", "main"], 2, "error: "),
    ],
)
def test_what_cannot_be_is_said_in_a_sentence(tq, checkpoint, arguments, code, message):
    result = tq("convert", "-q", "-m", checkpoint, *arguments)
    assert (result.code, result.out) == (code, "")
    assert result.err.splitlines()[0].startswith(message)
    assert "internal error" not in result.err


def test_no_such_model(tq):
    result = tq("convert", "-m", "./nothing")
    assert (result.code, result.err.splitlines()[0]) == (1, "error: no such model: ./nothing")


def test_ctrl_c_leaves_a_state_that_the_same_command_goes_on_from(tmp_path, checkpoint, program):
    """A real SIGINT in the middle of the work; the resumed bytes are those of an uninterrupted run."""
    # A conversion that waits after its third tensor, so that the signal has something to interrupt.
    slow = (
        "import sys, time\n"
        "import tq.engine.model.encoding as module\n"
        "encode, count = module.encode, 0\n"
        "def waiting(*args):\n"
        "    global count\n"
        "    count += 1\n"
        "    if count == 3:\n"
        "        print('ready', flush=True)\n"
        "        time.sleep(60)\n"
        "    return encode(*args)\n"
        "module.encode = waiting\n"
        "from tq.cli import run_command\n"
        "sys.exit(run_command(sys.argv[1:]))\n"
    )
    arguments = ["convert", "-m", str(checkpoint), "-o", "out"]
    command = [sys.executable, "-c", slow, *arguments]
    root = os.path.dirname(os.path.dirname(os.path.dirname(__file__)))
    process = subprocess.Popen(
        command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": root}, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout.readline() == b"ready\n"
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err.decode().endswith(
        "warning: stopped; the same command goes on from here, with --restart it starts over\n"
    )
    assert not (tmp_path / "out").exists()

    resumed = program(*arguments)
    assert resumed.code == 0
    assert "resuming: " in resumed.err
    assert program(*arguments[:-1], "whole").code == 0
    assert (tmp_path / "out/model.safetensors").read_bytes() == (tmp_path / "whole/model.safetensors").read_bytes()
