"""What a person is told when a model has to come from the Hugging Face Hub, and does not."""

import errno
import logging
import os
import socket
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import constants, errors

from tq.engine.model import hub
from tq.engine.model.sources import open_source
from tq.errors import TQError

MODEL = "some-org/Some-Model_1.5B"


class Response:
    def __init__(self, status_code):
        self.status_code = status_code
        self.headers = {}
        self.request = None


def http_error(kind, status):
    error = kind.__new__(kind)
    Exception.__init__(error, f"{status} Client Error")
    error.response = Response(status)
    return error


def chained(error, cause):
    error.__cause__ = cause
    return error


# The HTTP library's errors are known by their base class, because the library differs between versions.
TransportError = type("TransportError", (Exception,), {})
ConnectError = type("ConnectError", (TransportError,), {})
ReadTimeout = type("ReadTimeout", (TransportError,), {})


@pytest.fixture
def fake_hub(monkeypatch):
    """Replaces the two calls that reach the network; ``calls`` lists what was asked of them."""

    class Hub:
        info: BaseException | None = None
        download: BaseException | str = "unset"
        cached: BaseException | str = errors.LocalEntryNotFoundError("not cached")

        def __init__(self):
            self.calls = []

    fake = Hub()

    def model_info(self, repo_id, *, revision=None, timeout=None):
        fake.calls.append(("info", repo_id, revision, timeout))
        if fake.info is not None:
            raise fake.info

    def snapshot_download(repo_id, *, revision, allow_patterns, local_files_only):
        fake.calls.append(("cache" if local_files_only else "download", repo_id, revision, allow_patterns))
        result = fake.cached if local_files_only else fake.download
        if isinstance(result, BaseException):
            raise result
        return result

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", model_info)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    return fake


def failure(model=MODEL, revision=None):
    with pytest.raises(TQError) as caught:
        hub.resolve(model, revision)
    assert "\n" not in caught.value.message
    return caught.value.message, caught.value.hint or ""


def test_a_snapshot_is_downloaded_without_pickle_and_code(fake_hub, tmp_path):
    fake_hub.download = str(tmp_path)
    assert hub.resolve(MODEL, "v2") == tmp_path
    kinds = [call[0] for call in fake_hub.calls]
    assert kinds == ["info", "download"]
    patterns = fake_hub.calls[1][3]
    assert not {"*.py", "*.bin", "*"} & set(patterns) and "model*.safetensors" in patterns
    assert fake_hub.calls[0][2:] == ("v2", hub.CONNECT_SECONDS)
    hub.resolve(MODEL, trust_remote_code=True)
    assert "*.py" in fake_hub.calls[-1][3]


def test_a_local_path_never_touches_the_network(fake_hub, tmp_path, monkeypatch):
    (tmp_path / "org" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert hub.resolve("org/model") == Path("org/model")
    assert hub.resolve(str(tmp_path)) == tmp_path
    failure("./org/absent")
    failure("absent.gguf")
    assert fake_hub.calls == []


def test_an_unknown_repository(fake_hub):
    fake_hub.info = http_error(errors.RepositoryNotFoundError, 401)
    message, hint = failure()
    assert message == f"{MODEL} is neither a local path nor a repository of the Hugging Face Hub"
    assert "spelling" in hint and "HF_TOKEN" in hint


def test_a_gated_repository(fake_hub):
    fake_hub.info = http_error(errors.GatedRepoError, 403)
    message, hint = failure()
    assert message == f"{MODEL} is gated: its owner must grant you access"
    assert f"/{MODEL} " in hint and "HF_TOKEN" in hint


def test_access_refused_only_for_the_files(fake_hub):
    fake_hub.download = http_error(errors.GatedRepoError, 403)
    assert "gated" in failure()[0]


def test_an_unknown_revision(fake_hub):
    fake_hub.info = http_error(errors.RevisionNotFoundError, 404)
    assert failure(revision="nope")[0] == f"{MODEL} has no revision nope"


def test_a_disabled_repository(fake_hub):
    fake_hub.info = http_error(errors.DisabledRepoError, 403)
    assert "disabled" in failure()[0]


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_hub_in_trouble(fake_hub, status):
    fake_hub.info = http_error(errors.HfHubHTTPError, status)
    assert failure()[0] == f"the Hugging Face Hub answered {status} for {MODEL}"


@pytest.mark.parametrize(
    "error",
    [
        ConnectError("[Errno -2] Name or service not known"),
        ReadTimeout("timed out"),
        ConnectionResetError(104, "reset"),
        TimeoutError(),
        chained(OSError("cannot connect"), socket.gaierror(-2, "Name or service not known")),
    ],
    ids=lambda error: type(error).__name__,
)
@pytest.mark.parametrize("step", ["info", "download"])
def test_no_network(fake_hub, error, step):
    setattr(fake_hub, step, error)
    message, hint = failure()
    assert message == f"{MODEL} is no local path, and the Hugging Face Hub cannot be reached"
    assert "local path" in hint and "HF_HUB_OFFLINE=1" in hint


def test_no_network_but_a_cached_snapshot(fake_hub, tmp_path, caplog):
    fake_hub.info = ConnectError("down")
    fake_hub.cached = str(tmp_path)
    with caplog.at_level(logging.WARNING):
        assert hub.resolve(MODEL) == tmp_path
    assert "using the cached" in caplog.text


def test_offline_and_not_cached(fake_hub, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    message, hint = failure()
    assert message == f"{MODEL} is not in the Hub's cache, and HF_HUB_OFFLINE forbids the network"
    assert "HF_HUB_OFFLINE" in hint
    assert [call[0] for call in fake_hub.calls] == ["cache"]


def test_offline_and_partly_cached(fake_hub, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    fake_hub.cached = type("IncompleteSnapshotError", (errors.LocalEntryNotFoundError,), {})("missing files")
    assert "only partly" in failure()[0]


def test_offline_and_cached(fake_hub, monkeypatch, tmp_path):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    fake_hub.cached = str(tmp_path)
    assert hub.resolve(MODEL) == tmp_path


def test_a_full_disk(fake_hub):
    fake_hub.download = OSError(errno.ENOSPC, "No space left on device")
    message, hint = failure()
    assert "the disk is full" in message and str(constants.HF_HUB_CACHE) in message
    assert "HF_HOME" in hint


def test_a_cache_that_cannot_be_written(fake_hub):
    fake_hub.download = PermissionError(errno.EACCES, "Permission denied")
    assert failure()[0].endswith("Permission denied")


def test_a_name_the_hub_refuses(fake_hub):
    fake_hub.info = errors.HFValidationError("bad")
    assert failure()[0].startswith("no such model")


def test_a_fault_in_the_program_is_not_dressed_up(fake_hub):
    fake_hub.info = AttributeError("a bug")
    with pytest.raises(AttributeError):
        hub.resolve(MODEL)


def test_a_cached_model_opens_offline_with_its_commit(tmp_path):
    """The real huggingface_hub, in a process of its own because it reads the environment once."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "hub" / "models--org--tiny"
    snapshot = repository / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    (snapshot / "config.json").write_text('{"model_type": "llama"}')
    header = b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    (snapshot / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    code = "from tq.engine.model.sources import open_source as o; s = o('org/tiny'); print(s.base_model, s.revision)"
    done = run_offline(tmp_path, code)
    assert done.stdout.split() == ["org/tiny", commit], done.stderr


def test_an_uncached_model_fails_offline_in_one_sentence(tmp_path):
    done = run_offline(tmp_path, "from tq.engine.model.sources import open_source; open_source('org/absent')")
    last = done.stderr.strip().splitlines()[-1]
    assert last.endswith("org/absent is not in the Hub's cache, and HF_HUB_OFFLINE forbids the network")


def run_offline(home, code):
    environment = os.environ | {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1"}
    environment.pop("HF_HUB_CACHE", None)
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)


def test_a_source_from_the_hub_names_its_base_model(fake_hub, tmp_path):
    (tmp_path / "abc").mkdir()
    (tmp_path / "abc" / "config.json").write_text('{"model_type": "llama"}')
    fake_hub.download = str(tmp_path / "abc")
    with pytest.raises(TQError, match=r"no model\*\.safetensors"):
        open_source(MODEL)
    header = b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    (tmp_path / "abc" / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    source = open_source(MODEL)
    assert (source.name, source.base_model, source.revision) == (MODEL, MODEL, "abc")
