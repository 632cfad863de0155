"""The journal of a conversion or calibration: what is finished, so that an interrupted one goes on where it stopped.

It lies in the unfinished output folder: a first line that identifies the work, then a line per finished tensor with
the CRC-32 of what was written. A line that was cut off counts as not written.
"""

import errno
import fcntl
import json
import os
import zlib
from pathlib import Path
from typing import IO

from tq.engine.model.safetensors import Shard, size_bytes
from tq.errors import TQError

NAME = "conversion.jsonl"
COMMANDS = {"conversion": "convert", "calibration": "calibrate"}  # by the kind of work


class Journal:
    """Records of one conversion, and the lock that keeps a second one away.

    Args:
        folder: The unfinished output folder.
        identity: Identifies source, plan and version: a journal of another identity cannot be continued.
        restart: Forget what is recorded, whatever its identity.
        kind: One of COMMANDS.

    Attributes:
        begun: Whether this is new work: there was no record of any.
        crcs: CRC-32 of each stored tensor that is written, in order.

    Raises:
        TQError: Another process works on the folder, or it holds other work.
    """

    def __init__(self, folder: Path, identity: str, *, restart: bool = False, kind: str = "conversion"):
        self.path = folder / NAME
        # Unbuffered: a record is in the file, or add() has raised.
        self._file = self.path.open("a+b", buffering=0)
        try:
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise TQError(f"another tq {COMMANDS[kind]} is writing {folder}") from None
            if restart:
                self._file.truncate(0)
            records, self._ends = self._read()
            if records and records[0] != {"identity": identity}:
                raise TQError(
                    f"{folder} holds an unfinished {kind} with other settings or of another source",
                    "run that one again to finish it, or add --restart to begin anew",
                )
            self._file.truncate(self._ends[-1] if records else 0)
            self.begun = not records
            if self.begun:
                self._append({"identity": identity})
                os.fsync(self._file.fileno())
            self.crcs: list[int] = [record["crc"] for record in records[1:]]
        except BaseException:
            self._file.close()
            raise

    def _read(self) -> tuple[list[dict], list[int]]:
        """The records up to the first line that is not whole, and where each of them ends in the file."""
        records: list[dict] = []
        ends: list[int] = []
        end = 0
        self._file.seek(0)
        for line in self._file.read().splitlines(keepends=True):
            end += len(line)
            try:
                record = json.loads(line)
            except ValueError:
                break
            if not line.endswith(b"\n") or not isinstance(record, dict) or (records and "crc" not in record):
                break
            records.append(record)
            ends.append(end)
        return records, ends

    def _append(self, record: dict) -> None:
        line = json.dumps(record).encode() + b"\n"
        if self._file.write(line) != len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
        self._ends.append((self._ends[-1] if self._ends else 0) + len(line))

    def add(self, crc: int) -> None:
        """The next stored tensor is written. Raises OSError if the disk is full."""
        self._append({"crc": crc})

    def rewind(self, n: int) -> None:
        """Forget all but the first ``n`` tensors."""
        self._file.truncate(self._ends[n])
        del self._ends[n + 1 :]
        del self.crcs[n:]

    def close(self) -> None:
        """Close the file, which ends the lock."""
        self._file.close()


def intact(folder: Path, shards: list[Shard], headers: list[bytes], crcs: list[int]) -> int:
    """How many of the journal's tensors are really in the files.

    Finished shards were synchronised to disk when they were closed: their size is checked. The shard that was being
    written is read again, as a power cut may have lost the end of it.
    """
    n = 0
    for shard, header in zip(shards, headers, strict=True):
        here = crcs[n : n + len(shard.tensors)]
        path = folder / shard.name
        if not here or not path.is_file():
            return n
        complete = len(header) + sum(size_bytes(dtype, shape) for _, dtype, shape in shard.tensors)
        finished = len(here) == len(shard.tensors)
        if finished and len(crcs) > n + len(here) and path.stat().st_size == complete:
            n += len(here)
            continue
        with path.open("rb") as file:
            if file.read(len(header)) != header:
                return n
            for (_, dtype, shape), crc in zip(shard.tensors, here, strict=False):
                if _crc(file, size_bytes(dtype, shape)) != crc:
                    return n
                n += 1
        if not finished:
            return n
        if path.stat().st_size != complete:
            return n - 1  # so that the file is opened once more and what follows its end is dropped
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
