"""Whether a model's sequences go through it together or in turn: by what reads its weights, and by a trial.

Where whole layers are native CPU kernels, which read one sequence, turns are faster up to 8 sequences and more: 250
tokens per second for 4 sequences of a 135M model at 4 bits where a batch has 110. Everywhere else reading the weights
once for all pays: 35 where turns have 12, with the weights of that model in float32 (benchmarks of two CPU cores).
"""

from __future__ import annotations

import math
from typing import Any, Literal

import mlx.core as mx
import mlx.nn as nn

from tq.engine.cache.settings import KVSettings
from tq.engine.cache.state import leaves
from tq.engine.model.native_layers import NativeModule
from tq.engine.run.generate import prompt_cache
from tq.engine.run.serve.rows import Batches, Rows, Turns
from tq.errors import UsageError

Mode = Literal["batch", "turns"]
# Relative errors of logits: what sums in another order may cost in half precision, and how many times as much as it
# costs the model to read a prompt token by token. A wrong mask or position costs far more.
TOLERANCE, TIMES_OWN, MOST = 0.05, 4.0, 0.5
_PROMPTS = ([7, 3, 11, 2, 5, 13, 1], [4, 9, 6], [8, 2, 12, 10, 3])
_FOLLOWING = [5, 1, 9, 4]


def choose(model: nn.Module, kv: KVSettings | None, asked: Mode | None) -> tuple[Mode, str]:
    """How sequences of this model run, and why. Call it in the thread that will run them.

    Raises:
        UsageError: Batches were asked for, and cannot be.
    """
    if asked == "turns":
        return "turns", "requests take turns, token by token, as asked"
    if asked is None and any(isinstance(module, NativeModule) for module in model.modules()):
        return "turns", "requests take turns, token by token: the CPU kernels are fastest with one sequence at a time"
    reason = _why_not(model, kv)
    if reason is None:
        return "batch", "requests run in one batch"
    if asked == "batch":
        raise UsageError(f"this model cannot run in batches: {reason}")
    return "turns", f"requests take turns, token by token: {reason}"


def make(mode: Mode, model: nn.Module) -> Rows:
    """Rows that run like this."""
    return Batches(model) if mode == "batch" else Turns(model)


def _why_not(model: nn.Module, kv: KVSettings | None) -> str | None:
    made = [prompt_cache(model, kv)]
    if kv is not None and kv.start:
        made.append(prompt_cache(model, None))
    for caches in made:
        if not caches:
            return "it has no caches"
        for cache in leaves(caches):
            if not hasattr(cache, "merge"):
                return f"mlx-lm's {type(cache).__name__} takes one sequence"
    try:
        for settings in dict.fromkeys([kv, None] if kv is not None and kv.start else [kv]):
            error, own = _trial(model, settings)
            if error > min(TOLERANCE + TIMES_OWN * own, MOST):
                return f"its logits in a batch differ by {error:.1g} from those of each sequence alone"
    except Exception as error:  # a model that was not written for batches may raise anything
        return f"it fails in a batch ({str(error).splitlines()[0] if str(error) else type(error).__name__})"
    return None


def _trial(model: nn.Module, kv: KVSettings | None) -> tuple[float, float]:
    """The largest error of logits where sequences of several lengths come, go on together, and go.

    Returns:
        It, and the largest error of the same sequences alone when their prompts are read token by token.
    """
    expected, own = [], []
    for prompt in _PROMPTS:
        caches = _read(model, kv, [prompt])
        expected.append([_logits(model, caches, [[token]])[0] for token in _FOLLOWING])
        caches = _read(model, kv, [[token] for token in prompt])
        own += [_error(_logits(model, caches, [[_FOLLOWING[n]]])[0], expected[-1][n]) for n in range(2)]
    first, second, third = (_read(model, kv, [prompt]) for prompt in _PROMPTS)
    steps = [0, 0, 0]
    errors: list[float] = []

    def step(caches: list[Any], rows: list[int]) -> None:
        logits = _logits(model, caches, [[_FOLLOWING[steps[n]]] for n in rows])
        for got, n in zip(logits, rows, strict=True):
            errors.append(_error(got, expected[n][steps[n]]))
            steps[n] += 1

    batch = [cache.merge([cache]) for cache in first]
    step(batch, [0])
    _extend(batch, second)
    step(batch, [0, 1])
    _extend(batch, third)
    step(batch, [0, 1, 2])
    for cache in batch:
        cache.filter([1, 2])
    step(batch, [1, 2])
    step([cache.extract(1) for cache in batch], [2])
    return max(errors), max(own)


def _error(got: mx.array, want: mx.array) -> float:
    """How far logits are from others, relative to them; infinity if there is none."""
    error = float((mx.linalg.norm(got - want) / mx.linalg.norm(want)).item())  # type: ignore[arg-type]
    return math.inf if math.isnan(error) else error


def _read(model: nn.Module, kv: KVSettings | None, chunks: list[list[int]]) -> list[Any]:
    """Caches that hold these tokens."""
    caches = prompt_cache(model, kv)
    for chunk in chunks:
        _logits(model, caches, [chunk])
    return caches


def _logits(model: nn.Module, caches: list[Any], tokens: list[list[int]]) -> mx.array:
    """Of the last token of each sequence, (B, vocab)."""
    logits = model(mx.array(tokens), cache=caches)[:, -1, :].astype(mx.float32)
    mx.eval(logits, [cache.state for cache in caches])
    return logits


def _extend(batch: list[Any], single: list[Any]) -> None:
    for mine, new in zip(batch, single, strict=True):
        mine.extend(new.merge([new]))
