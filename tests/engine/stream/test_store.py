"""Reading experts of a checkpoint: the right bytes in the right buffers, and errors in a sentence."""

import os
import threading

import mlx.core as mx
import numpy as np
import pytest

from tq.engine.model.safetensors import read_headers
from tq.engine.stream import store as module
from tq.engine.stream.store import Piece, Store
from tq.errors import TQError


@pytest.fixture
def stacked(tmp_path):
    """A piece of a file with other tensors around it, and the values of its experts."""
    values = np.random.default_rng(0).integers(0, 2**32, (7, 5, 3), np.uint32)
    path = tmp_path / "model.safetensors"
    mx.save_safetensors(str(path), {"a": mx.zeros((3,)), "e.weight": mx.array(values), "z": mx.ones((2, 2))})
    return Piece.of("weight", read_headers(path)[0]["e.weight"]), values


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize(("first", "n"), [(0, 1), (2, 3), (6, 1), (0, 7)])
def test_consecutive_experts_go_to_their_buffers(stacked, cached, first, n):
    piece, values = stacked
    assert (piece.size_bytes, piece.shape) == (60, (5, 3))
    memory = np.full((n, 2, 60), 0xEE, np.uint8)
    with_gaps = [memoryview(row[0]) for row in memory]
    assert Store(cached).read(piece, first, with_gaps) == n * 60
    assert np.array_equal(memory[:, 0].view(np.uint32).reshape(n, 5, 3), values[first : first + n])
    assert (memory[:, 1] == 0xEE).all()


def test_short_reads_and_many_buffers_are_continued(stacked, monkeypatch):
    piece, values = stacked
    monkeypatch.setattr(module, "MOST_BUFFERS", 3)
    real = os.preadv

    def short(file, buffers, at):
        first = buffers[0][: min(len(buffers[0]), 17)]
        return real(file, [first], at)

    monkeypatch.setattr(os, "preadv", short)
    memory = np.zeros((7, 60), np.uint8)
    Store().read(piece, 0, [memoryview(row) for row in memory])
    assert np.array_equal(memory.view(np.uint32).reshape(7, 5, 3), values)


@pytest.mark.parametrize(("name", "limit"), [("MOST_BUFFERS", 2), ("MOST_BYTES", 130)])
def test_one_read_is_as_large_as_systems_allow(stacked, monkeypatch, name, limit):
    piece, values = stacked
    monkeypatch.setattr(module, name, limit)
    real, sizes = os.preadv, []
    monkeypatch.setattr(os, "preadv", lambda file, buffers, at: sizes.append(len(buffers)) or real(file, buffers, at))
    memory = np.zeros((7, 60), np.uint8)
    Store().read(piece, 0, [memoryview(row) for row in memory])
    assert sizes == [2, 2, 2, 1]
    assert np.array_equal(memory.view(np.uint32).reshape(7, 5, 3), values)


def test_a_python_without_preadv_reads_one_after_the_other(stacked, monkeypatch):
    piece, values = stacked
    monkeypatch.delattr(os, "preadv")
    memory = np.zeros((3, 60), np.uint8)
    assert Store().read(piece, 2, [memoryview(row) for row in memory]) == 180
    assert np.array_equal(memory.view(np.uint32).reshape(3, 5, 3), values[2:5])


def test_threads_share_the_files(stacked):
    piece, values = stacked
    store, found = Store(), {}

    def read(expert):
        row = np.zeros(60, np.uint8)
        store.read(piece, expert, [memoryview(row)])
        found[expert] = row.view(np.uint32).reshape(5, 3)

    threads = [threading.Thread(target=read, args=(expert,)) for expert in range(7)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(np.array_equal(found[expert], values[expert]) for expert in range(7))


def test_a_file_that_was_cut_or_removed_is_an_error(stacked):
    piece, _ = stacked
    store = Store()
    store.read(piece, 0, [memoryview(bytearray(60))])
    os.truncate(piece.path, piece.offset + 100)
    with pytest.raises(TQError, match="has become shorter"):
        store.read(piece, 1, [memoryview(bytearray(60))])
    piece.path.unlink()
    with pytest.raises(TQError, match="cannot be read: No such file"):
        Store().read(piece, 0, [memoryview(bytearray(60))])


def test_a_closed_store_opens_its_files_again(stacked):
    piece, _ = stacked
    store = Store()
    store.read(piece, 0, [memoryview(bytearray(60))])
    store.close()
    assert store.read(piece, 0, [memoryview(bytearray(60))]) == 60


def test_a_file_that_is_replaced_is_read_as_it_was(stacked):
    piece, values = stacked
    store = Store()
    store.open(read_headers(piece.path)[0].values())
    other = piece.path.with_name("other.safetensors")
    mx.save_safetensors(str(other), {"e.weight": mx.zeros((7, 5, 3), mx.uint32)})
    other.replace(piece.path)
    row = np.zeros(60, np.uint8)
    store.read(piece, 4, [memoryview(row)])
    assert np.array_equal(row.view(np.uint32).reshape(5, 3), values[4])


def test_a_file_that_was_replaced_before_it_was_opened_is_an_error(stacked):
    piece, values = stacked
    headers = read_headers(piece.path)[0]
    mx.save_safetensors(str(piece.path), {"e.weight": mx.array(values), "z": mx.ones((2, 2))})
    with pytest.raises(TQError, match="was replaced while the model was loaded"):
        Store().open(headers.values())


def test_a_file_that_was_written_to_is_an_error(stacked):
    piece, _ = stacked
    store = Store()
    store.open(read_headers(piece.path)[0].values())
    with piece.path.open("r+b") as file:
        file.seek(piece.offset)
        file.write(b"other bytes")
    os.utime(piece.path, ns=(0, 1))  # clocks of file systems may be coarse
    with pytest.raises(TQError, match="has changed since the model was loaded"):
        store.read(piece, 0, [memoryview(bytearray(60))])


def test_experts_behind_4_gb_are_found(tmp_path):
    """In a file with a hole."""
    path = tmp_path / "large.safetensors"
    offset = (5 << 30) + 8
    with path.open("wb") as file:
        file.seek(offset + 3 * 60)
        file.write(bytes(range(60)))
    row = bytearray(60)
    Store().read(Piece("weight", "U32", (5, 3), 60, path, offset), 3, [memoryview(row)])
    assert row == bytes(range(60))
    path.unlink()  # 5 GB for who copies it
