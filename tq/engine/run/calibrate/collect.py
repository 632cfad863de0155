"""`tq calibrate`: the second moments of all that the matrices of a model read, in a folder, for many conversions."""

import hashlib
import json
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import numpy as np

import tq
from tq.engine.events import Note, Progress
from tq.engine.model.calibration import Index, moments_bytes, read_counts, write_index, write_moments
from tq.engine.model.load import activation_dtype
from tq.engine.model.plan import Plan
from tq.engine.model.roles import Matrix
from tq.engine.model.safetensors import write_error
from tq.engine.model.unfinished import Unfinished, saved_files
from tq.engine.quantize.moments import has_own_moments
from tq.engine.run.calibrate.background import Report, events_of
from tq.engine.run.calibrate.forward import Inputs, Weights, is_calibrated, visited_model
from tq.engine.run.calibrate.text import Sample
from tq.errors import TQError

SPARE_BYTES = 16_000_000


@dataclass(frozen=True)
class Collected:
    """A finished calibration.

    Attributes:
        path: Its folder.
        size_bytes: Of its files.
        matrices: How many can be encoded with it.
        seconds: Of this run.
    """

    path: Path
    size_bytes: int
    matrices: int
    seconds: float


def collect(
    plan: Plan,
    windows: np.ndarray,
    sample: Sample,
    out: Path,
    *,
    restart: bool = False,
    trust_remote_code: bool = False,
) -> Iterator[Progress | Note | Collected]:
    """Run a text through a model and keep the moments of what its matrices read.

    The folder appears by rename when all is done. An interrupted run goes on where it stopped: the text goes through
    the finished matrices once more, which is less than half of the work.

    Args:
        plan: Of a conversion, which names the matrices that can be quantized. Its lazy arrays are used up.
        windows: Token ids, (windows, seq_len).
        sample: What they are.
        out: The folder to make. It must not exist.
        restart: Throw an unfinished calibration of ``out`` away.
        trust_remote_code: Allow a model's own Python file to build it.

    Raises:
        TQError: The output exists, the disk is too small or fills up, the model has no matrices that can be
            calibrated, or an unfinished calibration has other settings.
    """
    started = time.perf_counter()
    if not calibrated_matrices(plan):
        raise TQError(f"{plan.source.name} has no matrices that can be quantized", "there is nothing to calibrate")
    identity = json.dumps([tq.__version__, plan.source.fingerprint(), sample.to_json()])
    work = Unfinished(out, hashlib.sha256(identity.encode()).hexdigest(), kind="calibration", restart=restart)
    try:
        _check_disk(plan, work.folder)
        done = len(saved_files(work.folder))
        if done:
            yield Note(f"resuming: the moments of {done} activations are there; the text goes through them once more")
        collector = _Collector(plan, work.folder)
        yield from events_of(lambda report: collector.run(windows, trust_remote_code, report))
        matrices = {
            m.path: (collector.files.get(m.path), m.shape[-1]) for m in plan.outline.matrices.values() if m.quantizable
        }
        write_index(
            work.folder,
            Index(plan.source.name, plan.source.fingerprint(), sample.to_json(), matrices, collector.experts),
        )
        work.finish()
    except OSError as error:
        raise write_error(Path(error.filename or work.folder), error) from error
    finally:
        work.close()
    size = sum(path.stat().st_size for path in out.iterdir())
    yield Collected(out, size, len(collector.files), time.perf_counter() - started)


def calibrated_matrices(plan: Plan) -> list[Matrix]:
    """The matrices that ``collect`` looks for."""
    return [m for m in plan.outline.matrices.values() if is_calibrated(m, plan.outline.tied_head)]


def collected_bytes(plan: Plan) -> int:
    """The most that a calibration of the plan's model takes: less by what matrices share."""
    return sum(_moments_bytes(matrix) for matrix in calibrated_matrices(plan))


def _moments_bytes(matrix: Matrix) -> int:
    features, experts = matrix.shape[-1], matrix.shape[0] if matrix.kind == "switch" else None
    own = experts is not None and has_own_moments(experts, features)
    return moments_bytes(features, experts if own else None)


def _check_disk(plan: Plan, folder: Path) -> None:
    there = sum(path.stat().st_size for path in folder.iterdir())
    needed, free = collected_bytes(plan) - there + SPARE_BYTES, shutil.disk_usage(folder).free
    if free < needed:
        raise TQError(
            f"the disk of {folder.parent} has {free / 1e9:.2f} GB free, and the calibration may need "
            f"{needed / 1e9:.2f} GB",
            "free some space, choose another --out, or let tq convert --calibrate keep no moments",
        )


class _Collector:
    """Visits the matrices of a model and writes the moments of their inputs.

    Attributes:
        files: That of what each matrix reads, by its path.
        experts: How often each expert was chosen, by the first matrix of the layer that reads the choice.
    """

    def __init__(self, plan: Plan, folder: Path):
        self.files: dict[str, str] = {}
        self.experts: dict[str, list[int]] = {}
        self._plan, self._folder = plan, folder
        self._wanted = {matrix.path for matrix in calibrated_matrices(plan)}
        self._inputs = Inputs()
        self._file = ""

    def run(self, windows: np.ndarray, trust_remote_code: bool, report: Report) -> None:
        self._dtype, _ = activation_dtype(getattr(mx, self._plan.dtype))
        self._weights = Weights(self._plan.source, trust_remote_code)
        self._report = report
        model = visited_model(self._plan, self._weights, self._dtype, self)
        model(mx.array(windows))

    def weight(self, matrix: Matrix) -> mx.array:
        return self._weights.take(f"{matrix.path}.weight").astype(self._dtype)

    def visit(self, matrix: Matrix, x: mx.array, indices: mx.array | None) -> mx.array:
        # A layer that runs twice, as those of loop models, is calibrated with what it reads first.
        if matrix.path in self._wanted and matrix.path not in self.files:
            self._report(Progress(len(self.files), len(self._wanted), "matrices", matrix.path))
            if not self._inputs.seen(x, indices):
                self._file = f"{matrix.path}.safetensors"
                path = self._folder / self._file
                if path.exists():
                    self._inputs.skip(x, indices)
                else:
                    write_moments(path, self._inputs.moments(matrix, x, indices))
                if indices is not None and not any(_same_block(matrix.path, other) for other in self.experts):
                    self.experts[matrix.path] = read_counts(path)
            self.files[matrix.path] = self._file
            mx.clear_cache()
        return self.weight(matrix)


def _same_block(path: str, other: str) -> bool:
    return path.rpartition(".")[0] == other.rpartition(".")[0]
