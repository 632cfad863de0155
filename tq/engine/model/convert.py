"""Convert a model: one pipeline for every size. Read a tensor, rotate, encode, write, forget it.

The output folder appears by rename when all is done. Until then the work lies in ``<out>.partial`` with a journal;
the same command goes on where it stopped, and the bytes are those of an uninterrupted run.
"""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import mlx.core as mx

import tq
from tq.engine.events import Note, Progress
from tq.engine.model.card import model_card
from tq.engine.model.journal import NAME as JOURNAL_NAME
from tq.engine.model.journal import Journal, intact
from tq.engine.model.plan import DTYPE_CODES, Plan, PlannedTensor
from tq.engine.model.safetensors import INDEX_NAME, ShardWriter, header_bytes, write_error
from tq.engine.quantize import PackedTensor, encode
from tq.errors import TQError

METADATA = {"format": "mlx"}
SPARE_BYTES = 64_000_000  # tokenizer, config and the like


@dataclass(frozen=True)
class Converted:
    """A finished conversion.

    Attributes:
        path: The checkpoint.
        size_bytes: Bytes of its tensors.
        weights: Weights read in this run, after a resume fewer than the model has.
        seconds: Of this run.
        encode_seconds: The share of them spent in the encoder (rotation, scale search, packing).
    """

    path: Path
    size_bytes: int
    weights: int
    seconds: float
    encode_seconds: float


def partial_folder(out: Path) -> Path:
    """Where the unfinished output lies."""
    return out.with_name(out.name + ".partial")


def convert(plan: Plan, out: Path, *, restart: bool = False) -> Iterator[Progress | Note | Converted]:
    """Carry out a plan.

    Args:
        plan: What to make. Its lazy arrays are used up.
        out: The folder to make. It must not exist.
        restart: Throw an unfinished conversion of ``out`` away.

    Raises:
        TQError: The output exists, the disk is too small or fills up, or an unfinished conversion has other settings.
    """
    started = time.perf_counter()
    if out.exists():
        raise TQError(f"{out} exists already", "choose another --out, or remove it")
    partial = partial_folder(out)
    if partial.is_dir() and any(partial.iterdir()) and not (partial / JOURNAL_NAME).is_file():
        raise TQError(f"{partial} exists and is no unfinished conversion", "choose another --out, or remove it")
    try:
        partial.mkdir(parents=True, exist_ok=True)
        journal = Journal(partial, _identity(plan), restart=restart)
    except OSError as error:
        raise write_error(partial, error) from error
    try:
        if restart:
            _empty(partial, journal.path)
        yield from _write(plan, partial, journal, started, out)
    except OSError as error:
        raise write_error(Path(error.filename or partial), error) from error
    finally:
        journal.close()


def _empty(folder: Path, keep: Path) -> None:
    """Remove all of a folder but one file, which holds its lock."""
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path != keep:
            path.unlink()


def _write(
    plan: Plan, partial: Path, journal: Journal, started: float, out: Path
) -> Iterator[Progress | Note | Converted]:
    headers = [header_bytes(shard.tensors, METADATA) for shard in plan.shards]
    done = intact(partial, plan.shards, headers, journal.crcs)
    first, done = _whole_units(plan, done)
    journal.rewind(done)
    _check_disk(plan, partial)
    if first:
        yield Note(f"resuming: {first} of {len(plan.tensors)} tensors are done")
    writer = _Writer(plan, partial, journal, done)
    total = plan.weights
    finished, encode_seconds = 0, 0.0
    try:
        if done == 0:
            for name, array in plan.shared.items():
                writer.append(name, array)
        for i, tensor in enumerate(plan.tensors):
            lazy = plan.outline.weights.pop(tensor.parameter)
            finished += tensor.weights
            if i < first:
                continue
            yield Progress(finished - tensor.weights, total, "weights", tensor.name)
            array = plan.source.materialize(lazy)
            if tensor.spec is None:
                ((name, code, _),) = tensor.stored
                writer.append(name, array.astype(_mx_dtype(code)))
            else:
                mx.eval(array)
                before = time.perf_counter()
                packed = _encode(array, tensor)
                encode_seconds += time.perf_counter() - before
                for name, stored in plan.format.arrays(tensor.name, packed).items():
                    writer.append(name, stored)
                del packed
            del lazy, array
            mx.clear_cache()
    finally:
        writer.close()
    yield Progress(total, total, "weights", "finishing")
    _finish(plan, partial)
    _synchronise(partial)
    os.rename(partial, out)
    (out / JOURNAL_NAME).unlink()  # last: without it an unfinished folder would begin anew
    _synchronise(out.parent, files=False)
    resumed = sum(t.weights for t in plan.tensors[:first])
    yield Converted(out, plan.size_bytes, total - resumed, time.perf_counter() - started, encode_seconds)


class _Writer:
    """Stored tensors in plan order to the shards they belong to, each noted in the journal."""

    def __init__(self, plan: Plan, folder: Path, journal: Journal, done: int):
        self.folder, self.journal = folder, journal
        self.shards = list(plan.shards)
        while self.shards and done >= len(self.shards[0].tensors):
            done -= len(self.shards.pop(0).tensors)
        self.writer: ShardWriter | None = None
        self.finished = done

    def append(self, name: str, array: mx.array) -> None:
        if self.writer is None:
            shard = self.shards[0]
            self.writer = ShardWriter(self.folder / shard.name, shard.tensors, METADATA, finished=self.finished)
        crc = self.writer.append(name, array)
        if self.writer.finished == len(self.shards[0].tensors):
            # Closing synchronises to disk: the journal may then trust all that came before.
            self.close()
            self.shards.pop(0)
            self.finished = 0
        self.journal.add(crc)

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()
            self.writer = None


def _encode(array: mx.array, tensor: PlannedTensor) -> PackedTensor:
    assert tensor.spec is not None
    try:
        return encode(array, tensor.spec)
    except TQError as error:
        raise TQError(f"{tensor.name}: {error.message}", error.hint) from error


def _whole_units(plan: Plan, stored: int) -> tuple[int, int]:
    """Finished tensors of the plan, and their stored arrays, among the first ``stored`` arrays of the files."""
    n = len(plan.shared)
    if stored < n:
        return 0, 0
    for i, tensor in enumerate(plan.tensors):
        if n + len(tensor.stored) > stored:
            return i, n
        n += len(tensor.stored)
    return len(plan.tensors), n


def _identity(plan: Plan) -> str:
    """Changes when anything changes that the bytes of the result depend on."""
    work = {
        "tq": tq.__version__,
        "source": plan.source.fingerprint(),
        "shards": [(shard.name, shard.tensors) for shard in plan.shards],
        "specs": [(t.name, asdict(t.spec) if t.spec else None) for t in plan.tensors],
        "quantization": plan.quantization,
    }
    return hashlib.sha256(json.dumps(work, sort_keys=True).encode()).hexdigest()


def _check_disk(plan: Plan, partial: Path) -> None:
    there = sum(file.stat().st_size for file in partial.glob("*.safetensors"))
    needed = plan.size_bytes - there + SPARE_BYTES
    free = shutil.disk_usage(partial).free
    if free < needed:
        raise TQError(
            f"the disk of {partial.parent} has {free / 1e9:.2f} GB free, and the result needs {needed / 1e9:.2f} GB",
            "free some space, or choose another --out",
        )


def _mx_dtype(code: str) -> mx.Dtype:
    return next(dtype for dtype, known in DTYPE_CODES.items() if known == code)


def _finish(plan: Plan, partial: Path) -> None:
    """Write all that is not weights."""
    plan.source.copy_side_files(partial)
    # What was true of the source only.
    drop = ("quantization", "quantization_config", "torch_dtype", "dtype")
    config = {key: value for key, value in plan.source.config.items() if key not in drop}
    if isinstance(config.get("text_config"), dict):
        config["text_config"] = {key: value for key, value in config["text_config"].items() if key not in drop}
    config["dtype"] = plan.dtype
    if any(tensor.spec for tensor in plan.tensors):
        config["quantization"] = plan.quantization
    _write_json(partial / "config.json", config)
    if len(plan.shards) > 1:
        _write_json(partial / INDEX_NAME, plan.index)
    (partial / "README.md").write_text(model_card(plan), encoding="utf-8")


def _synchronise(folder: Path, *, files: bool = True) -> None:
    """Send a folder's names, and its files, to the disk: a power cut must not leave empty files behind the rename."""
    paths = [path for path in folder.rglob("*") if path.is_file()] if files else []
    for path in [*paths, folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _write_json(path: Path, data: dict) -> None:
    path.write_text(json.dumps(data, indent=2, sort_keys=True) + "\n", encoding="utf-8")
