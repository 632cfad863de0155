"""What a conversion encodes its matrices with: plainly here, with error feedback where something was calibrated."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx

from tq.engine.events import Note, Progress
from tq.engine.model.plan import Plan, PlannedTensor
from tq.engine.quantize import PackedTensor, QuantSpec, encode
from tq.engine.quantize.feedback import Feedback
from tq.errors import TQError


class Encoder:
    """Encodes each matrix by itself, without data.

    Attributes:
        seconds: Spent so far in the encoder alone, without reading.
    """

    def __init__(self) -> None:
        self.seconds = 0.0

    def record(self) -> dict[str, Any] | None:
        """What config.json says of the calibration; the bytes of the result depend on it. None: there was none."""
        return None

    def disk_bytes(self, plan: Plan) -> int:
        """Bytes that ``prepare`` takes on the disk until the conversion is done."""
        return 0

    def prepare(self, plan: Plan, folder: Path) -> Iterator[Progress | Note]:
        """Work that comes before the first tensor is written. It goes on where it stopped when it is called again.

        Args:
            plan: The conversion. Its lazy arrays must be usable afterwards.
            folder: Of the unfinished conversion.
        """
        yield from ()

    def clean(self, folder: Path) -> None:
        """Remove what ``prepare`` left in the folder."""

    def encode(self, tensor: PlannedTensor, read: Callable[[], mx.array]) -> PackedTensor:
        """Encode one matrix of the plan.

        Args:
            tensor: It, with its spec.
            read: Gives its weight.
        """
        return self.encode_array(tensor, read(), None)

    def encode_array(
        self, tensor: PlannedTensor, weight: mx.array, feedback: Feedback | list[Feedback] | None
    ) -> PackedTensor:
        """Encode with error feedback: one for the matrix, or one for each matrix along its first axis.

        Raises:
            TQError: The weight holds values that cannot be stored.
        """
        assert tensor.spec is not None
        mx.eval(weight)
        started = time.perf_counter()
        try:
            if isinstance(feedback, list):
                return _encode_each(weight, tensor.spec, feedback)
            return encode(weight, tensor.spec, feedback)
        except TQError as error:
            raise TQError(f"{tensor.name}: {error.message}", error.hint) from error
        except ValueError as error:  # of the moments
            raise TQError(f"{tensor.name}: its inputs cannot be used: {error}", "the model may overflow") from error
        finally:
            self.seconds += time.perf_counter() - started


def _encode_each(weight: mx.array, spec: QuantSpec, feedback: list[Feedback]) -> PackedTensor:
    """A stack of matrices, each with its own feedback."""
    parts = [encode(matrix, spec, own) for matrix, own in zip(weight, feedback, strict=True)]
    first = parts[0]
    arrays = {name: mx.stack([part.arrays[name] for part in parts]) for name in first.per_matrix_arrays}
    mx.eval(arrays)
    shared = {name: array for name, array in first.arrays.items() if name not in arrays}
    return PackedTensor(spec, tuple(weight.shape), arrays | shared)
