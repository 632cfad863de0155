"""What is compared with each other: loaded models, each with a way to keep keys and values."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from tq.engine.cache.settings import KVSettings
from tq.engine.events import Note
from tq.engine.model.load import LoadedModel, load
from tq.engine.run.weights import Weights, weights_of


@dataclass(frozen=True)
class Contender:
    """A loaded model with its way to keep keys and values.

    Attributes:
        label: What tells it from the others. kv: The label of `settings`.
        settings: None keeps what the model has.
        load_seconds: Until it could run, with its file wherever the system had it.
    """

    label: str
    kv: str
    loaded: LoadedModel
    settings: KVSettings | None
    weights: Weights
    load_seconds: float


def load_contenders(
    models: Sequence[str], kv: Sequence[tuple[str, KVSettings | None]], **how: Any
) -> Iterator[Note | Contender]:
    """Load each model once, for each way to keep keys and values.

    Args:
        models: As `load` takes them. kv: Labels and settings.
        how: For `load`.

    Raises:
        TQError: A model cannot be loaded.
    """
    import mlx_lm.utils  # noqa: F401 (takes two seconds, which are no model's)

    for model, label in zip(models, labels(models), strict=True):
        start = time.perf_counter()
        loaded = load(model, **how)
        seconds = time.perf_counter() - start
        yield from map(Note, loaded.notes)
        weights = weights_of(loaded.model, loaded.config)
        for name, settings in kv:
            shown = label if len(models) > 1 or len(kv) == 1 else name
            yield Contender(shown, name, loaded, settings, weights, seconds)


def labels(models: Sequence[str]) -> list[str]:
    """Short names: the last part of each path, or all of it where that is not enough; the second of two is `x (2)`."""
    short = [model.rstrip("/").rpartition("/")[2] or model for model in models]
    same = {name: {m for m, other in zip(models, short, strict=True) if other == name} for name in short}
    names = [name if len(same[name]) == 1 else model for name, model in zip(short, models, strict=True)]
    return [name if (n := names[:i].count(name)) == 0 else f"{name} ({n + 1})" for i, name in enumerate(names)]
