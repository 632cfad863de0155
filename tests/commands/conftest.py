"""Commands run as a person runs them: in this process for speed, or as a program of their own."""

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@dataclass
class Result:
    code: int
    out: str
    err: str


@pytest.fixture
def tq(capfd, monkeypatch, tmp_path):
    """tq("run", "-m", ...) in this process, in an empty folder, with nothing on stdin unless `stdin` says so."""
    import io

    from tq.cli import run_command

    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TQ_REQUIRE_EMULATOR", raising=False)  # of the tests, and no setting of tq

    def call(*arguments, stdin: str = "") -> Result:
        monkeypatch.setattr("sys.stdin", io.StringIO(stdin))
        capfd.readouterr()
        code = run_command([str(argument) for argument in arguments])
        return Result(code, *capfd.readouterr())

    return call


@pytest.fixture
def program(tmp_path):
    """The same as a process of its own; `code` is Python to run instead of `-m tq`."""

    def call(*arguments, code: str | None = None, stdin: str = "", timeout: float = 120, **environment) -> Result:
        command = [sys.executable, *(["-m", "tq"] if code is None else ["-c", code]), *map(str, arguments)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
        done = subprocess.run(
            command, input=stdin, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=timeout
        )
        return Result(done.returncode, done.stdout, done.stderr)

    return call


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """A folder with a tiny random llama and its byte-level tokenizer, as a snapshot of the Hub would be."""
    import json

    import mlx.core as mx
    from mlx.utils import tree_flatten
    from mlx_lm.models import llama
    from small_models import VOCAB, byte_tokenizer

    config = {
        "model_type": "llama",
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "intermediate_size": 96,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-5,
        "vocab_size": VOCAB,
        "max_position_embeddings": 256,
        "tie_word_embeddings": True,
    }
    folder = tmp_path_factory.mktemp("models") / "tiny"
    folder.mkdir()
    mx.random.seed(7)
    model = llama.Model(llama.ModelArgs.from_dict(config))
    mx.save_safetensors(str(folder / "model.safetensors"), dict(tree_flatten(model.parameters())))
    (folder / "config.json").write_text(json.dumps(config))
    byte_tokenizer().save_pretrained(folder)
    return folder
