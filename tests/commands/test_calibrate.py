"""`tq calibrate`, and `tq convert` with --calibrate and --calibration."""

import json
import signal

import pytest

TOKENS = ["--tokens", "512", "--seq-len", "128"]
ONE_PASS = ["--bits", "3", "--calibrate", "--calibration-tokens", "512"]


def recorded(folder):
    return json.loads((folder / "config.json").read_text())["quantization"].get("calibration")


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_calibration_serves_several_conversions(tq, checkpoint, tmp_path):
    made = tq("calibrate", "-m", checkpoint, "-o", "calibration", *TOKENS, "--json")
    assert made.code == 0, made.err
    document = json.loads(made.out)
    assert document["calibration_text"] == {
        "text": "calibration.txt of tq",
        "sha256": document["calibration_text"]["sha256"],
        "tokens": 512,
        "seq_len": 128,
    }
    assert document["matrices"] == 15  # seven of each layer, and the embedding, which is the head too
    assert 0 < document["size_bytes"] <= document["size_bytes_at_most"] + 20000  # headers and the index
    assert document["calibration_memory_bytes"] > 0
    for bits in ("2", "3"):
        done = tq("convert", "-m", checkpoint, "-o", f"out{bits}", "--bits", bits, "--calibration", "calibration")
        assert done.code == 0, done.err
        assert recorded(tmp_path / f"out{bits}")["method"] == "moments"
    plain = tq("convert", "-m", checkpoint, "-o", "plain", "--bits", "2")
    assert plain.code == 0
    assert recorded(tmp_path / "plain") is None
    assert (tmp_path / "plain/model.safetensors").read_bytes() != (tmp_path / "out2/model.safetensors").read_bytes()


def test_converting_calibrates_in_one_command(tq, checkpoint, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("".join(f"{i} green bottles stand on the wall. " for i in range(200)))
    done = tq("convert", "-m", checkpoint, "-o", "out", *ONE_PASS, "--calibration-text", "text.txt", "--json")
    assert done.code == 0, done.err
    document = json.loads(done.out)
    assert document["calibration_text"]["text"] == "text.txt"
    assert document["calibration_disk_bytes"] > 0
    assert recorded(tmp_path / "out") == {"method": "one pass", **document["calibration_text"]}
    assert tq("run", "-m", "out", "-n", "2", "hello").code == 0


@pytest.mark.parametrize("command", [["calibrate", *TOKENS], ["convert", *ONE_PASS]])
def test_a_dry_run_says_what_it_takes_and_writes_nothing(tq, checkpoint, tmp_path, command):
    done = tq(*command, "-m", checkpoint, "-o", "out", "--dry-run")
    assert done.code == 0, done.err
    assert "calibration memory" in done.out
    assert "calibration time" in done.out
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["calibrate", "-o", "out", "--text", "short.txt"], 1, "error: the text has 5 tokens and one window of 256 "),
        (["calibrate", "-o", "out", "--text", "missing.txt"], 1, "error: cannot read missing.txt"),
        (["calibrate", "-o", "out", "--tokens", "0"], 2, "error: 0 tokens are less than one window of 256"),
        (["calibrate", "-o", "out", "--seq-len", "512"], 2, "error: seq_len must be from 2 to 256, not 512"),
        (["calibrate", "-o", "there"], 1, "error: there exists already"),
        (["convert", "-o", "out", "--calibration", "there"], 1, "error: there is no calibration: "),
        (["convert", "-o", "out", "--calibrate", "--calibration", "c"], 2, "error: --calibration takes a finished "),
        (
            ["convert", "-o", "out", "--calibration-tokens", "9"],
            2,
            "error: --calibration-text and --calibration-tokens",
        ),
    ],
)
def test_mistakes_are_explained(tq, checkpoint, tmp_path, arguments, code, message):
    (tmp_path / "short.txt").write_text("short")
    (tmp_path / "there").mkdir()
    done = tq(*arguments, "-m", checkpoint)
    assert message in done.err
    assert done.code == code
    assert not (tmp_path / "out").exists()


DIES = """
import os, signal, sys
import tq.engine.model.encoding as module
encode, count = module.encode, 0
def dying(*args):
    global count
    count += 1
    if count == 6:
        os.kill(os.getpid(), signal.SIGKILL)
    return encode(*args)
module.encode = dying
from tq.cli import run_command
sys.exit(run_command(sys.argv[1:]))
"""


def test_a_killed_conversion_goes_on_and_gives_the_same_bytes(tq, program, checkpoint, tmp_path):
    arguments = ["convert", "-m", checkpoint, "-o", "out", *ONE_PASS]
    assert program(*arguments, code=DIES).code == -signal.SIGKILL
    assert len(list((tmp_path / "out.partial/encoded").glob("*.safetensors"))) == 5
    resumed = tq(*arguments)
    assert resumed.code == 0, resumed.err
    assert "resuming: 5 matrices are encoded" in resumed.err
    assert tq("convert", "-m", checkpoint, "-o", "whole", *ONE_PASS).code == 0
    assert content(tmp_path / "out") == content(tmp_path / "whole")


@pytest.mark.parametrize(("bits", "said"), [("3", True), ("ternary", True), ("4", False)])
def test_few_bits_without_calibration_are_advised_against(tq, checkpoint, tmp_path, bits, said):
    result = tq("convert", "-m", checkpoint, "-o", tmp_path / "out", "--bits", bits, "--dry-run")
    assert (result.code, "--calibrate makes a much better model" in result.err) == (0, said)
