"""The journal of a conversion: what is finished, so that an interrupted one goes on where it stopped.

It lies in the unfinished output folder: a first line that identifies the work, then a line per finished tensor with
the CRC-32 of what was written. A line that was cut off counts as not written.
"""

import contextlib
import fcntl
import json
import zlib
from pathlib import Path
from typing import IO

from tq.engine.model.safetensors import Shard, size_bytes
from tq.errors import TQError

NAME = "conversion.jsonl"


class Journal:
    """Records of one conversion, and the lock that keeps a second one away.

    Args:
        folder: The unfinished output folder.
        identity: Identifies source, plan and version: a journal of another identity cannot be continued.

    Raises:
        TQError: Another process works on the folder, or it holds the work of another conversion.
    """

    def __init__(self, folder: Path, identity: str):
        self.path = folder / NAME
        self._file: IO[str] = self.path.open("a+", encoding="utf-8")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._file.close()
            raise TQError(f"another tq convert is writing {folder}") from None
        self.crcs = self._read(identity, folder)

    def _read(self, identity: str, folder: Path) -> list[int]:
        self._file.seek(0)
        records = []
        for line in self._file:
            with contextlib.suppress(ValueError):
                records.append(json.loads(line))
        if not records:
            self._append({"identity": identity})
            return []
        if records[0] != {"identity": identity}:
            self._file.close()
            raise TQError(
                f"{folder} holds an unfinished conversion with other settings or of another source",
                "run that one again to finish it, or add --restart to begin anew",
            )
        return [record["crc"] for record in records[1:]]

    def _append(self, record: dict) -> None:
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()

    def add(self, crc: int) -> None:
        """The next stored tensor is written."""
        self._append({"crc": crc})

    def rewind(self, n: int) -> None:
        """Forget all but the first ``n`` tensors."""
        self._file.seek(0)
        lines = self._file.readlines()[: n + 1]
        self._file.seek(0)
        self._file.truncate()
        self._file.write("".join(lines))
        self._file.flush()
        self.crcs = self.crcs[:n]

    def close(self) -> None:
        self._file.close()


def intact(folder: Path, shards: list[Shard], header_bytes: list[int], crcs: list[int]) -> int:
    """How many of the journal's tensors are really in the files.

    Finished shards were synchronised to disk when they were closed: their size is checked. The shard that was being
    written is read again, as a power cut may have lost the end of it.
    """
    n = 0
    for shard, offset in zip(shards, header_bytes, strict=True):
        here = crcs[n : n + len(shard.tensors)]
        path = folder / shard.name
        if not here or not path.is_file():
            return n
        complete = offset + sum(size_bytes(dtype, shape) for _, dtype, shape in shard.tensors)
        if len(here) == len(shard.tensors) and len(crcs) > n + len(here) and path.stat().st_size == complete:
            n += len(here)
            continue
        with path.open("rb") as file:
            file.seek(offset)
            for (_, dtype, shape), crc in zip(shard.tensors, here, strict=False):
                if _crc(file, size_bytes(dtype, shape)) != crc:
                    return n
                n += 1
        if len(here) < len(shard.tensors):
            return n
    return n


def _crc(file: IO[bytes], n_bytes: int) -> int | None:
    """CRC-32 of the next bytes, None where the file ends before."""
    crc = 0
    while n_bytes:
        part = file.read(min(n_bytes, 8 << 20))
        if not part:
            return None
        crc = zlib.crc32(part, crc)
        n_bytes -= len(part)
    return crc
