"""`tq convert --calibrate`: calibrate and encode in one pass, so that each matrix sees what encoded ones before it do.

This is GPTQ as it was published: the second moments of a matrix are those of its inputs in the model as far as it is
quantized already, so that later matrices make up for errors of earlier ones. They are forgotten when it is encoded.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from tq.engine.events import Note, Progress
from tq.engine.model.architecture import outline
from tq.engine.model.encoding import Encoder
from tq.engine.model.load import activation_dtype
from tq.engine.model.plan import Plan, PlannedTensor
from tq.engine.model.roles import Matrix
from tq.engine.model.unfinished import save_arrays, saved_files
from tq.engine.quantize import PackedTensor, decode, shared_arrays
from tq.engine.run.calibrate.background import Report, events_of
from tq.engine.run.calibrate.forward import Inputs, Weights, is_calibrated, visited_model
from tq.engine.run.calibrate.text import Sample


class OnePassEncoder(Encoder):
    """Encodes all matrices while a text goes through the model.

    Args:
        windows: Token ids, (windows, seq_len).
        sample: What they are.
        trust_remote_code: Allow a model's own Python file to build it.
    """

    def __init__(self, windows: np.ndarray, sample: Sample, *, trust_remote_code: bool = False):
        super().__init__()
        self._windows, self._sample, self._trust_remote_code = windows, sample, trust_remote_code
        self._encoded: _Encoded | None = None

    def record(self) -> dict[str, Any]:
        return {"method": "one pass", **self._sample.to_json()}

    def disk_bytes(self, plan: Plan) -> int:
        return sum(tensor.size_bytes for tensor in plan.tensors if tensor.spec)

    def prepare(self, plan: Plan, folder: Path) -> Iterator[Progress | Note]:
        self._encoded = encoded = _Encoded(folder / _Encoded.NAME)
        if encoded.complete:
            return
        if encoded.count():
            yield Note(f"resuming: {encoded.count()} matrices are encoded; the text goes through them once more")
        yield from events_of(lambda report: self._run(plan, encoded, report))
        plan.outline = outline(plan.source, self._trust_remote_code)  # the pass has used the lazy arrays up
        missing = [tensor.name for tensor in plan.tensors if tensor.spec and not encoded.has(tensor)]
        # An embedding is looked up in: without being the head too, it has no inputs to calibrate with.
        missing = [name for name in missing if plan.outline.matrices[name].kind != "embedding"]
        if missing:
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            yield Note(f"encoded without calibration: {missing[0]}{more}, which the model does not multiply with here")
        encoded.finish()

    def _run(self, plan: Plan, encoded: "_Encoded", report: Report) -> None:
        dtype, _ = activation_dtype(getattr(mx, plan.dtype))
        weights = Weights(plan.source, self._trust_remote_code)
        visitor = _Visitor(plan, weights, dtype, encoded, self, report)
        model = visited_model(plan, weights, dtype, visitor)
        model(mx.array(self._windows))

    def encode(self, tensor: PlannedTensor, read: Callable[[], mx.array]) -> PackedTensor:
        assert self._encoded is not None
        return self._encoded.load(tensor) or super().encode(tensor, read)

    def clean(self, folder: Path) -> None:
        _Encoded(folder / _Encoded.NAME).remove()


class _Visitor:
    """Encodes a matrix when the model first multiplies with it, and lets the model go on with what it decodes to."""

    def __init__(
        self, plan: Plan, weights: Weights, dtype: mx.Dtype, encoded: "_Encoded", encoder: Encoder, report: Report
    ):
        self._plan = plan
        self._tensors = {tensor.name: tensor for tensor in plan.tensors if tensor.spec}
        self._total = sum(tensor.weights for tensor in self._tensors.values())
        self._done = 0
        self._weights, self._dtype, self._encoded = weights, dtype, encoded
        self._encoder, self._report = encoder, report
        self._inputs = Inputs()

    def weight(self, matrix: Matrix) -> mx.array:
        return self._weights.take(f"{matrix.path}.weight").astype(self._dtype)

    def visit(self, matrix: Matrix, x: mx.array, indices: mx.array | None) -> mx.array:
        tensor = self._tensors.get(matrix.path)
        if tensor is None:
            return self.weight(matrix)
        self._report(Progress(self._done, self._total, "weights", matrix.path))
        packed = self._encoded.load(tensor)
        if packed is None:
            if not is_calibrated(matrix, self._plan.outline.tied_head):
                return self.weight(matrix)
            feedback = self._inputs.feedback(matrix, x, indices)
            packed = self._encoder.encode_array(tensor, self._weights.take(tensor.parameter), feedback)
            self._encoded.save(tensor, packed)
            mx.clear_cache()
        self._done = min(self._done + tensor.weights, self._total)
        return decode(packed, self._dtype)


class _Encoded:
    """Encoded matrices on the disk, one file each: a model reads them in another order than files hold them."""

    NAME = "encoded"

    def __init__(self, folder: Path):
        self._folder = folder
        self._marker = folder / "complete"

    @property
    def complete(self) -> bool:
        return self._marker.exists()

    def finish(self) -> None:
        self._folder.mkdir(exist_ok=True)
        self._marker.touch()

    def count(self) -> int:
        return len(saved_files(self._folder))

    def has(self, tensor: PlannedTensor) -> bool:
        return self._path(tensor).exists()

    def load(self, tensor: PlannedTensor) -> PackedTensor | None:
        if not self.has(tensor):
            return None
        assert tensor.spec is not None
        arrays: Any = mx.load(str(self._path(tensor)))
        return PackedTensor(tensor.spec, tensor.shape, arrays | shared_arrays(tensor.spec, tensor.shape[-1]))

    def save(self, tensor: PlannedTensor, packed: PackedTensor) -> None:
        self._folder.mkdir(exist_ok=True)
        save_arrays(self._path(tensor), {name: packed.arrays[name] for name in packed.per_matrix_arrays})

    def remove(self) -> None:
        if self._folder.is_dir():
            for path in self._folder.iterdir():
                path.unlink()
            self._folder.rmdir()

    def _path(self, tensor: PlannedTensor) -> Path:
        return self._folder / f"{tensor.name}.safetensors"
