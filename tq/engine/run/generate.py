"""A prompt in, a stream of tokens out: the chat template, and what happens around each token."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import mlx.core as mx
import mlx.nn as nn

from tq.engine.cache.convert import pack, summary
from tq.engine.cache.settings import KVSettings
from tq.engine.cache.storage import slow
from tq.engine.events import Note
from tq.engine.run import decode, memory
from tq.engine.run.context import Context
from tq.engine.run.sampling import (
    GenerateOptions,
    generation_config,
    logits_processors,
    resolve_options,
    token_picker,
)
from tq.engine.run.token_text import TokenText
from tq.errors import TQError, UsageError

if TYPE_CHECKING:
    from tq.engine.model.load import LoadedModel


@dataclass(frozen=True)
class Token:
    """One generated token, the end-of-sequence token included.

    `text` is what can be shown now: empty while a character is incomplete or a stop string may have begun.
    `logprob` is the natural logarithm of the token's probability at temperature 1, after the repetition penalty.
    """

    text: str
    token_id: int
    logprob: float


@dataclass(frozen=True)
class Finished:
    """The last event. "stop": end-of-sequence or a stop string; "length": max_tokens, or the context is full.

    Prefill lasts until the first token is known; decode is every token after that one. `cached_tokens` of the prompt
    had been read before.
    """

    reason: Literal["stop", "length"]
    prompt_tokens: int
    cached_tokens: int
    tokens: int
    prefill_seconds: float
    decode_seconds: float
    prefill_tokens_per_second: float
    decode_tokens_per_second: float
    peak_memory_bytes: int


def encode_prompt(
    tokenizer, prompt: str, system: str | None = None, raw: bool = False, think: bool = True
) -> list[int]:
    """Turn a question into token ids, through the chat template where the tokenizer has one.

    Args:
        tokenizer: mlx-lm's TokenizerWrapper.
        prompt: The user's message, or the text to continue when `raw` or without a template.
        system: A system message; needs a template.
        raw: Ignore the template.
        think: False asks a reasoning model to answer at once, where its template knows how.

    Raises:
        UsageError: The prompt is empty, or there is no template for the system message.
        TQError: The template refuses the messages.
    """
    if not prompt.strip():
        raise UsageError("the prompt is empty", hint="give at least one character that is not a space")
    if raw or not tokenizer.has_chat_template:
        if system is not None:
            why = "a raw prompt has none" if raw else "this model has none"
            raise UsageError(f"a system prompt needs a chat template, and {why}", hint="put it into the prompt")
        if tokenizer.bos_token and prompt.startswith(tokenizer.bos_token):
            return tokenizer.encode(prompt, add_special_tokens=False)
        return bos_tokens(tokenizer) + tokenizer.encode(prompt, add_special_tokens=False)

    messages = [] if system is None else [{"role": "system", "content": system}]
    return encode_messages(tokenizer, [*messages, {"role": "user", "content": prompt}], think)


def encode_messages(
    tokenizer,
    messages: list[dict[str, Any]],
    think: bool | None = True,
    *,
    tools: Sequence[dict[str, Any]] = (),
    continue_last: bool = False,
    variables: dict[str, Any] | None = None,
) -> list[int]:
    """Turn a conversation into token ids, through the chat template, up to where an answer begins.

    Args:
        messages: Each with "role" and "content", and what the template knows besides.
        think: None leaves it to the template.
        tools: Functions that the model may call.
        continue_last: The last message is the beginning of the answer.
        variables: More for the template.

    Raises:
        TQError: The template refuses the messages.
    """
    from jinja2 import TemplateError

    more: dict[str, Any] = {} if think is None else dict.fromkeys(_thinking_switches(tokenizer), think)
    more |= variables or {}
    if tools:
        more["tools"] = list(tools)
    if continue_last:
        more["continue_final_message"] = True
    try:
        return list(tokenizer.apply_chat_template(messages, add_generation_prompt=not continue_last, **more))
    except (TemplateError, TypeError, ValueError) as error:
        raise TQError(
            f"the model's chat template refuses these messages: {error}",
            hint="it may take them without a system prompt, or as a raw prompt",
        ) from error


def prompt_notes(tokenizer, raw: bool = False, think: bool = True) -> list[Note]:
    """What a person should know about how encode_prompt will treat these arguments."""
    if raw:
        return []
    if not tokenizer.has_chat_template:
        return [Note("this model has no chat template: it continues the prompt as plain text")]
    if not think and not _thinking_switches(tokenizer):
        return [Note("this model's chat template has no switch for thinking: it answers as it always does")]
    return []


def bos_tokens(tokenizer) -> list[int]:
    """[the beginning-of-sequence token] if the tokenizer puts one before a text, else []."""
    bos = [tokenizer.bos_token_id]
    with_special = tokenizer.encode("a", add_special_tokens=True)
    without = tokenizer.encode("a", add_special_tokens=False)
    return bos if with_special[:1] == bos and without[:1] != bos else []


def context_length(config: dict) -> int | None:
    """How many tokens the model was made for, by its config; None if nothing bounds it (recurrent models)."""
    config = {**config, **(config.get("text_config") or {})}
    names = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "n_ctx")
    length = next((config[name] for name in names if config.get(name)), None)
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    original, factor = rope.get("original_max_position_embeddings"), rope.get("factor")
    if length and original and factor:  # some configs state the length before scaling, some after
        length = max(length, int(original * factor))
    return length


def generate(
    loaded: LoadedModel,
    prompt_tokens: Sequence[int],
    options: GenerateOptions | None = None,
    kv: KVSettings | None = None,
    context: Context | None = None,
    continues: bool = False,
) -> Iterator[Token | Finished]:
    """Continue a prompt, one event per token, then one Finished.

    The text of all tokens joined is the answer: only whole characters, and nothing of a stop string.
    Closing the iterator early (Ctrl-C) stops the model and gives its memory back.

    Args:
        kv: Keep keys and values packed like this; None keeps them in float16 or as the model has them.
        context: What the model has read already: a beginning of the prompt. It goes on with the prompt and the answer.
        continues: The answer goes on with the prompt's text: a space at its beginning stays.

    Raises:
        UsageError: No prompt tokens.
        TQError: The prompt does not fit the model's context, generation_config.json is wrong, or nothing can be packed.
    """
    options, _ = resolve_options(loaded, options or GenerateOptions())
    if len(prompt_tokens) == 0:
        raise UsageError("the prompt is empty: the model needs at least 1 token to continue")
    limit = options.max_tokens
    most = context_length(loaded.config)
    if most is not None:
        if len(prompt_tokens) >= most:
            raise TQError(
                f"the prompt has {len(prompt_tokens)} tokens and this model takes 1 to {most - 1}, "
                f"so that its context of {most} has room for an answer",
                hint="shorten the prompt, or choose a model with a longer context",
            )
        limit = min(limit, most - len(prompt_tokens))
    if context is None:
        context = open_context(loaded.model, kv)
    return _events(loaded, list(prompt_tokens), options, limit, context, continues)


def open_context(model: nn.Module, kv: KVSettings | None) -> Context:
    """A context without tokens, packed as `kv` says, from the beginning or from `kv.start` tokens on.

    Raises:
        TQError: No layer's cache can be packed.
    """
    if kv is None or kv.start == 0:
        return Context(lambda: prompt_cache(model, kv))
    prompt_cache(model, kv)  # what cannot be packed is said now, not after so many tokens

    def pack_now(caches: list[Any]) -> None:
        pack(caches, kv, model)
        mx.clear_cache()  # what the unpacked ones took

    return Context(lambda: prompt_cache(model, None), pack_now, kv.start)


def prompt_cache(model: nn.Module, kv: KVSettings | None) -> list[Any]:
    """An empty cache for each layer, packed from the beginning as far as it can be if `kv` is given.

    Raises:
        TQError: No layer's can be packed.
    """
    from mlx_lm.models.cache import make_prompt_cache

    caches = make_prompt_cache(model)
    if kv is not None:
        pack(caches, kv, model)
    return caches


def packing_notes(model: nn.Module, kv: KVSettings | None) -> list[Note]:
    """Which caches of a model `prompt_cache` leaves as they are, and whether packed ones are slow, and why.

    Raises:
        TQError: No layer's can be packed.
    """
    from mlx_lm.models.cache import make_prompt_cache

    if kv is None:
        return []
    notes = [Note(line) for line in summary(pack(make_prompt_cache(model), kv, model))]
    reason = slow(kv)
    if reason is not None:
        notes.append(Note(f"packed keys and values save memory here, not time: no kernel reads them ({reason})"))
    return notes


def _events(
    loaded: LoadedModel,
    prompt_tokens: list[int],
    options: GenerateOptions,
    limit: int,
    context: Context,
    continues: bool,
) -> Iterator[Token | Finished]:
    from mlx_lm.utils import maybe_set_recommended_wired_limit

    ends = end_ids(loaded)
    answer = TokenText(loaded.tokenizer, options, ends, limit, continues)
    if options.seed is not None:
        mx.random.seed(options.seed)
    mx.reset_peak_memory()
    wired_limit = maybe_set_recommended_wired_limit()
    cached = len(context.tokens)
    start = prefilled = time.perf_counter()
    steps = decode.steps(
        loaded.model,
        prompt_tokens,
        limit,
        context,
        logits_processors(options, len(prompt_tokens), ends),
        token_picker(options, len(loaded.tokenizer)),
        options.prefill_step,
    )
    try:
        for token_id, logprob in steps:
            if answer.count == 0:
                prefilled = time.perf_counter()
            yield Token(answer.push(token_id), token_id, logprob)
            if answer.reason is not None:
                break
    finally:
        mx.synchronize()  # the loop works one token ahead
        if wired_limit is not None:
            mx.set_wired_limit(wired_limit)
    count = answer.count
    prefill_seconds, decode_seconds = prefilled - start, time.perf_counter() - prefilled
    yield Finished(
        reason=answer.reason or "length",
        prompt_tokens=len(prompt_tokens),
        cached_tokens=cached,
        tokens=count,
        prefill_seconds=prefill_seconds,
        decode_seconds=decode_seconds,
        prefill_tokens_per_second=(len(prompt_tokens) - cached) / prefill_seconds,
        decode_tokens_per_second=(count - 1) / decode_seconds if count > 1 else 0.0,
        peak_memory_bytes=memory.peak_bytes(),
    )


def end_ids(loaded: LoadedModel) -> set[int]:
    """Every token that ends a sequence: the tokenizer's, config.json's and generation_config.json's."""
    ids = set(loaded.tokenizer.eos_token_ids)
    for config in (loaded.config, generation_config(loaded.path)):
        found = config.get("eos_token_id")
        ids |= {found} if isinstance(found, int) else set(found or ())
    return ids


def _thinking_switches(tokenizer) -> list[str]:
    """Names of the chat template's variables that turn thinking on and off."""
    template = getattr(tokenizer, "chat_template", None)
    if template is None:  # a renderer in code, where mlx-lm knows the name
        return ["enable_thinking"] if tokenizer.has_thinking else []
    text = template if isinstance(template, str) else json.dumps(template)
    return [name for name in ("enable_thinking", "thinking") if re.search(rf"\b{name}\b", text)]
