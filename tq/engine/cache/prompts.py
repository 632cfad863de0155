"""PromptCache: a model's caches of prompts it has read, kept on disk, so that it need not read them again.

Each entry is a safetensors file named KEY-TOKENS-CHECKSUM: of what the caches depend on (fingerprint.py), of the
tokens, and of all bytes in the file. A file appears by a rename when it is complete; a name that does not fit what is
in the file gives damage away. Only files with such names are ever deleted. Writers take turns by a lock; readers need
none.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import mmap
import os
import re
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from tq.engine.cache.fingerprint import model_key
from tq.engine.cache.settings import KVSettings
from tq.engine.cache.state import CacheState, capture, kinds, leaves, restore
from tq.engine.model.plan import DTYPE_CODES
from tq.engine.model.safetensors import ShardWriter, TensorHeader, header_bytes, read_headers
from tq.errors import TQError

VERSION = 1  # of the files
LEAST_TOKENS = 64  # fewer are read again as fast as a file
NAME = re.compile(r"[0-9a-f]{16}-[0-9a-f]{16}-[0-9a-f]{8}\.safetensors")
PARTIAL = re.compile(r"[0-9a-f]{16}-[0-9a-f]{16}\.partial")
LOCK_SECONDS = 10.0  # that a writer waits for another one
# A file is read many times as fast as its tokens by a model, but not for the sake of a few of them.
LEAST_SHARE = 1 / 8


@dataclass(frozen=True)
class Entry:
    """A stored prompt.

    Attributes:
        tokens: Its token ids, (n,) of int32.
        trimmable: Whether the caches can forget their last tokens; if not, the entry serves only prompts that begin
            with all of it.
    """

    path: Path
    size_bytes: int
    tokens: np.ndarray
    trimmable: bool


class PromptCache:
    """The prompts of one model, in a folder that all models share.

    Args:
        folder: Created when something is stored.
        budget_bytes: For all models together. What was used longest ago makes room.
        key: What the model's caches depend on; entries of other keys are not found.
    """

    def __init__(self, folder: Path, budget_bytes: int, key: str):
        self.folder, self.budget_bytes = folder, budget_bytes
        self.key = key[:16]
        self._notes: dict[str, bool] = {}  # and whether they have been said

    @classmethod
    def of_model(
        cls, folder: Path, budget_bytes: int, path: Path, model: nn.Module, kv: KVSettings | None
    ) -> "PromptCache":
        """The prompts of a model that runs, from a checkpoint at `path`, with caches packed like `kv`."""
        return cls(folder, budget_bytes, model_key(path, model, kv, VERSION))

    def load(
        self, tokens: Sequence[int], *makes: Callable[[], list[Any]], more_than: int = 0
    ) -> tuple[list[int], list[Any]] | None:
        """The stored prompt that spares most of reading this one.

        Args:
            tokens: A prompt. At least its last token is left to be read.
            makes: Each makes a model's caches, without tokens, of one of the kinds that may have been stored.
            more_than: Tokens that must be spared, or nothing is loaded.

        Returns:
            Tokens, and the caches that hold them; they may go on differently than the prompt: trim them then. None if
            nothing stored helps.
        """
        wanted = np.array(tokens, np.int32)
        found = []
        for entry in self._entries():
            shared = common_prefix(entry.tokens, wanted[:-1])
            least = LEAST_SHARE if entry.trimmable else 1
            if shared > more_than and shared >= least * len(entry.tokens):
                found.append((-shared, entry.size_bytes, entry))
        for _, _, entry in sorted(found, key=lambda item: item[:2]):
            caches = self._read(entry, makes)
            if caches is not None:
                return entry.tokens.tolist(), caches
        return None

    def save(self, tokens: Sequence[int], caches: list[Any]) -> bool:
        """Store what caches hold after these tokens, unless it is stored. False, maybe with a note, if not."""
        if len(tokens) < LEAST_TOKENS:
            return False
        start = f"{self.key}-{_digest(tokens)}"
        stored = [path for path in self._files() if path.name.startswith(start)]
        if stored:
            with contextlib.suppress(OSError):
                os.utime(stored[0])
            return True
        parts = leaves(caches)
        try:
            state = capture(parts)
        except ValueError:
            return False
        trimmable = all(cache.is_trimmable() for cache in parts)
        try:
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            with self._lock():
                return self._write(start, tokens, state, trimmable)
        except TQError as error:
            self._note(f"the prompt cache is not kept: {error.message}")
        except OSError as error:
            why = "read-only" if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM) else error.strerror or error
            self._note(f"the prompt cache is not kept: {self.folder} ({why})")
        return False

    def take_notes(self) -> list[str]:
        """What a person should know since the last call: a damaged file, a folder that cannot be written. Each once."""
        new = [note for note, said in self._notes.items() if not said]
        self._notes = dict.fromkeys(self._notes, True)
        return new

    # --- reading ---

    def _entries(self) -> Iterator[Entry]:
        """What is stored for this model. Files that cannot be such entries are dropped."""
        for path in self._files():
            if path.name.startswith(self.key):
                entry = _read_entry(path)
                if entry is None:
                    self._drop(path)
                else:
                    yield entry

    def _files(self) -> list[Path]:
        """Files that were written here, or are named so."""
        try:
            with os.scandir(self.folder) as found:
                ours = [Path(f.path) for f in found if NAME.fullmatch(f.name) and f.is_file(follow_symlinks=False)]
        except OSError:
            return []
        return [path for path in ours if os.access(path, os.R_OK)]

    def _read(self, entry: Entry, makes: Sequence[Callable[[], list[Any]]]) -> list[Any] | None:
        """The caches of an entry; None, maybe with a note, if they cannot be used."""
        try:
            tensors, metadata = read_headers(entry.path)
            if _checksum(entry.path, tensors) != entry.path.stem[-8:]:
                self._drop(entry.path)
                return None
            loaded = mx.load(str(entry.path))
            assert isinstance(loaded, dict)
            state = json.loads(metadata["state"])
            arrays = [loaded[f"a{n}"] for n in range(len(tensors) - 1)]
            for make in makes:
                caches = make()
                if kinds(caches) == state["kinds"]:
                    break
            restore(CacheState(state["kinds"], state["outline"], arrays), leaves(caches))
        except (OSError, RuntimeError):
            return None  # another process has just deleted it
        except (TQError, ValueError) as error:
            self._note(f"a stored prompt is not used: {error}")
            return None
        with contextlib.suppress(OSError):
            os.utime(entry.path)
        return caches

    def _drop(self, path: Path) -> None:
        with contextlib.suppress(OSError):
            path.unlink()
            self._note("a damaged file of the prompt cache was dropped")

    # --- writing ---

    @contextlib.contextmanager
    def _lock(self) -> Iterator[None]:
        """One writer at a time. The lock ends with its process, however that ends."""
        with (self.folder / ".lock").open("a") as file:
            deadline = time.monotonic() + LOCK_SECONDS
            while True:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() > deadline:
                        raise TQError("another process has been writing to it for long") from None
                    time.sleep(0.02)
            yield

    def _write(self, start: str, tokens: Sequence[int], state: CacheState, trimmable: bool) -> bool:
        arrays = {"tokens": mx.array(list(tokens), mx.int32)} | {f"a{n}": array for n, array in enumerate(state.arrays)}
        tensors = [(name, DTYPE_CODES[array.dtype], tuple(array.shape)) for name, array in arrays.items()]
        outline = {"kinds": state.kinds, "outline": state.outline}
        metadata = {"tq_prompt": str(VERSION), "trimmable": str(int(trimmable)), "state": json.dumps(outline)}
        header = header_bytes(tensors, metadata)
        size = len(header) + sum(array.nbytes for array in arrays.values())
        partial = self.folder / f"{start}.partial"
        if not self._make_room(size, start):
            return False
        try:
            with ShardWriter(partial, tensors, metadata) as writer:
                checksums = [zlib.crc32(header)] + [writer.append(name, array) for name, array in arrays.items()]
            partial.rename(self.folder / f"{start}-{_joined(checksums)}.safetensors")
        except BaseException:
            with contextlib.suppress(OSError):
                partial.unlink()
            raise
        return True

    def _make_room(self, size: int, start: str) -> bool:
        """Delete what is in the way of a file of this size: leftovers, earlier versions of it, the longest unused."""
        if size > self.budget_bytes:
            self._note(f"a prompt of {size / 1e6:.0f} MB is more than the prompt cache may take: it is not kept")
            return False
        with os.scandir(self.folder) as found:
            for file in found:
                if PARTIAL.fullmatch(file.name) and file.is_file(follow_symlinks=False):
                    os.unlink(file.path)  # nobody writes it: we have the lock
        kept = []
        for path in self._files():
            if path.name.startswith(start) or not _is_readable(path):
                path.unlink(missing_ok=True)
            else:
                about = path.stat()
                kept.append((about.st_mtime_ns, about.st_size, path))
        surplus = sum(item[1] for item in kept) + size - self.budget_bytes
        for _, freed, path in sorted(kept):
            if surplus <= 0:
                break
            path.unlink(missing_ok=True)
            surplus -= freed
        return True

    def _note(self, message: str) -> None:
        self._notes.setdefault(message, False)


def common_prefix(a: Any, b: Any) -> int:
    """How many tokens two sequences begin with alike."""
    n = min(len(a), len(b))
    differs = np.flatnonzero(np.asarray(a[:n]) != np.asarray(b[:n]))
    return int(differs[0]) if len(differs) else n


def _digest(tokens: Sequence[int]) -> str:
    return hashlib.sha256(np.array(tokens, "<i4").tobytes()).hexdigest()[:16]


def _is_readable(path: Path) -> bool:
    """Whether the file says that it is an entry of this version."""
    try:
        return read_headers(path)[1].get("tq_prompt") == str(VERSION)
    except TQError:
        return False


def _read_entry(path: Path) -> Entry | None:
    """What a file says about itself; None if it is no entry."""
    try:
        tensors, metadata = read_headers(path)
        where = tensors["tokens"]
        if metadata.get("tq_prompt") != str(VERSION) or where.dtype != "I32":
            return None
        with path.open("rb") as file:
            file.seek(where.offset)
            tokens = np.frombuffer(file.read(where.size_bytes), np.int32)
        return Entry(path, path.stat().st_size, tokens, metadata.get("trimmable") == "1")
    except (TQError, OSError, KeyError):
        return None


def _checksum(path: Path, tensors: dict[str, TensorHeader]) -> str:
    """The checksum of all bytes of a file, as its name has it, by as many threads as help."""
    with (
        path.open("rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data,
        memoryview(data) as view,
    ):
        begin = min(tensor.offset for tensor in tensors.values())
        spans = [(0, begin)] + [(t.offset, t.offset + t.size_bytes) for t in tensors.values()]
        with ThreadPoolExecutor() as pool:
            return _joined(list(pool.map(lambda span: _crc(view, span), spans)))


def _crc(view: memoryview, span: tuple[int, int]) -> int:
    with view[span[0] : span[1]] as part:
        return zlib.crc32(part)


def _joined(checksums: list[int]) -> str:
    """One CRC-32 of those of the header and of each tensor in order."""
    return f"{zlib.crc32(np.array(checksums, '<u4').tobytes()):08x}"
