"""Which experts each layer ran for each token: recorded while a model runs, replayed without it; a small file."""

import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tq.errors import TQError

VERSION = 1


@dataclass(frozen=True, eq=False)
class Trace:
    """The choices of a model.

    Attributes:
        chosen: For each layer with experts, in order, uint16 (tokens, k).
        n_experts: Of each layer.
        expert_bytes: What one expert takes on the disk, of each layer.
    """

    chosen: tuple[np.ndarray, ...]
    n_experts: tuple[int, ...]
    expert_bytes: tuple[int, ...]

    @property
    def n_tokens(self) -> int:
        return len(self.chosen[0])

    @property
    def experts_bytes(self) -> int:
        """What all experts take."""
        return sum(n * size for n, size in zip(self.n_experts, self.expert_bytes, strict=True))

    @property
    def active_bytes(self) -> int:
        """What the experts of one token take."""
        return sum(chosen.shape[1] * size for chosen, size in zip(self.chosen, self.expert_bytes, strict=True))

    def fits(self, other: "Trace") -> bool:
        """Whether both are of one model."""
        return (self.n_experts, self.expert_bytes) == (other.n_experts, other.expert_bytes)

    def save(self, path: Path) -> None:
        """Write a compressed .npz."""
        arrays: dict[str, Any] = {f"layer_{i}": chosen for i, chosen in enumerate(self.chosen)}
        arrays |= {"version": VERSION, "n_experts": self.n_experts, "expert_bytes": self.expert_bytes}
        partial = path.with_name(f"{path.name}.partial")
        with partial.open("wb") as file:
            np.savez_compressed(file, **arrays)
        partial.replace(path)

    @classmethod
    def load(cls, path: Path) -> "Trace":
        """Raises TQError if the file is no trace of this version."""
        try:
            with np.load(path, allow_pickle=False) as found:
                if int(found["version"]) != VERSION:
                    raise TQError(f"{path} is a trace of version {int(found['version'])}, and this tq reads {VERSION}")
                n_experts, expert_bytes = (tuple(found[name].tolist()) for name in ("n_experts", "expert_bytes"))
                chosen = tuple(found[f"layer_{i}"] for i in range(len(n_experts)))
            for layer, count in zip(chosen, n_experts, strict=True):
                if layer.ndim != 2 or layer.dtype != np.uint16 or (layer.size and int(layer.max()) >= count):
                    raise ValueError("a layer chose what is no expert of it")
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise TQError(f"{path} is no trace of experts ({error})") from error
        return cls(chosen, n_experts, expert_bytes)


class Recorder:
    """Collects a trace: each layer tells what it chose, in every pass.

    Args:
        n_experts, expert_bytes: As in ``Trace``.
    """

    def __init__(self, n_experts: Sequence[int], expert_bytes: Sequence[int]):
        self._n_experts, self._expert_bytes = tuple(n_experts), tuple(expert_bytes)
        self._parts: list[list[np.ndarray]] = [[] for _ in n_experts]

    def add(self, layer: int, chosen: np.ndarray) -> None:
        """What a layer chose, (..., k)."""
        self._parts[layer].append(chosen.reshape(-1, chosen.shape[-1]).astype(np.uint16))

    def trace(self) -> Trace:
        """What was recorded, up to the last token that went through all layers."""
        layers = [np.concatenate(parts) if parts else np.zeros((0, 1), np.uint16) for parts in self._parts]
        n_tokens = min(len(layer) for layer in layers)
        return Trace(tuple(layer[:n_tokens] for layer in layers), self._n_experts, self._expert_bytes)
