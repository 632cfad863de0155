"""Requests in OpenAI's protocol: bodies of /v1/chat/completions and /v1/completions, and the lists of models.

https://platform.openai.com/docs/api-reference, with the options of mlx-lm's and llama.cpp's servers beside OpenAI's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import Field

from tq.engine.run.serve.body import (
    Body,
    RequestError,
    calls_of,
    checked_tools,
    generate_options,
    goes_on,
    refuse_unless_neutral,
    text_of,
)
from tq.engine.run.serve.openai_answer import ChatExchange, CompletionExchange
from tq.engine.run.serve.requests import Request
from tq.engine.run.serve.served import Served

# OpenAI's, vLLM's, mlx-lm's and llama.cpp's names of the engine's options. Of two names for one, the later one counts.
OPTIONS = {
    "temperature": "temp",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repeat_penalty": "repetition_penalty",
    "repetition_penalty": "repetition_penalty",
    "repeat_last_n": "repetition_context",
    "repetition_context_size": "repetition_context",
    "min_tokens": "min_tokens",
    "seed": "seed",
    "n_predict": "max_tokens",
    "max_tokens": "max_tokens",
    "max_completion_tokens": "max_tokens",
}
NOT_SAMPLED = "use repetition_penalty"
NOT_FORCED = "the form of an answer cannot be guaranteed; ask for it in the messages"
NEUTRAL: dict[str, tuple[tuple[Any, ...], str]] = {
    "presence_penalty": ((0,), NOT_SAMPLED),
    "frequency_penalty": ((0,), NOT_SAMPLED),
    "logit_bias": (({},), "tokens cannot be favoured or forbidden"),
    "response_format": (({"type": "text"},), NOT_FORCED),
    "grammar": (("",), NOT_FORCED),
    "json_schema": (({},), NOT_FORCED),
    "functions": (([],), "use tools"),
    "function_call": (("none", "auto"), "use tools and tool_choice"),
    "audio": ((), "the model writes text alone"),
    "modalities": ((["text"],), "the model writes text alone"),
    "web_search_options": ((), "there is no web search"),
    "suffix": (("",), "the model only continues what is before"),
    "echo": ((False,), "the answer never repeats the prompt"),
    "best_of": ((1,), "ask for n answers and choose"),
    "use_beam_search": ((False,), "answers are sampled"),
    "xtc_probability": ((0,), "use min_p"),
    "mirostat": ((0,), "use min_p or top_p"),
    "typical_p": ((1,), "use min_p or top_p"),
    "draft_model": (("default_model",), "there is no draft model"),
    "adapters": ((), "merge the adapter into the model"),
}
# What transformers takes in the place of variables of a template: a client has no business with how it is called.
NOT_VARIABLES = frozenset(
    ("add_generation_prompt", "chat_template", "continue_final_message", "conversation", "max_length", "messages")
    + ("padding", "return_assistant_tokens_mask", "return_dict", "return_tensors", "sanitize_control_tokens")
    + ("tokenize", "tokenizer_kwargs", "tools", "truncation")
)
MOST_ANSWERS = 16
MOST_LOGPROBS = 20


class StreamOptions(Body):
    """How a stream is sent."""

    include_usage: bool | None = None


class Sampled(Body):
    """What chat and text completions share."""

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: int | None = Field(default=None, ge=1, le=MOST_ANSWERS)
    stop: str | list[str] | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repeat_penalty: float | None = None
    repetition_penalty: float | None = None
    repeat_last_n: int | None = None
    repetition_context_size: int | None = None
    min_tokens: int | None = None
    seed: int | None = None
    n_predict: int | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None


class Chat(Sampled):
    """The body of /v1/chat/completions."""

    messages: list[dict[str, Any]] = Field(min_length=1)
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=MOST_LOGPROBS)
    reasoning_effort: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class Completion(Sampled):
    """The body of /v1/completions."""

    prompt: str | list[Any]
    logprobs: bool | int | None = None


def chat(document: Mapping[str, Any], served: Served) -> ChatExchange:
    """A body of /v1/chat/completions.

    Raises:
        RequestError: It cannot be done, or not as asked.
    """
    body = Chat.read(document)
    served.names.check(body.model)
    ignored = _ignored(body)
    messages = [_message(message) for message in body.messages]
    think, variables = _thinking(body)
    top = (body.top_logprobs or 0) if body.logprobs else None
    if body.top_logprobs and not body.logprobs:
        raise RequestError("top_logprobs needs logprobs: true", param="top_logprobs")
    request = Request(
        messages=tuple(messages),
        tools=_tools(body),
        options=generate_options(served.defaults, dict(body), OPTIONS, body.stop),
        think=served.think if think is None and not {"enable_thinking", "thinking"} & variables.keys() else think,
        template_options=variables,
        top_logprobs=top,
        continue_last=goes_on(messages),
    )
    return ChatExchange(
        _copies([request], body.n), served, single_call=body.parallel_tool_calls is False, **_answered(body, ignored)
    )


def completion(document: Mapping[str, Any], served: Served) -> CompletionExchange:
    """A body of /v1/completions: one or several prompts, as texts or as token ids.

    Raises:
        RequestError: It cannot be done, or not as asked.
    """
    body = Completion.read(document)
    served.names.check(body.model)
    ignored = _ignored(body)
    options = generate_options(served.defaults, dict(body), OPTIONS, body.stop)
    top = body.logprobs if body.logprobs is None or isinstance(body.logprobs, bool) else int(body.logprobs)
    if top is True or top is False:  # mlx-lm's form
        top = 0 if top else None
    if top is not None and not 0 <= top <= MOST_LOGPROBS:
        raise RequestError(f"logprobs must be from 0 to {MOST_LOGPROBS}", param="logprobs")
    prompts = [Request(prompt=prompt, options=options, top_logprobs=top) for prompt in _prompts(body.prompt)]
    return CompletionExchange(_copies(prompts, body.n), served, **_answered(body, ignored))


def model(served: Served) -> dict[str, Any]:
    """The model, as lists have it."""
    about = {"context_length": served.context_length, "size": served.size_bytes, "quantization": served.quantization}
    return {
        "id": served.names.shown,
        "object": "model",
        "created": int(served.created),
        "owned_by": "tq",
        "meta": about,
        # Anthropic's words for the same.
        "type": "model",
        "display_name": served.names.shown,
        "created_at": served.started,
    }


def models(served: Served) -> dict[str, Any]:
    """The document of /v1/models."""
    return {"object": "list", "data": [model(served)], "has_more": False}


def _answered(body: Sampled, ignored: tuple[str, ...]) -> dict[str, Any]:
    """How an exchange is to answer."""
    asked = body.stream_options
    return {
        "streamed": bool(body.stream),
        "with_usage": asked is not None and bool(asked.include_usage),
        "per_prompt": body.n or 1,
        "ignored": ignored,
    }


def _ignored(body: Body) -> tuple[str, ...]:
    """Refuses what would change the answer and is not there; the rest that means nothing."""
    refuse_unless_neutral(body.model_extra or {}, NEUTRAL)
    return tuple(name for name in body.unread() if name not in NEUTRAL)


def _message(message: dict[str, Any]) -> dict[str, Any]:
    """A message as chat templates take it."""
    role = message.get("role")
    if not isinstance(role, str) or not role:
        raise RequestError("a message has no role: system, user, assistant or tool", param="messages")
    made = {name: value for name, value in message.items() if value is not None and name != "reasoning"}
    made["role"] = {"developer": "system", "function": "tool"}.get(role, role)
    made["content"] = text_of(message.get("content"), "messages.content")
    if thought := message.get("reasoning_content") or message.get("reasoning"):
        made["reasoning_content"] = thought
    if calls := message.get("tool_calls"):
        made["tool_calls"] = calls_of(calls)
    return made


def _tools(body: Chat) -> tuple[dict[str, Any], ...]:
    """The functions that the model is told of."""
    tools = checked_tools(body.tools)
    match body.tool_choice:
        case None | "auto":
            return tools
        case "none":
            return ()
    wanted = "a call of a certain function" if isinstance(body.tool_choice, dict) else repr(body.tool_choice)
    raise RequestError(
        f"tool_choice: {wanted} cannot be guaranteed here; auto and none are what there is", param="tool_choice"
    )


def _thinking(body: Chat) -> tuple[bool | None, dict[str, Any]]:
    """Whether the model may think, and variables of the chat template."""
    variables = dict(body.chat_template_kwargs or {})
    if wrong := sorted(NOT_VARIABLES & variables.keys()):
        raise RequestError(
            f"{wrong[0]} is no variable of a chat template that a request may set", param="chat_template_kwargs"
        )
    match body.reasoning_effort:
        case None:
            return None, variables
        case "none":
            return False, variables
        case effort:
            return True, {"reasoning_effort": effort, **variables}


def _copies(requests: Sequence[Request], n: int | None) -> list[Request]:
    """`n` of each; with a seed, each has its own, so that answers differ and the whole can be repeated."""
    made = []
    for request in requests:
        seed = request.options.seed
        for copy in range(n or 1):
            options = (
                request.options if seed is None else dataclasses.replace(request.options, seed=(seed + copy) % 2**64)
            )
            made.append(dataclasses.replace(request, options=options))
    return made


def _prompts(prompt: str | list[Any]) -> list[str | tuple[int, ...]]:
    if isinstance(prompt, str):
        return [prompt]
    if prompt and all(_is_token(token) for token in prompt):
        return [tuple(prompt)]
    if not 1 <= len(prompt) <= MOST_ANSWERS:
        raise RequestError(
            f"prompt must be a text, a list of token ids, or 1 to {MOST_ANSWERS} of them", param="prompt"
        )
    found: list[str | tuple[int, ...]] = []
    for one in prompt:
        if isinstance(one, str):
            found.append(one)
        elif isinstance(one, list) and one and all(_is_token(token) for token in one):
            found.append(tuple(one))
        else:
            raise RequestError("each prompt must be a text or a list of token ids", param="prompt")
    return found


def _is_token(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
