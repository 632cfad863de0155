"""The safetensors reader believes nothing, and the writer writes what the reader and MLX read."""

import json
import os
import struct
import tracemalloc
import zlib
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tq.engine.model import safetensors as st_format
from tq.engine.model.safetensors import (
    DTYPES,
    INDEX_NAME,
    ShardWriter,
    plan_shards,
    read_folder_headers,
    read_headers,
)
from tq.errors import TQError


def raw_file(path: Path, header: object, data: bytes = b"", length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def entry(dtype="F32", shape=(2,), begin=0, end=8):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


# --- reading ---


def test_headers_of_the_reference_writer_are_read(tmp_path):
    path = tmp_path / "model.safetensors"
    arrays = {
        "b": np.arange(6, dtype=np.float16).reshape(2, 3),
        "a": np.ones((3,), np.int64),
        "empty": np.zeros((0, 4), np.float32),
        "scalar": np.array(7, np.uint8),
    }
    safetensors.numpy.save_file(arrays, path, metadata={"format": "mlx"})
    headers, metadata = read_headers(path)
    assert metadata == {"format": "mlx"}
    assert set(headers) == set(arrays)
    content = path.read_bytes()
    for name, array in arrays.items():
        header = headers[name]
        assert (header.shape, header.size_bytes, header.path) == (array.shape, array.nbytes, path)
        assert content[header.offset : header.offset + header.size_bytes] == array.tobytes()
    assert headers["b"].dtype == "F16"


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_known_dtype_is_one_that_mlx_reads(tmp_path, dtype):
    size, mlx_name = DTYPES[dtype]
    path = raw_file(tmp_path / "x.safetensors", {"t": entry(dtype, (3,), 0, 3 * size)}, b"\1" * 3 * size)
    assert read_headers(path)[0]["t"].size_bytes == 3 * size
    assert str(mx.load(str(path))["t"].dtype) == f"mlx.core.{mlx_name}"


def test_headers_that_mlx_writes_are_read(tmp_path):
    path = tmp_path / "model.safetensors"
    mx.save_safetensors(str(path), {"a": mx.ones((2, 3), mx.bfloat16), "b": mx.arange(5)})
    headers, metadata = read_headers(path)
    assert metadata == {}
    assert {(h.name, h.dtype, h.shape) for h in headers.values()} == {("a", "BF16", (2, 3)), ("b", "I32", (5,))}


BAD_HEADERS = {
    "no JSON": (b"{not json", b"", "JSON cannot be read"),
    "not UTF-8": (b'{"\xff": 1}', b"", "JSON cannot be read"),
    "nested too deep": (b'{"t":' + b"[" * 100_000, b"", "JSON cannot be read"),
    "an array": (b"[1, 2]", b"", "not an object"),
    "metadata of numbers": ({"__metadata__": {"a": 1}}, b"", "__metadata__"),
    "no offsets": ({"t": {"dtype": "F32", "shape": [2]}}, bytes(8), "'t' lacks one of"),
    "entry is a list": ({"t": [1]}, bytes(8), "'t' lacks one of"),
    "unknown dtype": ({"t": entry("F7")}, bytes(8), "'t' has dtype 'F7'; tq reads F32, F16"),
    "dtype is a list": ({"t": entry(["F32"])}, bytes(8), "'t' has dtype"),
    "float64": ({"t": entry("F64", (1,))}, bytes(8), "'t' has dtype 'F64'"),
    "negative axis": ({"t": entry(shape=(-2, -1))}, bytes(8), "'t' has shape [-2, -1]"),
    "huge axis": ({"t": entry(shape=(2**31, 0), end=0)}, b"", "'t' has shape"),
    "overflowing product": ({"t": entry("F32", [2**31 - 1] * 3, 0, 2**63)}, bytes(8), "'t' holds"),
    "many axes": ({"t": entry("F32", [1] * 33, 0, 4)}, bytes(4), "33 axes"),
    "a bool as axis": ({"t": entry(shape=(True, 2))}, bytes(8), "'t' has shape"),
    "a float as axis": ({"t": entry(shape=(2.0,))}, bytes(8), "'t' has shape"),
    "three offsets": ({"t": {**entry(), "data_offsets": [0, 8, 8]}}, bytes(8), "data_offsets"),
    "negative offsets": ({"t": entry(begin=-8, end=0)}, bytes(8), "data_offsets"),
    "offsets reversed": ({"t": entry(begin=8, end=0)}, bytes(8), "'t' holds -8 bytes"),
    "too few bytes": ({"t": entry(end=4)}, bytes(4), "'t' holds 4 bytes, its shape and dtype need 8"),
    "outside the file": ({"t": entry(begin=0, end=8)}, bytes(7), "is truncated"),
    "far outside": ({"t": entry(begin=2**62, end=2**62 + 8)}, bytes(8), "'t' leaves a hole"),
    "a hole": ({"a": entry(), "b": entry(begin=16, end=24)}, bytes(24), "'b' leaves a hole before it"),
    "an overlap": ({"a": entry(), "b": entry(begin=4, end=12)}, bytes(12), "'b' overlaps"),
    "bytes of no tensor": ({"a": entry()}, bytes(9), "its header promises"),
    "a name twice": (b'{"t": %s, "t": %s}' % ((json.dumps(entry()).encode(),) * 2), bytes(8), "names 't' twice"),
    "a lone surrogate": ({"\ud800": entry(end=4)}, bytes(4), r"'\ud800' holds"),
}


@pytest.mark.parametrize("header, data, message", BAD_HEADERS.values(), ids=BAD_HEADERS.keys())
def test_a_bad_header_is_refused_with_file_and_tensor(tmp_path, header, data, message):
    path = raw_file(tmp_path / "bad.safetensors", header, data)
    with pytest.raises(TQError) as caught:
        read_headers(path)
    assert message in caught.value.message
    assert "bad.safetensors" in caught.value.message
    assert len(caught.value.message) < 400 + len(str(path))
    caught.value.message.encode("utf-8")


def test_a_truncated_shard_says_so_and_what_to_do(tmp_path):
    path = tmp_path / "model.safetensors"
    safetensors.numpy.save_file({"t": np.zeros((4, 8), np.float32)}, path)
    whole = path.stat().st_size
    os.truncate(path, whole - 5)
    with pytest.raises(TQError, match=f"it has {whole - 5} bytes, its header promises {whole}") as caught:
        read_headers(path)
    assert "download" in caught.value.hint
    for size in (30, 8, 7, 0):
        os.truncate(path, size)
        with pytest.raises(TQError, match=f"is truncated: it has {size} bytes"):
            read_headers(path)


@pytest.mark.parametrize("length", [100_000_001, 2**63, 2**64 - 1])
def test_a_header_length_beyond_the_limit_is_refused(tmp_path, length):
    with pytest.raises(TQError, match="not a safetensors file"):
        read_headers(raw_file(tmp_path / "x", {}, length=length))


def test_a_missing_file_and_a_git_lfs_pointer_are_named(tmp_path):
    with pytest.raises(TQError, match="cannot be read: No such file"):
        read_headers(tmp_path / "absent.safetensors")
    pointer = tmp_path / "p.safetensors"
    pointer.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n")
    with pytest.raises(TQError, match="Git LFS pointer"):
        read_headers(pointer)


fuzz = settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
near_entries = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from([*DTYPES, "F64"]) | json_values,
        "shape": st.lists(st.integers(-1, 4), max_size=3) | json_values,
        "data_offsets": st.tuples(st.integers(-1, 40), st.integers(-1, 40)) | json_values,
    },
)


def check_only_clear_errors(path: Path, content: bytes) -> None:
    """Either a TQError, or headers that describe the file exactly."""
    path.write_bytes(content)
    try:
        headers, _ = read_headers(path)
    except TQError as error:
        str(error).encode("utf-8")
        return
    start = 8 + int.from_bytes(content[:8], "little")
    assert sum(header.size_bytes for header in headers.values()) == len(content) - start
    assert all(start <= header.offset <= len(content) - header.size_bytes for header in headers.values())


@fuzz
@given(content=st.binary(max_size=200))
def test_random_bytes_give_only_clear_errors(tmp_path, content):
    check_only_clear_errors(tmp_path / "f", content)
    check_only_clear_errors(tmp_path / "f", struct.pack("<Q", len(content)) + content)


@fuzz
@given(header=st.dictionaries(st.text(max_size=4), near_entries | json_values, max_size=4), data=st.binary(max_size=40))
def test_random_headers_give_only_clear_errors(tmp_path, header, data):
    text = json.dumps(header).encode()
    check_only_clear_errors(tmp_path / "f", struct.pack("<Q", len(text)) + text + data)


@fuzz
@given(edits=st.lists(st.tuples(st.integers(0, 400), st.binary(max_size=3), st.integers(0, 3)), min_size=1, max_size=4))
def test_mutated_files_give_only_clear_errors(tmp_path, edits):
    path = tmp_path / "valid"
    tensors = [("model.embed.weight", "BF16", (3, 5)), ("n", "F32", (7,)), ("codes", "U32", (2, 2))]
    with ShardWriter(path, tensors, {"format": "mlx"}) as writer:
        for name, dtype, shape in tensors:
            writer.append(name, mx.zeros(shape, getattr(mx, DTYPES[dtype][1])))
    content = path.read_bytes()
    for position, inserted, dropped in edits:
        content = content[:position] + inserted + content[position + dropped :]
    check_only_clear_errors(tmp_path / "f", content)


# --- folders and indexes ---


def two_shards(folder: Path) -> None:
    safetensors.numpy.save_file({"a": np.zeros(3, np.float32)}, folder / "model-00001-of-00002.safetensors")
    safetensors.numpy.save_file({"b": np.ones((2, 2), np.float16)}, folder / "model-00002-of-00002.safetensors")


def write_index(folder: Path, weight_map: object) -> None:
    (folder / INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def test_an_indexed_folder_is_read(tmp_path):
    two_shards(tmp_path)
    safetensors.numpy.save_file({"z": np.zeros(1, np.float32)}, tmp_path / "model-of-another-upload.safetensors")
    write_index(tmp_path, {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"})
    headers = read_folder_headers(tmp_path)
    assert {name: header.path.name for name, header in headers.items()} == {
        "a": "model-00001-of-00002.safetensors",
        "b": "model-00002-of-00002.safetensors",
    }


def test_several_shards_without_an_index_are_read(tmp_path):
    two_shards(tmp_path)
    assert set(read_folder_headers(tmp_path)) == {"a", "b"}


def test_a_tensor_in_two_shards_is_refused_unless_the_index_decides(tmp_path):
    for shard, value in (("model-1.safetensors", 1), ("model-2.safetensors", 2)):
        safetensors.numpy.save_file({"a": np.full(3, value, np.float32)}, tmp_path / shard)
    with pytest.raises(TQError, match=r"'a' is both in model-1.safetensors and in .*model-2"):
        read_folder_headers(tmp_path)
    safetensors.numpy.save_file(
        {"b": np.zeros(1, np.float32), "a": np.ones(3, np.float32)}, tmp_path / "model-1.safetensors"
    )
    write_index(tmp_path, {"a": "model-2.safetensors", "b": "model-1.safetensors"})
    assert read_folder_headers(tmp_path)["a"].path.name == "model-2.safetensors"


def test_a_missing_shard_is_named(tmp_path):
    two_shards(tmp_path)
    write_index(tmp_path, {"a": "model-00001-of-00002.safetensors", "b": "model-00003-of-00003.safetensors"})
    with pytest.raises(TQError, match="lacks 1 of 2 shards, the first is model-00003-of-00003") as caught:
        read_folder_headers(tmp_path)
    assert "download" in caught.value.hint


def test_an_indexed_tensor_that_is_in_no_shard_is_named(tmp_path):
    two_shards(tmp_path)
    write_index(tmp_path, {"a": "model-00001-of-00002.safetensors", "c": "model-00001-of-00002.safetensors"})
    with pytest.raises(TQError, match=r"'c' is not in model-00001-of-00002\.safetensors"):
        read_folder_headers(tmp_path)


@pytest.mark.parametrize(
    "shard",
    ["../x.safetensors", "/x.safetensors", "a/b.safetensors", "..\\x.safetensors", "x\0.safetensors", "x.bin", 3],
)
def test_an_index_cannot_point_outside_its_folder(tmp_path, shard):
    (tmp_path / "inner").mkdir()
    safetensors.numpy.save_file({"a": np.zeros(3, np.float32)}, tmp_path / "x.safetensors")
    write_index(tmp_path / "inner", {"a": shard})
    with pytest.raises(TQError, match=r"not a \.safetensors file beside it"):
        read_folder_headers(tmp_path / "inner")


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"weight_map": {}}', '{"weight_map": []}', '{"weight_map": {"a":1}}']
)
def test_a_damaged_index_is_refused(tmp_path, text):
    two_shards(tmp_path)
    (tmp_path / INDEX_NAME).write_text(text)
    with pytest.raises(TQError, match=INDEX_NAME):
        read_folder_headers(tmp_path)


# --- writing ---

TENSORS = [
    ("codes", "U32", (5, 3)),
    ("scales", "F16", (5, 1)),
    ("half", "BF16", (3, 7)),
    ("nothing", "F32", (0, 4)),
    ("number", "F32", ()),
    ("flags", "BOOL", (3,)),
    ("bytes", "F8_E4M3", (1, 9)),
]


def arrays_of(tensors):
    generator = np.random.default_rng(7)
    arrays = {}
    for name, dtype, shape in tensors:
        values = mx.array(generator.integers(0, 250, shape))
        arrays[name] = values.astype(getattr(mx, DTYPES[dtype][1] + ("_" if dtype == "BOOL" else "")))
    return arrays


def write_all(path, arrays, finished=0, upto=None):
    with ShardWriter(path, TENSORS, {"format": "mlx"}, finished=finished) as writer:
        return [writer.append(name, arrays[name]) for name, _, _ in TENSORS[finished:upto]]


def test_what_is_written_is_read_by_mlx_and_by_the_reference(tmp_path):
    arrays = arrays_of(TENSORS)
    path = tmp_path / "model.safetensors"
    checksums = write_all(path, arrays)
    loaded = mx.load(str(path))
    for name, array in arrays.items():
        assert loaded[name].dtype == array.dtype
        assert mx.array_equal(loaded[name], array)
    headers, metadata = read_headers(path)
    assert list(headers) == [name for name, _, _ in TENSORS]
    assert metadata == {"format": "mlx"}
    assert headers["codes"].offset % 8 == 0
    content = path.read_bytes()
    for checksum, header in zip(checksums, headers.values(), strict=True):
        assert checksum == zlib.crc32(content[header.offset : header.offset + header.size_bytes])
    with safetensors.safe_open(path, "np") as reference:
        assert reference.get_slice("half").get_shape() == [3, 7]
        assert np.array_equal(reference.get_tensor("codes"), np.array(arrays["codes"]))


@pytest.mark.parametrize("finished", range(len(TENSORS) + 1))
@pytest.mark.parametrize("torn", [0, 3, 1000])
def test_an_interrupted_file_is_continued_to_the_same_bytes(tmp_path, finished, torn):
    arrays = arrays_of(TENSORS)
    write_all(tmp_path / "whole", arrays)
    write_all(tmp_path / "resumed", arrays, upto=finished)
    with (tmp_path / "resumed").open("ab") as file:
        file.write(b"\xee" * torn)  # of a tensor that was not finished
    write_all(tmp_path / "resumed", arrays, finished=finished)
    assert (tmp_path / "resumed").read_bytes() == (tmp_path / "whole").read_bytes()


def test_a_file_that_is_not_the_interrupted_one_is_not_continued(tmp_path):
    arrays = arrays_of(TENSORS)
    path = tmp_path / "model.safetensors"
    write_all(path, arrays, upto=2)
    with pytest.raises(TQError, match="does not hold what was written before"):
        ShardWriter(path, TENSORS, {"format": "mlx"}, finished=3)
    with pytest.raises(TQError, match="does not hold what was written before"):
        ShardWriter(path, TENSORS, {"format": "other"}, finished=1)
    with pytest.raises(TQError, match="cannot be written: No such file"):
        ShardWriter(tmp_path / "absent", TENSORS, finished=1)


def test_a_tensor_other_than_the_promised_one_is_refused(tmp_path):
    with ShardWriter(tmp_path / "x", [("a", "F16", (2, 3))]) as writer:
        for name, array in [
            ("b", mx.zeros((2, 3), mx.float16)),
            ("a", mx.zeros((3, 2), mx.float16)),
            ("a", mx.zeros((2, 3), mx.bfloat16)),
        ]:
            with pytest.raises(ValueError, match="expected a F16"):
                writer.append(name, array)
        writer.append("a", mx.zeros((2, 3), mx.float16))


def test_a_lazy_and_transposed_array_is_written_in_row_order(tmp_path):
    array = (mx.arange(15, dtype=mx.float32).reshape(3, 5) * 2).T
    with ShardWriter(tmp_path / "x", [("t", "F32", (5, 3))]) as writer:
        writer.append("t", array)
    loaded = mx.load(str(tmp_path / "x"), format="safetensors")["t"]
    assert np.array_equal(np.array(loaded), np.arange(15, dtype=np.float32).reshape(3, 5).T * 2)


@pytest.mark.parametrize("dtype", ["BF16", "F32"])
def test_writing_takes_no_copy_of_the_tensor(tmp_path, dtype):
    array = mx.ones((1 << 12, 1 << 11), getattr(mx, DTYPES[dtype][1]))
    mx.eval(array)
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    tracemalloc.start()
    with ShardWriter(tmp_path / "x", [("t", dtype, array.shape)]) as writer:
        writer.append("t", array)
    python_peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert mx.get_peak_memory() - before < array.nbytes / 8
    assert python_peak < array.nbytes / 8


def test_a_full_disk_is_said_and_the_append_can_be_repeated(tmp_path, monkeypatch):
    arrays = arrays_of(TENSORS)
    write_all(tmp_path / "whole", arrays)
    writer = ShardWriter(tmp_path / "x", TENSORS, {"format": "mlx"})
    real = writer._write

    def full(data, offset):
        real(data[:7], offset)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writer, "_write", full)
    with pytest.raises(TQError, match="the disk is full") as caught:
        writer.append("codes", arrays["codes"])
    assert "free some space" in caught.value.hint
    monkeypatch.undo()
    for name, _, _ in TENSORS:
        writer.append(name, arrays[name])
    writer.close()
    assert (tmp_path / "x").read_bytes() == (tmp_path / "whole").read_bytes()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a device that is always full is Linux's")
def test_a_device_that_is_full_is_said():
    with pytest.raises(TQError, match="the disk is full: /dev/full"):
        ShardWriter(Path("/dev/full"), TENSORS)


def test_writes_longer_than_one_chunk_are_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(st_format, "CHUNK_BYTES", 7)
    array = mx.arange(40, dtype=mx.float32)
    with ShardWriter(tmp_path / "x", [("t", "F32", (40,))]) as writer:
        checksum = writer.append("t", array)
    assert checksum == zlib.crc32(np.array(array).tobytes())
    assert mx.array_equal(mx.load(str(tmp_path / "x"), format="safetensors")["t"], array)


# --- planning ---


def test_one_shard_has_the_plain_name():
    shards, index = plan_shards([("a", "F32", (4,)), ("b", "F16", (2,))])
    assert [shard.name for shard in shards] == ["model.safetensors"]
    assert index == {
        "metadata": {"total_size": 20},
        "weight_map": {"a": "model.safetensors", "b": "model.safetensors"},
    }


@given(sizes=st.lists(st.integers(0, 30), min_size=1, max_size=40), limit=st.integers(1, 40))
def test_shards_keep_order_and_limit(sizes, limit):
    tensors = [(f"t{i}", "U8", (size,)) for i, size in enumerate(sizes)]
    shards, index = plan_shards(tensors, limit)
    assert [tensor for shard in shards for tensor in shard.tensors] == tensors
    for i, shard in enumerate(shards, 1):
        assert shard.name == (
            "model.safetensors" if len(shards) == 1 else f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        )
        assert sum(t[2][0] for t in shard.tensors) <= limit or len([t for t in shard.tensors if t[2][0]]) == 1
        assert all(index["weight_map"][name] == shard.name for name, _, _ in shard.tensors)
    assert index["metadata"]["total_size"] == sum(sizes)
