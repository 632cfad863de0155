"""What packing keys and values costs in quality: settings side by side, against the cache that a model has by itself.

A text goes through the model in steps of one packed block, so that predictions are made from packed tokens as they are
when tokens are generated: in one step, a whole text would be read before anything is packed.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import mlx.core as mx
import numpy as np

from tq.engine.cache.settings import BLOCK, KVSettings
from tq.engine.events import Note, Progress
from tq.engine.model.load import LoadedModel
from tq.engine.run import needle, scores
from tq.engine.run.evaluate import cut_windows
from tq.engine.run.generate import bos_tokens, context_length, prompt_cache
from tq.errors import TQError, UsageError

PLAIN = "none"  # the label of what the model has by itself
STEP = BLOCK
SURE = 0.5  # of the needles, below which a model cannot do the test

Caches = dict[str, list[Any]]


@dataclass(frozen=True)
class QualityRow:
    """A way to keep keys and values, over windows of a text as long as a context. None: not measured.

    Attributes:
        windows, perplexity, perplexity_error: As `tq eval` has them for windows of that length.
        kl_mean, kl_mean_error, kl_p99, top1_agreement: From the model with its own cache, as in EvalResult.
        needles_found, needles: Of the needle test with a prompt of that length.
    """

    kv: str
    context: int
    windows: int
    perplexity: float | None = None
    perplexity_error: float | None = None
    kl_mean: float | None = None
    kl_mean_error: float | None = None
    kl_p99: float | None = None
    top1_agreement: float | None = None
    needles_found: int | None = None
    needles: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """The fields, ready for JSON."""
        return asdict(self)


def parse_settings(text: str) -> list[tuple[str, KVSettings | None]]:
    """ "none,k8v4,k4v4/affine": labels and settings; behind a slash the codec, or those of keys and values with a +.

    Raises:
        UsageError: One is not valid, or there twice.
    """
    found: list[tuple[str, KVSettings | None]] = []
    for part in text.split(","):
        label = part.strip().lower()
        bits, _, codec = label.partition("/")
        packed = None if label == PLAIN else KVSettings.from_options(bits=bits, codec=codec.replace("+", ",") or None)
        found.append((label, packed))
    labels = [label for label, _ in found]
    if len(set(labels)) < len(labels):
        raise UsageError(f"KV settings {text} have one twice")
    return found


def measure_quality(
    loaded: LoadedModel,
    kv: Sequence[tuple[str, KVSettings | None]],
    contexts: Sequence[int],
    text: str,
    samples: int,
) -> Iterator[Progress | Note | QualityRow]:
    """Measure every setting behind every context, with at most so many windows of the text.

    Raises:
        UsageError: samples is less than 1.
        TQError: Logits are not finite.
    """
    if samples < 1:
        raise UsageError(f"samples must be 1 or more, not {samples}")
    return _contexts(loaded, kv, contexts, text, samples)


def _contexts(
    loaded: LoadedModel, kv: Sequence[tuple[str, KVSettings | None]], contexts: Sequence[int], text: str, samples: int
) -> Iterator[Progress | Note | QualityRow]:
    packed = {label: settings for label, settings in kv if settings is not None}
    windows = {context: _windows(loaded, text, context, samples) for context in contexts}
    hidden = {context: _haystack(loaded, text, context) for context in contexts}
    done, total = 0, sum(context * (len(windows[context]) + (hidden[context] is not None)) for context in contexts)
    for context in contexts:
        if len(windows[context]) == 0:
            yield Note(f"the text is too short for a window of {context} tokens: no perplexity there (--text FILE)")
        if hidden[context] is None:
            yield Note(f"a context of {context} has no room for the needle test")
    for context in contexts:
        per_token: dict[str, list[dict[str, np.ndarray]]] = {}
        recall: dict[str, int] = {}
        for window in windows[context]:
            for n, found in _scores(loaded, packed, window):
                yield Progress(done + n, total, "tokens", f"quality, context {context}")
                if found is not None:
                    for label, values in found.items():
                        per_token.setdefault(label, []).append(values)
            done += context
            yield from _rows(kv, context, per_token, recall)
        stack = hidden[context]
        if stack is not None:
            for n, counts in _recall(loaded, packed, stack):
                yield Progress(done + n, total, "tokens", f"needle, context {context}")
                recall = counts
            done += context
            if recall[PLAIN] < SURE * len(stack.answers):
                yield Note(
                    f"needles in {context} tokens: this model finds {recall[PLAIN]} of {len(stack.answers)} with its "
                    "own cache, so they say nothing about packing"
                )
            yield from _rows(kv, context, per_token, recall)


def _rows(
    kv: Sequence[tuple[str, KVSettings | None]],
    context: int,
    per_token: dict[str, list[dict[str, np.ndarray]]],
    recall: dict[str, int],
) -> Iterator[QualityRow]:
    names = ("perplexity", "perplexity_error", "kl_mean", "kl_mean_error", "kl_p99", "top1_agreement")
    for label, _ in kv:
        windows = per_token.get(label, [])
        found: dict[str, Any] = {}
        if windows:
            joined = {name: np.concatenate([w[name] for w in windows]).astype(np.float64) for name in windows[0]}
            summary = scores.summary(joined)
            found = {name: summary.get(name) for name in names}
        if recall:
            found |= {"needles_found": recall[label], "needles": len(needle.PLACES)}
        yield QualityRow(label, context, len(windows), **found)


def _windows(loaded: LoadedModel, text: str, context: int, samples: int) -> np.ndarray:
    """At most `samples` windows, (windows, context); none if the text is too short."""
    try:
        return cut_windows(loaded.tokenizer, text, context)[:samples]
    except TQError:
        return np.zeros((0, context), np.int32)


def _haystack(loaded: LoadedModel, text: str, context: int) -> needle.Haystack | None:
    def encode(part: str) -> list[int]:
        return loaded.tokenizer.encode(part, add_special_tokens=False, verbose=False)

    bos = bos_tokens(loaded.tokenizer)
    hidden = needle.haystack(encode, encode(text), context - len(bos))
    limit = context_length(loaded.config)
    if hidden is None or (limit is not None and context + len(hidden.questions) > limit):
        return None
    return replace(hidden, tokens=[*bos, *hidden.tokens])


def _scores(
    loaded: LoadedModel, packed: dict[str, KVSettings], window: np.ndarray
) -> Iterator[tuple[int, dict[str, dict[str, np.ndarray]] | None]]:
    """Tokens so far, and at the end the scores (1, tokens) of each setting; those of PLAIN are never packed."""
    caches = _caches(loaded, packed)
    steps: dict[str, list[dict[str, np.ndarray]]] = {label: [] for label in caches}
    for at in range(0, len(window) - 1, STEP):
        piece = mx.array(window[at : at + STEP + 1])[None]
        inputs, targets = piece[:, :-1], piece[:, 1:]
        own = loaded.model(inputs, cache=caches[PLAIN])
        for label, cache in caches.items():
            if label == PLAIN:
                values = scores.score(own, targets, None)
                zeros = np.zeros_like(values["nll"])
                values |= {"reference_nll": values["nll"], "kl": zeros, "same_top1": zeros == 0}
            else:
                values = scores.score(loaded.model(inputs, cache=cache), targets, own)
            if not all(np.isfinite(value).all() for value in values.values()):
                raise TQError(f"{loaded.path} with KV {label} gives logits that are not finite")
            steps[label].append(values)
        yield at, None
    joined = {
        label: {name: np.concatenate([step[name] for step in found], axis=1) for name in found[0]}
        for label, found in steps.items()
    }
    yield len(window), joined


def _recall(
    loaded: LoadedModel, packed: dict[str, KVSettings], hidden: needle.Haystack
) -> Iterator[tuple[int, dict[str, int]]]:
    """Tokens so far, and at the end the needles that each setting finds."""
    caches = _caches(loaded, packed)
    length = len(hidden.tokens)
    for at in range(0, length, STEP):
        inputs = mx.array(hidden.tokens[at : at + STEP])[None]
        for cache in caches.values():
            loaded.model(inputs, cache=cache)
            mx.eval([c.state for c in cache])
        yield at, {}
    questions = mx.array(hidden.questions)[None]
    found = {}
    for label, cache in caches.items():
        likeliest = mx.argmax(loaded.model(questions, cache=cache)[0], axis=-1)
        found[label] = needle.found(np.array(likeliest), hidden)
    yield length, found


def _caches(loaded: LoadedModel, packed: dict[str, KVSettings]) -> Caches:
    caches = {PLAIN: prompt_cache(loaded.model, None)}
    return caches | {label: prompt_cache(loaded.model, settings) for label, settings in packed.items()}
