"""What is asked of a served model and what comes back: requests, the events of their answers, and figures."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from tq.engine.run.sampling import GenerateOptions
from tq.errors import TQError

Message = dict[str, Any]  # "role", "content", and what a chat template knows besides: "tool_calls", "name", ...


class Busy(TQError):
    """As many requests wait as may: this one is not taken. Trying again later helps."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """A conversation to answer, or a text to continue: one of `messages` and `prompt` is given.

    Attributes:
        messages: Of a conversation, for the model's chat template.
        prompt: Text, or token ids, which are taken as they are.
        tools: Functions that the model may call, as in OpenAI's API: {"type": "function", "function": {...}}.
        options: None in it means what the scheduler's default options say, and then the checkpoint's.
        think: Whether a reasoning model may think, where its template knows how to ask. None: what the template does.
        template_options: Further variables of the chat template.
        top_logprobs: Report log-probabilities: of each token, and of so many of the likeliest. None: report none.
        continue_last: The last message is the assistant's and incomplete: go on with it.
    """

    messages: tuple[Message, ...] | None = None
    prompt: str | tuple[int, ...] | None = None
    tools: tuple[dict[str, Any], ...] = ()
    options: GenerateOptions = field(default_factory=GenerateOptions)
    think: bool | None = None
    template_options: dict[str, Any] = field(default_factory=dict)
    top_logprobs: int | None = None
    continue_last: bool = False


@dataclass(frozen=True)
class TokenLogprob:
    """A generated token. `top`: (id, text, log-probability) of the likeliest tokens in its place, the likeliest first.

    Log-probabilities are natural logarithms at temperature 1, after the repetition penalty.
    """

    token_id: int
    text: str
    logprob: float
    top: tuple[tuple[int, str, float], ...] = ()


@dataclass(frozen=True)
class Reading:
    """So many tokens of the prompt have been read; those that were found in memory or on disk count from the start."""

    done: int
    total: int


@dataclass(frozen=True)
class Piece:
    """Text that comes next: of the answer, or of the reasoning before it.

    `tokens` are those since the last piece, if log-probabilities were asked for. All pieces together have every token;
    a piece may have tokens and no text (markers, the end of sequence), or text and no tokens.
    """

    text: str
    kind: Literal["text", "thought"]
    tokens: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True)
class ToolCall:
    """A function that the model wants to be called. `arguments`: a JSON object, as text."""

    id: str
    name: str
    arguments: str


@dataclass(frozen=True)
class Done:
    """The last event.

    Attributes:
        reason: "stop": end of sequence or a stop string; "length": max_tokens, or the context is full; "tool_calls": as
            "stop", after ToolCalls; "cancelled": nobody wants more.
        stop_text: The stop string that ended the answer.
        cached_tokens: Of the prompt, that did not have to be read.
        completion_tokens: Generated, the end of sequence included.
        prefill_seconds: From when work on the request began until its first token was known.
        decode_seconds: Until its last token.
    """

    reason: Literal["stop", "length", "tool_calls", "cancelled"]
    stop_text: str | None
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    prefill_seconds: float
    decode_seconds: float


Event = Reading | Piece | ToolCall | Done


@dataclass(frozen=True)
class ModelFacts:
    """What can be asked of the model.

    Attributes:
        name: Of its folder or file.
        context_length: Tokens of prompt and answer together; None: nothing bounds them.
        vocabulary: Number of token ids.
        has_chat_template: It can answer messages.
        has_tools: Its template and its answers know calls of functions.
        has_thinking: It can reason before it answers.
        notes: What a person should know about how it runs: how several sequences run at once, packed caches, ...
    """

    name: str
    context_length: int | None
    vocabulary: int
    has_chat_template: bool
    has_tools: bool
    has_thinking: bool
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Stats:
    """Figures since the start, and of now.

    Attributes:
        running: Requests that the model works on.
        queued: Requests that wait.
        finished, cancelled, failed: Requests so far, by how they ended.
        prompt_tokens: Of all prompts; `cached_tokens` of them did not have to be read.
        completion_tokens: Generated.
        kv_bytes: Of the caches of the running requests.
        prefix_entries, prefix_bytes, prefix_budget_bytes: Contexts kept in memory for requests to come.
        mode: "batch": sequences go through the model together; "turns": one after the other, token by token.
    """

    running: int
    queued: int
    finished: int
    cancelled: int
    failed: int
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    kv_bytes: int
    prefix_entries: int
    prefix_bytes: int
    prefix_budget_bytes: int
    mode: Literal["batch", "turns"]
