"""A model's key differs wherever its stored caches could be wrong, and only there."""

import os

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten, tree_map
from tiny_models import build

from tq.engine.cache import fingerprint
from tq.engine.cache.fingerprint import checkpoint_fingerprint, model_key
from tq.engine.cache.settings import KVSettings


@pytest.fixture
def checkpoint(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("model.safetensors", "config.json", "tokenizer.json", "chat_template.jinja"):
        (folder / name).write_bytes(name.encode() * 5000)
    (folder / "README.md").write_text("about")
    return folder


def change(path, at):
    """One bit, with the file's size and time kept."""
    about = path.stat()
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(about.st_atime_ns, about.st_mtime_ns))


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "chat_template.jinja"])
@pytest.mark.parametrize("at", [0, 30000, -1])
def test_a_fingerprint_knows_each_file(checkpoint, name, at):
    before = checkpoint_fingerprint(checkpoint)
    assert checkpoint_fingerprint(checkpoint) == before
    change(checkpoint / name, at)
    assert checkpoint_fingerprint(checkpoint) != before


def test_a_fingerprint_ignores_what_changes_nothing(checkpoint):
    before = checkpoint_fingerprint(checkpoint)
    (checkpoint / "README.md").write_text("about it")
    assert checkpoint_fingerprint(checkpoint.rename(checkpoint.parent / "moved")) == before


def test_large_files_are_known_by_size_time_and_samples(checkpoint, monkeypatch):
    monkeypatch.setattr(fingerprint, "WHOLE_BYTES", 1000)
    monkeypatch.setattr(fingerprint, "SAMPLE_BYTES", 8)
    path = checkpoint / "model.safetensors"
    seen = {checkpoint_fingerprint(checkpoint)}
    for at in (0, -1):
        change(path, at)
        seen.add(checkpoint_fingerprint(checkpoint))
    os.utime(path, ns=(1, 1))
    seen.add(checkpoint_fingerprint(checkpoint))
    path.write_bytes(path.read_bytes() + b"x")
    os.utime(path, ns=(1, 1))
    seen.add(checkpoint_fingerprint(checkpoint))
    assert len(seen) == 5


def test_a_key_depends_on_packing_type_and_version(checkpoint, monkeypatch):
    model = build("llama")
    seen = {
        model_key(checkpoint, model, kv, 1)
        for kv in (None, KVSettings(8, 3), KVSettings(8, 4), KVSettings(8, 3, sink=4))
    }
    seen.add(model_key(checkpoint, model, None, 2))
    monkeypatch.setenv("TQ_BACKEND", "reference")
    seen.add(model_key(checkpoint, model, None, 1))
    monkeypatch.delenv("TQ_BACKEND")
    model.update(tree_map(lambda p: p.astype(mx.bfloat16), model.parameters()))
    assert tree_flatten(model.parameters())[0][1].dtype == mx.bfloat16
    seen.add(model_key(checkpoint, model, None, 1))
    assert len(seen) == 7
