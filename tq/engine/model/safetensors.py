"""The safetensors format: headers and index read with bounds, shards written tensor by tensor.

A file is 8 bytes of little-endian header length, the header as JSON, then the tensors' bytes without gaps
(https://huggingface.co/docs/safetensors). Nothing in a file is believed before it is checked.
"""

import errno
import json
import math
import os
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, cast

from tq.errors import TQError

if TYPE_CHECKING:
    import mlx.core as mx

# Code: (bytes, the mx dtype it is read as). What mx.load can read: no F64, F8_E5M2, 4- and 6-bit codes.
DTYPES = {
    "F32": (4, "float32"),
    "F16": (2, "float16"),
    "BF16": (2, "bfloat16"),
    "F8_E4M3": (1, "uint8"),
    "F8_E8M0": (1, "uint8"),
    "C64": (8, "complex64"),
    "BOOL": (1, "bool"),
    "I64": (8, "int64"),
    "I32": (4, "int32"),
    "I16": (2, "int16"),
    "I8": (1, "int8"),
    "U64": (8, "uint64"),
    "U32": (4, "uint32"),
    "U16": (2, "uint16"),
    "U8": (1, "uint8"),
}
MAX_HEADER_BYTES = 100_000_000  # the limit of the reference implementation
MAX_DIMENSION = 2**31 - 1  # an axis of an mx.array is an int32
MAX_AXES = 32  # bounds the product of a hostile shape; real tensors have at most 5
INDEX_NAME = "model.safetensors.index.json"
SHARD_PATTERN = "model*.safetensors"
CHUNK_BYTES = 8 << 20  # of one write: macOS refuses 2 GiB and more

AGAIN = "download the file again, it is incomplete or damaged"

TensorSpec = tuple[str, str, tuple[int, ...]]  # name, dtype code, shape


@dataclass(frozen=True)
class TensorHeader:
    """What is known of a stored tensor without reading it.

    Attributes:
        name: Its name in the checkpoint.
        dtype: A safetensors code ("F32", "BF16", ...).
        shape: Its shape as an array.
        size_bytes: The bytes it takes in its file.
        path: The file that holds it.
        offset: Where its bytes begin in that file, in bytes.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    size_bytes: int
    path: Path = Path()
    offset: int = 0


@dataclass(frozen=True)
class Shard:
    """A file to be written: its name and its tensors in order."""

    name: str
    tensors: tuple[TensorSpec, ...]


def size_bytes(dtype: str, shape: Sequence[int]) -> int:
    """The bytes of a tensor of a dtype code and shape."""
    return math.prod(shape) * DTYPES[dtype][0]


# --- reading ---


def read_headers(path: Path | str) -> tuple[dict[str, TensorHeader], dict[str, str]]:
    """The header of one file, checked against itself and against the file's size.

    Returns:
        The tensors by name, in the order of their bytes, and the file's metadata.

    Raises:
        TQError: The file is unreadable, truncated, oversized, or its header contradicts itself.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            prefix = file.read(8)
            length = int.from_bytes(prefix, "little")
            if prefix == b"version ":
                raise TQError(f"{path} is a Git LFS pointer, not the weights", "run git lfs pull in its folder")
            if len(prefix) < 8:
                raise TQError(f"{path} is truncated: it has {size} bytes, a header takes at least 8", AGAIN)
            if length > MAX_HEADER_BYTES:
                raise TQError(
                    f"{path} is not a safetensors file: its header claims {length} bytes, "
                    f"at most {MAX_HEADER_BYTES} are valid"
                )
            if length > size - 8:
                raise TQError(f"{path} is truncated: it has {size} bytes, its header alone takes {8 + length}", AGAIN)
            raw = file.read(length)
    except OSError as error:
        raise TQError(f"{path} cannot be read: {error.strerror or error}") from error

    header = _parse_json(path, raw)
    metadata = header.pop("__metadata__", None)
    metadata = {} if metadata is None else metadata  # MLX writes null
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise TQError(f"{path}: __metadata__ in its header is not an object of strings")

    tensors = [_tensor_header(path, name, entry, 8 + length) for name, entry in header.items()]
    tensors.sort(key=lambda t: (t.offset, t.size_bytes))
    end = 8 + length
    for tensor in tensors:
        if tensor.offset != end:
            word = "overlaps the tensor before it" if tensor.offset < end else "leaves a hole before it"
            raise TQError(f"{path}: tensor {_shown(tensor.name)} {word}: byte {tensor.offset} instead of {end}")
        end += tensor.size_bytes
    if end > size:
        raise TQError(f"{path} is truncated: it has {size} bytes, its header promises {end}", AGAIN)
    if end < size:
        raise TQError(f"{path} is damaged: it has {size} bytes, its header promises {end}", AGAIN)
    return {tensor.name: tensor for tensor in tensors}, metadata


def read_folder_headers(folder: Path) -> dict[str, TensorHeader]:
    """The headers of a model folder: its index's shards, else every ``model*.safetensors`` (one or several).

    Raises:
        TQError: No weights, a bad header, or an index and shards that contradict each other.
    """
    index = folder / INDEX_NAME
    placed = _read_index(index) if index.is_file() else {}
    if placed:
        names = sorted(set(placed.values()))
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            what = f"{len(missing)} of {len(names)} shards, the first is {missing[0]}"
            raise TQError(f"{folder} lacks {what}", "download the model again, it is incomplete")
        paths = [folder / name for name in names]
    else:
        paths = sorted(folder.glob(SHARD_PATTERN))
        if not paths:
            raise TQError(f"{folder} has no {SHARD_PATTERN}")

    headers: dict[str, TensorHeader] = {}
    for path in paths:
        for name, tensor in read_headers(path)[0].items():
            if placed.get(name, path.name) != path.name:
                continue  # the index says which of two copies counts
            if name in headers:
                raise TQError(f"tensor {_shown(name)} is both in {headers[name].path.name} and in {path}")
            headers[name] = tensor
    for name, shard in placed.items():
        if name not in headers:
            raise TQError(f"{index}: tensor {_shown(name)} is not in {shard}, where the index puts it", AGAIN)
    return headers


def _read_index(path: Path) -> dict[str, str]:
    """``weight_map`` of an index: tensor name to the name of a file beside it."""
    try:
        if path.stat().st_size > MAX_HEADER_BYTES:
            raise TQError(f"{path} is too large for an index: at most {MAX_HEADER_BYTES} bytes are valid")
        raw = path.read_bytes()
    except OSError as error:
        raise TQError(f"{path} cannot be read: {error.strerror or error}") from error
    placed = _parse_json(path, raw).get("weight_map")
    if not isinstance(placed, dict) or not placed:
        raise TQError(f"{path} has no weight_map of tensor names to files")
    for name, shard in placed.items():
        # A plain name only: an index must not make tq read outside the model's folder.
        if not isinstance(shard, str) or set(shard) & set("/\\:\0") or not shard.endswith(".safetensors"):
            where = f"{_shown(shard)}, which is not a .safetensors file beside it"
            raise TQError(f"{path} puts tensor {_shown(name)} in {where}")
    return placed


def _parse_json(path: Path, raw: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        parsed = dict(pairs)
        if len(parsed) != len(pairs):
            seen: set[str] = set()
            for name, _ in pairs:
                if name in seen:
                    raise TQError(f"{path} names {_shown(name)} twice")
                seen.add(name)
        return parsed

    try:
        parsed = json.loads(raw.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise TQError(f"{path} is damaged: its JSON cannot be read ({str(error)[:80]})", AGAIN) from error
    if not isinstance(parsed, dict):
        raise TQError(f"{path} is damaged: its JSON is not an object", AGAIN)
    return parsed


def _tensor_header(path: Path, name: str, entry: object, data_start: int) -> TensorHeader:
    where = f"{path}: tensor {_shown(name)}"
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        raise TQError(f"{where} lacks one of dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise TQError(f"{where} has dtype {_shown(dtype)}; tq reads {', '.join(DTYPES)}")
    if not isinstance(shape, list) or not all(type(n) is int and 0 <= n <= MAX_DIMENSION for n in shape):
        raise TQError(f"{where} has shape {_shown(shape)}: each axis must be a number from 0 to {MAX_DIMENSION}")
    if len(shape) > MAX_AXES:
        raise TQError(f"{where} has {len(shape)} axes, at most {MAX_AXES} are valid")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(type(n) is int and n >= 0 for n in offsets):
        raise TQError(f"{where} has data_offsets {_shown(offsets)}: two numbers from 0 are needed")
    size = size_bytes(dtype, shape)
    if offsets[1] - offsets[0] != size:
        raise TQError(f"{where} holds {offsets[1] - offsets[0]} bytes, its shape and dtype need {size}")
    return TensorHeader(name, dtype, tuple(shape), size, path, data_start + offsets[0])


def _shown(value: object) -> str:
    """A value from a file as part of a one-line message."""
    try:
        text = ascii(value)
    except RecursionError:  # lists nested as deep as the JSON reader allows
        text = f"a {type(value).__name__}"
    return text if len(text) <= 90 else text[:87] + "..."


# --- writing ---


def plan_shards(tensors: Iterable[TensorSpec], limit_bytes: int = 5_000_000_000) -> tuple[list[Shard], dict[str, Any]]:
    """Files for tensors in order, each of at most ``limit_bytes`` unless one tensor alone is larger.

    Returns:
        The shards, and the index: ``metadata.total_size`` in bytes and ``weight_map``.
    """
    groups: list[list[TensorSpec]] = [[]]
    filled = total = 0
    for tensor in tensors:
        size = size_bytes(*tensor[1:])
        if groups[-1] and filled + size > limit_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(tensor)
        filled += size
        total += size
    count = len(groups)
    names = [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    if count == 1:
        names = ["model.safetensors"]
    shards = [Shard(name, tuple(group)) for name, group in zip(names, groups, strict=True)]
    weight_map = {tensor[0]: shard.name for shard in shards for tensor in shard.tensors}
    return shards, {"metadata": {"total_size": total}, "weight_map": weight_map}


class ShardWriter:
    """Writes one file whose tensors are known in advance and whose bytes come one tensor at a time, in order.

    A writer opened with ``finished=k`` on an interrupted file keeps its first k tensors, drops what follows,
    and goes on: the file becomes byte for byte what an uninterrupted run writes.

    Args:
        path: The file. It is replaced unless ``finished`` is above 0.
        tensors: (name, dtype code, shape) of every tensor, in order.
        metadata: Strings for the header's ``__metadata__``.
        finished: How many tensors the file already holds.

    Raises:
        TQError: The disk is full, or the file to go on with is not the one these tensors belong to.
    """

    def __init__(
        self,
        path: Path,
        tensors: Sequence[TensorSpec],
        metadata: dict[str, str] | None = None,
        *,
        finished: int = 0,
    ):
        self.path = path
        self.tensors = tuple(tensors)
        self.finished = finished
        header = header_bytes(self.tensors, metadata or {})
        self._offsets = [len(header)]
        for _, dtype, shape in self.tensors:
            self._offsets.append(self._offsets[-1] + size_bytes(dtype, shape))
        try:
            self._file = path.open("r+b" if finished else "wb", buffering=0)
            try:
                self._begin(header)
            except BaseException:
                self._file.close()
                raise
        except OSError as error:
            raise write_error(path, error) from error

    def _begin(self, header: bytes) -> None:
        if not self.finished:
            self._write(memoryview(header), 0)
            return
        end = self._offsets[self.finished]
        if self._file.read(len(header)) != header or self.path.stat().st_size < end:
            raise TQError(f"{self.path} does not hold what was written before", "begin again with --restart")
        self._file.truncate(end)

    def append(self, name: str, array: "mx.array") -> int:
        """Writes the next tensor and returns the CRC-32 of its bytes.

        The array is evaluated and its own memory is written, without a copy where it is contiguous.

        Raises:
            ValueError: It is not the tensor the header promises next.
            TQError: The disk is full.
        """
        import mlx.core as mx

        promised, dtype, shape = self.tensors[self.finished]
        same_dtype = str(array.dtype) == f"mlx.core.{DTYPES[dtype][1]}"
        if name != promised or tuple(array.shape) != tuple(shape) or not same_dtype:
            raise ValueError(f"expected {promised} {dtype} {shape}, got {name} {array.dtype} {array.shape}")
        crc = 0
        if array.size:
            # As bytes: the buffer protocol of Python has no code for bfloat16.
            data = memoryview(cast(Any, mx.contiguous(array).reshape(-1).view(mx.uint8)))
            try:
                crc = self._write(data, self._offsets[self.finished])
            except OSError as error:
                raise write_error(self.path, error) from error
        self.finished += 1
        return crc

    def close(self) -> None:
        """Sends everything to the disk and closes the file, complete or not."""
        if self._file.closed:
            return
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            raise write_error(self.path, error) from error
        finally:
            self._file.close()

    def _write(self, data: memoryview, offset: int) -> int:
        # Seeking first makes a failed append repeatable.
        self._file.seek(offset)
        crc = done = 0
        while done < len(data):
            part = data[done : done + CHUNK_BYTES]
            written = self._file.write(part)
            crc = zlib.crc32(part[:written], crc)
            done += written
        return crc

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def header_bytes(tensors: Sequence[TensorSpec], metadata: dict[str, str]) -> bytes:
    """What comes before the first tensor in the file that ShardWriter makes of these tensors."""
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    offset = 0
    for name, dtype, shape in tensors:
        if name in header:
            raise ValueError(f"tensor {name} is named twice")
        end = offset + size_bytes(dtype, shape)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data begin at a multiple of 8
    return len(text).to_bytes(8, "little") + text


def write_error(path: Path, error: OSError) -> TQError:
    """What to tell a person of a failed write."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return TQError(f"the disk is full: {path} cannot be written", "free some space and run the same command again")
    return TQError(f"{path} cannot be written: {error.strerror or error}")
