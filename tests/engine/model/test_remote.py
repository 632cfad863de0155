"""A model of the Hub that is planned from its headers: huggingface_hub is replaced by one that serves a folder."""

import json
from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub import constants, errors

from tq.engine.model import hub
from tq.engine.model.remote import CONFIG_FILES, RemoteSource, open_headers
from tq.engine.model.safetensors import read_headers
from tq.engine.model.sources import FolderSource, GGUFSource
from tq.errors import TQError

MODEL = "some-org/Some-Model"


def served(folder):
    """What huggingface_hub reads of a folder's shards, by ranged requests."""
    files, weight_map = {}, {}
    for path in sorted(folder.glob("*.safetensors")):
        headers, _ = read_headers(path)
        start = min(header.offset for header in headers.values())
        files[path.name] = SimpleNamespace(
            tensors={
                name: SimpleNamespace(
                    dtype=h.dtype,
                    shape=list(h.shape),
                    data_offsets=(h.offset - start, h.offset - start + h.size_bytes),
                )
                for name, h in headers.items()
            }
        )
        weight_map |= dict.fromkeys(headers, path.name)
    return SimpleNamespace(files_metadata=files, weight_map=weight_map)


@pytest.fixture
def repository(make_checkpoint, tmp_path, monkeypatch):
    """A model on the Hub: its config is in the cache once it is asked for, its weights never are."""
    folder = make_checkpoint(tmp_path / "there", "bfloat16")
    cache = tmp_path / "cache" / "snapshots" / "0123abc"
    cache.mkdir(parents=True)
    state = SimpleNamespace(folder=folder, cache=cache, asked=[], failure=None, metadata=served(folder))

    def snapshot_download(repo_id, *, revision, allow_patterns, local_files_only):
        state.asked.append((repo_id, revision, tuple(allow_patterns)))
        (cache / "config.json").write_text((folder / "config.json").read_text())
        return str(cache)

    def get_safetensors_metadata(repo_id, *, revision):
        state.asked.append((repo_id, revision, "headers"))
        if state.failure is not None:
            raise state.failure
        return state.metadata

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *_, **__: None)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.setattr(huggingface_hub, "get_safetensors_metadata", get_safetensors_metadata)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    return state


def test_headers_are_those_of_the_files(repository):
    source = open_headers(MODEL, "v2")
    assert isinstance(source, RemoteSource)
    local = FolderSource(repository.folder, name="local")
    assert {n: (h.dtype, h.shape, h.size_bytes) for n, h in source.headers.items()} == {
        n: (h.dtype, h.shape, h.size_bytes) for n, h in local.headers.items()
    }
    assert source.config == local.config
    assert (source.revision, source.base_model) == ("0123abc", MODEL)
    # Two small files and the headers: no weights.
    assert {asked[2] for asked in repository.asked} == {tuple(CONFIG_FILES), "headers"}
    assert repository.asked[-1][:2] == (MODEL, "0123abc")


def test_a_plan_is_that_of_the_downloaded_model(repository):
    from tq.engine.model.plan import make_plan
    from tq.engine.model.recipe import Recipe
    from tq.engine.model.sources import open_source

    recipe = Recipe.from_options(bits=3)
    remote, local = make_plan(open_headers(MODEL), recipe), make_plan(open_source(str(repository.folder)), recipe)
    assert (remote.size_bytes, remote.tensors) == (local.size_bytes, local.tensors)


def test_weights_that_are_not_there_are_not_read(repository):
    source = open_headers(MODEL)
    arrays = source.weights()
    assert {name: tuple(array.shape) for name, array in arrays.items()} == {
        name: header.shape for name, header in source.headers.items()
    }
    for call in (
        lambda: source.materialize(next(iter(arrays.values()))),
        lambda: source.copy_side_files(repository.cache),
    ):
        with pytest.raises(TQError, match="only their headers were read"):
            call()


def test_a_snapshot_with_weights_is_read_from_the_cache(repository):
    (repository.cache / "model.safetensors").write_bytes((repository.folder / "model.safetensors").read_bytes())
    source = open_headers(MODEL)
    assert isinstance(source, FolderSource) and source.folder == repository.cache
    assert "headers" not in {asked[2] for asked in repository.asked}


@pytest.mark.parametrize(
    ("failure", "message"),
    [
        (errors.NotASafetensorsRepoError("none"), "has no safetensors weights"),
        (errors.SafetensorsParsingError("bad\nworse"), "a safetensors header of .* is damaged: bad$"),
        (ConnectionError("away"), "the Hugging Face Hub cannot be reached"),
    ],
)
def test_what_goes_wrong_is_said_in_a_sentence(repository, failure, message):
    repository.failure = failure
    with pytest.raises(TQError, match=message):
        open_headers(MODEL)


def test_without_network_only_the_cache_counts(repository, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(TQError, match="is not in the Hub's cache, and HF_HUB_OFFLINE forbids the network"):
        hub.safetensors_metadata(MODEL, None)


def test_headers_that_contradict_themselves_are_refused(repository):
    (shard,) = repository.metadata.files_metadata.values()
    tensor = next(iter(shard.tensors.values()))
    tensor.shape = [1, 2, 3]
    with pytest.raises(TQError, match=r"does not have the bytes of its shape \(1, 2, 3\)"):
        open_headers(MODEL)
    tensor.dtype = "F8_E5M2"
    with pytest.raises(TQError, match="has dtype F8_E5M2; tq reads F32"):
        open_headers(MODEL)
    shard.tensors.clear()
    with pytest.raises(TQError, match="has no tensors in safetensors files"):
        open_headers(MODEL)


def test_local_models_need_no_hub(repository, tmp_path):
    config = json.loads((repository.folder / "config.json").read_text()) | {
        "quantization": {"mode": "tq", "version": 1}
    }
    (repository.folder / "config.json").write_text(json.dumps(config))
    assert isinstance(open_headers(str(repository.folder)), FolderSource)  # a packed one too
    assert repository.asked == []
    (tmp_path / "notes.txt").write_text("no model")
    with pytest.raises(TQError, match="is not a model"):
        open_headers(str(tmp_path / "notes.txt"))
    with pytest.raises(TQError, match="no such model"):
        open_headers("./nowhere")


def test_a_gguf_file_is_opened(monkeypatch, tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(b"")
    monkeypatch.setattr(GGUFSource, "__init__", lambda self, path, *, name: setattr(self, "path", path))
    assert open_headers(str(path)).path == path
