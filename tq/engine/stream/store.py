"""Reads experts out of a checkpoint: positioned reads of neighbouring ones at once, into memory that is given.

A stacked tensor (experts, ...) of a safetensors file holds its experts one after another, so that expert e is the bytes
[offset + e * size, offset + (e + 1) * size).
"""

import errno
import os
import sys
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

from tq.engine.model.safetensors import DTYPES, TensorHeader, read_headers
from tq.errors import TQError

F_NOCACHE = 48  # fcntl.h of macOS: reads of this file leave nothing in the page cache
# Of one read: IOV_MAX is 1024 on Linux and macOS, and macOS refuses 2 GiB.
MOST_BUFFERS, MOST_BYTES = 512, 1 << 30
LOAD_AGAIN = "run the command again"


@dataclass(frozen=True)
class Piece:
    """What each expert has of one stacked tensor.

    Attributes:
        name: ``weight``, ``scales``, ``biases`` or ``bias``.
        dtype: A safetensors code.
        shape: Of one expert.
        size_bytes: Of one expert.
        path, offset: Where the first expert begins.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    size_bytes: int
    path: Path
    offset: int

    @classmethod
    def of(cls, name: str, header: TensorHeader) -> "Piece":
        shape = header.shape[1:]
        return cls(name, header.dtype, shape, prod(shape) * DTYPES[header.dtype][0], header.path, header.offset)


class Store:
    """Open files of checkpoints. Its reads may come from several threads at once.

    Args:
        cached: Whether what is read may stay in the page cache of the system.
    """

    def __init__(self, cached: bool = True):
        self.cached = cached
        self._files: dict[Path, int] = {}
        self._seen: dict[int, tuple[int, int]] = {}  # size and time of change of open files
        self._lock = threading.Lock()

    def open(self, headers: Iterable[TensorHeader]) -> None:
        """Open the files of tensors: one that is replaced from now on is read as it was.

        Raises:
            TQError: A file cannot be read, or no longer has these tensors.
        """
        by_path: dict[Path, list[TensorHeader]] = {}
        for header in headers:
            by_path.setdefault(header.path, []).append(header)
        for path, expected in by_path.items():
            self._file(path)
            found = read_headers(path)[0]
            if any(found.get(header.name) != header for header in expected):
                raise TQError(f"{path} was replaced while the model was loaded", LOAD_AGAIN)

    def read(self, piece: Piece, first: int, buffers: Sequence[memoryview]) -> int:
        """Read the experts from ``first`` on, each into its buffer of ``piece.size_bytes``. Returns the bytes read.

        Raises:
            TQError: The file cannot be read, is shorter than its header says, or was written to since it was opened.
        """
        file = self._file(piece.path)
        at = piece.offset + first * piece.size_bytes
        most = max(1, min(MOST_BUFFERS, MOST_BYTES // piece.size_bytes))
        for start in range(0, len(buffers), most):
            self._read_all(file, at + start * piece.size_bytes, list(buffers[start : start + most]), piece.path)
        if self._seen[file] != _state(file):
            raise TQError(f"{piece.path} has changed since the model was loaded", LOAD_AGAIN)
        size = len(buffers) * piece.size_bytes
        if not self.cached and sys.platform == "linux":
            os.posix_fadvise(file, at, size, os.POSIX_FADV_DONTNEED)
        return size

    def forget(self, paths: set[Path]) -> None:
        """Take files out of the page cache, where the system can."""
        for path in paths if sys.platform == "linux" else ():
            os.posix_fadvise(self._file(path), 0, 0, os.POSIX_FADV_DONTNEED)

    def _read_all(self, file: int, at: int, buffers: list[memoryview], path: Path) -> None:
        while buffers:
            try:
                n = _read_into(file, buffers, at)
            except OSError as error:
                if error.errno == errno.EINTR:
                    continue
                raise TQError(f"{path} cannot be read: {error.strerror or error}") from error
            if n == 0:
                raise TQError(f"{path} has become shorter since it was opened", "download or convert the model again")
            at += n
            while buffers and n >= len(buffers[0]):
                n -= len(buffers.pop(0))
            if n:
                buffers[0] = buffers[0][n:]

    def _file(self, path: Path) -> int:
        with self._lock:
            if path not in self._files:
                try:
                    file = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
                except OSError as error:
                    raise TQError(f"{path} cannot be read: {error.strerror or error}") from error
                self._files[path], self._seen[file] = file, _state(file)
                if not self.cached and sys.platform == "darwin":
                    import fcntl

                    fcntl.fcntl(file, F_NOCACHE, 1)
                elif sys.platform == "linux":
                    # Reads ahead of random experts would only take bandwidth.
                    os.posix_fadvise(file, 0, 0, os.POSIX_FADV_RANDOM)
            return self._files[path]

    def close(self) -> None:
        with self._lock:
            for file in self._files.values():
                os.close(file)
            self._files.clear()
            self._seen.clear()

    def __del__(self) -> None:
        self.close()


def _state(file: int) -> tuple[int, int]:
    """What changes when a file is written to."""
    found = os.fstat(file)
    return found.st_size, found.st_mtime_ns


def _read_into(file: int, buffers: list[memoryview], at: int) -> int:
    """``os.preadv``, or the first buffer alone where Python was built without it."""
    if hasattr(os, "preadv"):
        return os.preadv(file, buffers, at)
    found = os.pread(file, len(buffers[0]), at)
    buffers[0][: len(found)] = found
    return len(found)
