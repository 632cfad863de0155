"""How the next token is chosen: the options, where their values come from, and the samplers for them."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from tq.cpu import lazy, library
from tq.engine.run.decode import PREFILL_STEP, Picker, Processor
from tq.errors import TQError, UsageError

if TYPE_CHECKING:
    from tq.engine.model.load import LoadedModel

_RANGES = {
    "max_tokens": (lambda v: v >= 1, "1 or more"),
    "temp": (lambda v: 0 <= v < math.inf, "0 (greedy) or more"),
    "top_p": (lambda v: 0 < v <= 1, "more than 0 and at most 1 (1 = off)"),
    "top_k": (lambda v: v >= 0, "0 (off) or more"),
    "min_p": (lambda v: 0 <= v <= 1, "from 0 (off) to 1"),
    "repetition_penalty": (lambda v: 0 < v < math.inf, "more than 0 (1 = off)"),
    "repetition_context": (lambda v: v >= 1, "1 or more"),
    "min_tokens": (lambda v: v >= 0, "0 or more"),
    "prefill_step": (lambda v: v >= 1, "1 or more"),
    "seed": (lambda v: 0 <= v < 2**64, "from 0 to 2**64 - 1"),
}

# Option: its key in generation_config.json, and the value when neither gives one (greedy, as in mlx-lm).
_FROM_CHECKPOINT = {
    "temp": ("temperature", 0.0),
    "top_p": ("top_p", 1.0),
    "top_k": ("top_k", 0),
    "min_p": ("min_p", 0.0),
    "repetition_penalty": ("repetition_penalty", 1.0),
}


@dataclass(frozen=True)
class GenerateOptions:
    """How to continue a prompt. None: what the checkpoint's generation_config.json says, else off.

    Args:
        max_tokens: Most tokens to generate. The room left in the model's context is a limit as well.
        temp: Softmax temperature; 0 takes the most likely token: then top_p, top_k and min_p change nothing.
        top_p: Keep the most likely tokens whose probabilities sum to this (1: all).
        top_k: Keep this many of the most likely tokens (0: all).
        min_p: Drop tokens below this share of the most likely token's probability (0: none).
        repetition_penalty: Divisor of the positive logits, factor of the negative ones, of recent tokens
            (https://arxiv.org/abs/1909.05858, section 4.1); 1 is off.
        repetition_context: How many of the last tokens, prompt included, count as recent.
        min_tokens: End-of-sequence and stop strings are impossible within this many tokens.
        seed: Of MLX's random numbers; None leaves them as they are.
        stop: Strings that end the text and are not part of it.
        prefill_step: Tokens of the prompt that go through the model at once: fewer need less memory.

    Raises:
        UsageError: A value is out of its range.
    """

    max_tokens: int = 512
    temp: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    repetition_context: int = 64
    min_tokens: int = 0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    prefill_step: int = PREFILL_STEP

    def __post_init__(self):
        for name in _RANGES:
            if (value := getattr(self, name)) is not None:
                _check(name, value)
        if self.min_tokens > self.max_tokens:
            raise UsageError(f"min_tokens must be at most max_tokens ({self.max_tokens}), not {self.min_tokens}")
        if not all(self.stop):
            raise UsageError("a stop string must have at least one character")


def resolve_options(loaded: LoadedModel, options: GenerateOptions) -> tuple[GenerateOptions, dict[str, str]]:
    """Fill the options that are None, and say for each of them where its value comes from.

    Returns:
        The options without None (except `seed`), and {"temp": "option", "generation_config.json" or "default", ...}.

    Raises:
        TQError: generation_config.json cannot be read or holds a value out of range.
    """
    config = generation_config(loaded.path)
    if config.get("do_sample") is False:
        config["temperature"] = 0.0
    elif config.get("do_sample") and config.get("temperature") is None:
        config["temperature"] = 1.0  # what transformers does with such a file
    if config.get("top_k") == -1:
        config["top_k"] = 0  # another spelling of "off"
    values: dict[str, Any] = {}
    sources: dict[str, str] = {}
    for name, (key, default) in _FROM_CHECKPOINT.items():
        if getattr(options, name) is not None:
            sources[name] = "option"
        elif config.get(key) is not None:
            _check(name, config[key], where=f" in {loaded.path / 'generation_config.json'}")
            values[name], sources[name] = config[key], "generation_config.json"
        else:
            values[name], sources[name] = default, "default"
    return dataclasses.replace(options, **values), sources


def token_picker(options: GenerateOptions, vocab_size: int, key: mx.array | None = None) -> Picker:
    """Resolved options as a function: logits (1, vocab) to a token (1,) and its log-probability (1,).

    Args:
        key: Of random numbers of its own (mx.random.key); None: it takes MLX's.
    """
    keys = _keys(key)
    if mx.default_device() == mx.Device(mx.cpu) and library.state().active:
        return _native_picker(options, keys)
    # mlx-lm refuses a top_k of the whole vocabulary or more, which means the same as no top_k.
    top_k = options.top_k if (options.top_k or 0) < vocab_size else 0
    sampler = _sampler(dataclasses.replace(options, top_k=top_k), keys)

    def pick(logits: mx.array) -> tuple[mx.array, mx.array]:
        logits = logits.astype(mx.float32)  # half precision would round a log-probability of -10 by up to 0.03
        logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        token = sampler(logprobs)
        return token, mx.take_along_axis(logprobs, token[:, None], axis=-1)[:, 0]

    return pick


def _keys(key: mx.array | None) -> Iterator[mx.array | None]:
    """A new key for each token."""
    while key is not None:
        key, one = mx.random.split(key)
        yield one
    yield from itertools.repeat(None)


def _sampler(options: GenerateOptions, keys: Iterator[mx.array | None]) -> Callable[[mx.array], mx.array]:
    """mlx-lm's sampler, which has no keys: its filters go before random numbers that are taken here."""
    from mlx_lm.sample_utils import apply_min_p, apply_top_k, apply_top_p

    temp, top_p, min_p, top_k = options.temp, options.top_p, options.min_p, options.top_k

    def sample(logprobs: mx.array) -> mx.array:
        if not temp:
            return mx.argmax(logprobs, axis=-1)
        if top_p is not None and top_p < 1:
            logprobs = apply_top_p(logprobs, top_p)
        if min_p:
            logprobs = apply_min_p(logprobs, min_p)
        if top_k:
            logprobs = apply_top_k(logprobs, top_k)
        return mx.random.categorical(logprobs / temp, key=next(keys))

    return sample


def _native_picker(options: GenerateOptions, keys: Iterator[mx.array | None]) -> Picker:
    params = library.SampleParams(options.temp, options.top_p, options.min_p, options.top_k)
    zero = mx.zeros((1,))

    def pick(logits: mx.array) -> tuple[mx.array, mx.array]:
        uniform = mx.random.uniform(shape=(1,), key=next(keys)) if options.temp else zero
        outputs = [((1,), mx.uint32), ((1,), mx.float32)]
        token, logprob = lazy.call("tq_sample", params, [logits.astype(mx.float32), uniform], outputs)
        return token, logprob

    return pick


def logits_processors(options: GenerateOptions, prompt_length: int, end_ids: set[int]) -> list[Processor]:
    """Functions (tokens so far, logits (1, vocab)) -> logits, in the order of their application."""
    from mlx_lm.sample_utils import make_logits_processors

    processors: list[Processor] = []
    if options.repetition_penalty != 1:
        processors += make_logits_processors(
            repetition_penalty=options.repetition_penalty, repetition_context_size=options.repetition_context
        )
    if options.min_tokens and end_ids:

        def forbid_end(tokens, logits):
            if len(tokens) - prompt_length < options.min_tokens:
                logits[:, [i for i in end_ids if i < logits.shape[-1]]] = -mx.inf
            return logits

        processors.append(forbid_end)
    return processors


def generation_config(path: Path) -> dict:
    """The checkpoint's generation_config.json; {} where there is none.

    Raises:
        TQError: It is not a JSON object.
    """
    file = path / "generation_config.json"
    if not file.is_file():
        return {}
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise TQError(f"{file} is not valid JSON ({error})", hint="correct it, or take it away") from error
    if not isinstance(config, dict):
        raise TQError(f"{file} must hold a JSON object, not a {type(config).__name__}")
    return config


def _check(name: str, value: Any, where: str = "") -> None:
    valid, words = _RANGES[name]
    if isinstance(value, bool) or not isinstance(value, int | float) or not valid(value):
        raise UsageError(f"{name}{where} must be {words}, not {value!r}")
