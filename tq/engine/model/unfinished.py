"""The folder in which long work lies until it is done: locked, resumable, and renamed to its name at the end."""

import errno
import os
import shutil
from pathlib import Path

import mlx.core as mx

from tq.engine.model.journal import NAME, Journal
from tq.engine.model.safetensors import write_error
from tq.errors import TQError

BEING_WRITTEN = "unfinished.safetensors"


def partial_folder(out: Path) -> Path:
    """Where the unfinished output lies."""
    return out.with_name(out.name + ".partial")


class Unfinished:
    """An output folder that does not exist yet.

    Args:
        out: The folder to make.
        identity: Identifies the work: what was left by work of another identity cannot be continued.
        kind: What the work is called: "conversion" or "calibration".
        restart: Throw away what an interrupted run left.

    Attributes:
        folder: Where to write.
        journal: Its journal, which holds the lock.

    Raises:
        TQError: The output exists, another process is writing it, or it was left by other work.
    """

    def __init__(self, out: Path, identity: str, *, kind: str, restart: bool = False):
        if out.exists():
            raise TQError(f"{out} exists already", "choose another --out, or remove it")
        self.out, self.folder = out, partial_folder(out)
        if self.folder.is_dir() and any(self.folder.iterdir()) and not (self.folder / NAME).is_file():
            raise TQError(f"{self.folder} exists and is no unfinished {kind}", "choose another --out, or remove it")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.journal = Journal(self.folder, identity, restart=restart, kind=kind)
        except OSError as error:
            raise write_error(self.folder, error) from error
        try:
            # Without the line that says whose work this is, as after a power cut, nothing of it can be used.
            if restart or self.journal.begun:
                self._empty()
        except OSError as error:
            self.journal.close()
            raise write_error(self.folder, error) from error

    def _empty(self) -> None:
        """Remove all but the journal, which holds the lock."""
        for path in self.folder.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path != self.journal.path:
                path.unlink()

    def finish(self) -> None:
        """Give the folder its name. Raises OSError if the disk fails."""
        _synchronise(self.folder)
        os.rename(self.folder, self.out)
        (self.out / NAME).unlink()  # last: without it an unfinished folder would begin anew
        _synchronise(self.out.parent, files=False)

    def close(self) -> None:
        """End the lock."""
        self.journal.close()


def save_arrays(path: Path, arrays: dict[str, mx.array]) -> None:
    """Write a safetensors file, which appears by rename when it is whole and on the disk. Raises OSError."""
    unfinished = path.with_name(BEING_WRITTEN)
    try:
        mx.save_safetensors(str(unfinished), arrays)
    except RuntimeError as error:  # MLX does not tell why it could not write, which is a full disk as good as always
        unfinished.unlink(missing_ok=True)
        code = errno.ENOSPC if "Unable to write" in str(error) else errno.EIO
        raise OSError(code, os.strerror(code), str(path)) from error
    with unfinished.open("rb") as file:
        os.fsync(file.fileno())
    unfinished.rename(path)


def saved_files(folder: Path) -> list[Path]:
    """The whole files of a folder of ``save_arrays``."""
    return [path for path in folder.glob("*.safetensors") if path.name != BEING_WRITTEN]


def _synchronise(folder: Path, *, files: bool = True) -> None:
    """Send a folder's names, and its files, to the disk: a power cut must not leave empty files behind the rename."""
    paths = [path for path in folder.rglob("*") if path.is_file()] if files else []
    for path in [*paths, folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
