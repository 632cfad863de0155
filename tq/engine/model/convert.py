"""Convert a model: one pipeline for every size. Read a tensor, rotate, encode, write, forget it.

The output folder appears by rename when all is done. Until then the work lies in ``<out>.partial`` with a journal;
the same command goes on where it stopped, and the bytes are those of an uninterrupted run.
"""

import functools
import hashlib
import json
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import mlx.core as mx

import tq
from tq.engine.events import Note, Progress
from tq.engine.model.card import model_card
from tq.engine.model.encoding import Encoder
from tq.engine.model.journal import Journal, intact
from tq.engine.model.plan import DTYPE_CODES, Plan
from tq.engine.model.safetensors import INDEX_NAME, ShardWriter, header_bytes, write_error
from tq.engine.model.unfinished import Unfinished
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


def convert(
    plan: Plan, out: Path, *, restart: bool = False, encoder: Encoder | None = None
) -> Iterator[Progress | Note | Converted]:
    """Carry out a plan.

    Args:
        plan: What to make. Its lazy arrays are used up.
        out: The folder to make. It must not exist.
        restart: Throw an unfinished conversion of ``out`` away.
        encoder: Encodes the matrices; without data if None.

    Raises:
        TQError: The output exists, the disk is too small or fills up, or an unfinished conversion has other settings.
    """
    started = time.perf_counter()
    encoder = encoder or Encoder()
    if (record := encoder.record()) is not None:
        plan.quantization["calibration"] = record
    work = Unfinished(out, _identity(plan), kind="conversion", restart=restart)
    try:
        yield from _write(plan, work, encoder, started)
    except OSError as error:
        raise write_error(Path(error.filename or work.folder), error) from error
    finally:
        work.close()


def _write(plan: Plan, work: Unfinished, encoder: Encoder, started: float) -> Iterator[Progress | Note | Converted]:
    partial, journal = work.folder, work.journal
    headers = [header_bytes(shard.tensors, METADATA) for shard in plan.shards]
    done = intact(partial, plan.shards, headers, journal.crcs)
    first, done = _whole_units(plan, done)
    journal.rewind(done)
    _check_disk(plan, partial, encoder)
    if first < len(plan.tensors):
        yield from encoder.prepare(plan, partial)
    if first:
        yield Note(f"resuming: {first} of {len(plan.tensors)} tensors are done")
    writer = _Writer(plan, partial, journal, done)
    total = plan.weights
    finished = 0
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
            if tensor.spec is None:
                ((name, code, _),) = tensor.stored
                writer.append(name, plan.source.materialize(lazy).astype(_mx_dtype(code)))
            else:
                packed = encoder.encode(tensor, functools.partial(plan.source.materialize, lazy))
                for name, stored in plan.format.arrays(tensor.name, packed).items():
                    writer.append(name, stored)
                del packed
            del lazy
            mx.clear_cache()
    finally:
        writer.close()
    yield Progress(total, total, "weights", "finishing")
    _finish(plan, partial)
    encoder.clean(partial)
    work.finish()
    resumed = sum(t.weights for t in plan.tensors[:first])
    yield Converted(work.out, plan.size_bytes, total - resumed, time.perf_counter() - started, encoder.seconds)


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


def _check_disk(plan: Plan, partial: Path, encoder: Encoder) -> None:
    there = sum(file.stat().st_size for file in partial.rglob("*.safetensors"))
    needed = plan.size_bytes + encoder.disk_bytes(plan) - there + SPARE_BYTES
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


def _write_json(path: Path, data: dict) -> None:
    path.write_text(json.dumps(data, indent=2, sort_keys=True) + "\n", encoding="utf-8")
