"""A calibration on disk: the second moments that the matrices of a model read, for conversions to any bits.

A folder with calibration.json and one safetensors file per activation, as docs/calibration.md describes. Moments are
held as correlations in float16, the triangle alone, and their scale per channel. What all channels have in common, the
largest component, is apart in float32: next to correlations of .99, the rounding of which would be more than damping
adds, what is left could no longer be told.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import numpy as np

from tq.engine.model.encoding import Encoder
from tq.engine.model.plan import Plan, PlannedTensor
from tq.engine.model.unfinished import save_arrays
from tq.engine.quantize import PackedTensor
from tq.engine.quantize.feedback import Feedback
from tq.engine.quantize.moments import Moments
from tq.errors import TQError

NAME = "calibration.json"
FORMAT = "tq calibration"
VERSION = 1
COMPACT = ("correlations", "common", "scales")
POWER_STEPS = 8  # towards the largest component: how near it gets does not matter, as the rest is kept
AGAIN = "calibrate again"


@dataclass(frozen=True)
class Index:
    """What calibration.json says.

    Attributes:
        model: What was calibrated, as the user named it.
        fingerprint: Of the source's files.
        sample: The text: its name and SHA-256, tokens, tokens of a window.
        matrices: The file of the activation that each matrix reads, or None where it was not seen to read any, and its
            features, by path.
        experts: How often each expert was chosen, by the path of the first matrix that reads the choice.
    """

    model: str
    fingerprint: str
    sample: dict[str, Any]
    matrices: dict[str, tuple[str | None, int]]
    experts: dict[str, list[int]]


def write_index(folder: Path, index: Index) -> None:
    """Write calibration.json."""
    document = {
        "format": FORMAT,
        "version": VERSION,
        "model": index.model,
        "source": index.fingerprint,
        "sample": index.sample,
        "matrices": {
            path: {"file": file, "in_features": features} for path, (file, features) in index.matrices.items()
        },
        "experts": index.experts,
    }
    (folder / NAME).write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def read_index(folder: Path) -> Index:
    """Read calibration.json.

    Raises:
        TQError: There is none, it is damaged, or of another version.
    """
    path = folder / NAME
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        if document["format"] != FORMAT:
            raise ValueError(f"its format is {document['format']!r}")
        if document["version"] == VERSION:
            return Index(
                document["model"],
                document["source"],
                document["sample"],
                {path: (entry["file"], entry["in_features"]) for path, entry in document["matrices"].items()},
                document["experts"],
            )
    except OSError as error:
        hint = f"tq calibrate -m MODEL -o {folder} makes one"
        raise TQError(f"{folder} is no calibration: {path} cannot be read ({error.strerror})", hint) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise TQError(f"{path} is not the index of a calibration: {error}", AGAIN) from error
    raise TQError(
        f"{folder} has version {document['version']} of the format of calibrations, this tq reads {VERSION}", AGAIN
    )


def write_moments(path: Path, moments: Moments) -> None:
    """Write the file of one activation; it appears by rename when it is whole.

    Raises:
        TQError: The inputs were not finite.
        OSError: The disk is full.
    """
    if not np.isfinite(moments.total).all():
        raise TQError(f"{path.stem}: its inputs cannot be used: they are not finite", "the model may overflow")
    arrays = dict(zip(COMPACT, _compact(moments.mean()), strict=True))
    arrays["count"] = np.array([moments.count], np.int64)
    if moments.counts is not None:
        arrays["expert_counts"] = moments.counts.astype(np.int64)
    if moments.own is not None and moments.counts is not None:
        own = [_compact(o / np.float32(max(c, 1))) for o, c in zip(moments.own, moments.counts, strict=True)]
        stacked = map(np.stack, zip(*own, strict=True))
        arrays |= {f"expert_{name}": each for name, each in zip(COMPACT, stacked, strict=True)}
    save_arrays(path, {name: mx.array(array) for name, array in arrays.items()})


def read_moments(path: Path) -> Moments:
    """Read the file of one activation.

    Raises:
        TQError: It cannot be read.
    """
    try:
        arrays = {name: np.array(array) for name, array in cast(dict[str, mx.array], mx.load(str(path))).items()}
        count = int(arrays["count"][0])
        moments = Moments(_full(*(arrays[name] for name in COMPACT)) * np.float32(count), count)
        moments.counts = arrays.get("expert_counts")
        if "expert_scales" in arrays and moments.counts is not None:
            each = zip(*(arrays[f"expert_{name}"] for name in COMPACT), moments.counts, strict=True)
            moments.own = np.stack([_full(*compact) * np.float32(n) for *compact, n in each])
    except (RuntimeError, KeyError, ValueError, IndexError) as error:
        raise TQError(f"{path} cannot be read: {error}", AGAIN) from error
    return moments


def read_counts(path: Path) -> list[int]:
    """How often each expert was chosen, from the file of one activation of experts."""
    return np.array(cast(dict[str, mx.array], mx.load(str(path)))["expert_counts"]).tolist()


def moments_bytes(features: int, experts: int | None) -> int:
    """Bytes of the arrays of one activation, with moments for each of so many experts or None."""
    one = features * (features + 1) + 2 * 4 * features
    return one + 8 + (0 if experts is None else experts * (one + 8))


def _compact(moments: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Moments (n, n) as S (R + c c^T) S: the upper triangle of R, float16 row by row, c, and the diagonal of S."""
    n = len(moments)
    scales = np.sqrt(np.maximum(np.diagonal(moments), 0)).astype(np.float32)
    inverse = np.divide(1, scales, out=np.zeros_like(scales), where=scales > 0)
    common = np.linspace(1, 2, n, dtype=np.float32)
    for _ in range(POWER_STEPS):
        unit = common / max(float(np.linalg.norm(common)), 1e-30)
        common = inverse * (moments @ (inverse * unit))
    common = common / np.sqrt(max(float(unit @ common), 1e-30))
    triangle = np.empty(n * (n + 1) // 2, np.float16)
    end = 0
    for i in range(n):
        start, end = end, end + n - i
        triangle[start:end] = moments[i, i:] * inverse[i] * inverse[i:] - common[i] * common[i:]
    return triangle, common, scales


def _full(triangle: np.ndarray, common: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """What ``_compact`` was given, float32 (n, n)."""
    n = len(scales)
    moments = np.empty((n, n), np.float32)
    end = 0
    for i in range(n):
        start, end = end, end + n - i
        moments[i, i:] = (triangle[start:end].astype(np.float32) + common[i] * common[i:]) * scales[i] * scales[i:]
        moments[i:, i] = moments[i, i:]
    return moments


class CalibratedEncoder(Encoder):
    """Encodes with the moments of a calibration.

    Args:
        folder: The calibration.

    Raises:
        TQError: It is none, or cannot be read.
    """

    def __init__(self, folder: Path):
        super().__init__()
        self.folder = folder
        self.index = read_index(folder)
        self._last: tuple[str, Feedback | list[Feedback]] | None = None

    def check(self, plan: Plan) -> list[str]:
        """Compare with a plan. Returns notes on what is not calibrated.

        Raises:
            TQError: It is of another model.
        """
        quantized = [tensor for tensor in plan.tensors if tensor.spec]
        for tensor in quantized:
            _, features = self.index.matrices.get(tensor.name, (None, 0))
            experts = len(self.index.experts.get(tensor.name, ()))
            if experts and experts != tensor.shape[0]:
                raise TQError(
                    f"{self.folder} is the calibration of another model: {tensor.name} has {tensor.shape[0]} experts "
                    f"here and {experts} there",
                    f"it was made from {self.index.model}",
                )
            if features != tensor.shape[-1]:
                has = features or "does not exist"
                raise TQError(
                    f"{self.folder} is the calibration of another model: {tensor.name} has {tensor.shape[-1]} inputs "
                    f"here and {has} there",
                    f"it was made from {self.index.model}",
                )
        kinds = plan.outline.matrices
        missing = [
            t.name for t in quantized if not self.index.matrices[t.name][0] and kinds[t.name].kind != "embedding"
        ]
        notes = []
        if missing:
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            notes.append(f"not calibrated: {missing[0]}{more}, encoded without")
        if self.index.fingerprint != plan.source.fingerprint():
            notes.append(f"the calibration was made from other files ({self.index.model}): their weights may differ")
        return notes

    def record(self) -> dict[str, Any]:
        source = self.index.fingerprint  # a conversion that goes on must not mix calibrations
        return {"method": "moments", "model": self.index.model, "source": source, **self.index.sample}

    def encode(self, tensor: PlannedTensor, read: Callable[[], mx.array]) -> PackedTensor:
        file, _ = self.index.matrices.get(tensor.name, (None, 0))
        if file is None:
            return super().encode(tensor, read)
        if self._last is None or self._last[0] != file:
            self._last = None
            self._last = (file, read_moments(self.folder / file).feedback())
        return self.encode_array(tensor, read(), self._last[1])
