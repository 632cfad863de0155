"""Ollama's protocol: /api/chat, /api/generate and what its clients ask of a server, as words only.

https://github.com/ollama/ollama/blob/main/docs/api.md. Streams are a JSON object a line; durations are nanoseconds.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import Field

from tq.engine.run.serve.answer import Answer, Exchange
from tq.engine.run.serve.body import (
    Body,
    RequestError,
    calls_of,
    checked_tools,
    generate_options,
    goes_on,
    not_text,
    refuse_unless_neutral,
    text_of,
)
from tq.engine.run.serve.openai_answer import token_document
from tq.engine.run.serve.requests import Done, Event, Piece, Request, ToolCall
from tq.engine.run.serve.served import Served, timestamp

VERSION = "0.12.11"  # of the Ollama whose interface this is: clients ask for a least one
OPTIONS = {
    "temperature": "temp",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repeat_penalty": "repetition_penalty",
    "repeat_last_n": "repetition_context",
    "seed": "seed",
    "num_predict": "max_tokens",
}
NOT_SAMPLED = "use top_p or min_p"
NEUTRAL_OPTIONS: dict[str, tuple[tuple[Any, ...], str]] = {
    "presence_penalty": ((0,), "use repeat_penalty"),
    "frequency_penalty": ((0,), "use repeat_penalty"),
    "typical_p": ((1,), NOT_SAMPLED),
    "tfs_z": ((1,), NOT_SAMPLED),
    "mirostat": ((0,), NOT_SAMPLED),
}
NOT_FORCED = "the form of an answer cannot be guaranteed; ask for it in the messages"
NEUTRAL: dict[str, tuple[tuple[Any, ...], str]] = {
    "format": (("",), NOT_FORCED),
    "suffix": (("",), "the model only continues what is before"),
    "template": (("",), "the model's own template is used; raw: true uses none"),
    "context": (([],), "send messages to /api/chat"),
    "images": (([],), "the model reads text alone"),
}
REASONS = {"stop": "stop", "length": "length", "tool_calls": "stop"}
MOST_LOGPROBS = 20


class Options(Body):
    """`options` of a request."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repeat_penalty: float | None = None
    repeat_last_n: int | None = None
    seed: int | None = None
    num_predict: int | None = None
    stop: str | list[str] | None = None


class Asked(Body):
    """What chat and generate share."""

    model: str | None = None
    stream: bool | None = None
    options: dict[str, Any] | None = None
    think: bool | str | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=MOST_LOGPROBS)


class Chat(Asked):
    """The body of /api/chat."""

    messages: list[dict[str, Any]] = Field(default=[])
    tools: list[dict[str, Any]] | None = None


class Generate(Asked):
    """The body of /api/generate."""

    prompt: str = ""
    system: str | None = None
    raw: bool | None = None


class Named(Body):
    """The body of /api/show: either name is used."""

    model: str | None = None
    name: str | None = None


def chat(document: Mapping[str, Any], served: Served) -> AnswerExchange | None:
    """A body of /api/chat; None if it only wants the model loaded.

    Raises:
        RequestError: It cannot be done, or not as asked.
    """
    body = Chat.read(document)
    messages = [_message(message) for message in body.messages]
    options = _options(body, served)
    if not messages:
        return None
    request = Request(
        messages=tuple(messages),
        tools=checked_tools(body.tools),
        continue_last=goes_on(messages),
        **options,
    )
    return AnswerExchange(request, served, body, _chat_text)


def generate(document: Mapping[str, Any], served: Served) -> AnswerExchange | None:
    """A body of /api/generate; None if it only wants the model loaded. A prompt is a message where there is a template.

    Raises:
        RequestError: It cannot be done, or not as asked.
    """
    body = Generate.read(document)
    options = _options(body, served)
    if not body.prompt:
        return None
    if body.raw or not served.has_chat_template:
        if body.system:
            raise RequestError("system needs a chat template: raw has none, or the model", param="system")
        request = Request(prompt=body.prompt, **options)
    else:
        system = [{"role": "system", "content": body.system}] if body.system else []
        request = Request(messages=(*system, {"role": "user", "content": body.prompt}), **options)
    return AnswerExchange(request, served, body, _generated_text)


def loaded(served: Served, chat: bool) -> dict[str, Any]:
    """The answer to a request without a prompt, which only wants the model loaded."""
    empty: dict[str, Any] = {"message": {"role": "assistant", "content": ""}} if chat else {"response": ""}
    return {**_head(served), **empty, "done": True, "done_reason": "load"}


def error(problem: RequestError) -> dict[str, Any]:
    """The document of an error."""
    return {"error": f"{problem.message} ({problem.hint})" if problem.hint else problem.message}


def tags(served: Served) -> dict[str, Any]:
    """The document of /api/tags."""
    return {"models": [{**_model(served), "modified_at": served.started}]}


def running(served: Served) -> dict[str, Any]:
    """The document of /api/ps: the model stays as long as the server."""
    forever = timestamp(served.created + 100 * 365 * 86400)
    more = {"expires_at": forever, "size_vram": served.size_bytes, "context_length": served.context_length}
    return {"models": [{**_model(served), **more}]}


def show(document: Mapping[str, Any], served: Served) -> dict[str, Any]:
    """The document of /api/show.

    Raises:
        RequestError: Another model is asked for.
    """
    asked = Named.read(document)
    served.names.check(asked.model or asked.name)
    abilities = {"tools": served.has_tools, "thinking": served.has_thinking}
    return {
        "modelfile": f"# served by tq\nFROM {served.names.shown}\n",
        "parameters": "",
        "template": served.template,
        "details": _details(served),
        "model_info": {
            "general.architecture": served.family,
            f"{served.family}.context_length": served.context_length,
        },
        "capabilities": ["completion", *(name for name, has in abilities.items() if has)],
        "modified_at": served.started,
    }


class AnswerExchange(Exchange):
    """/api/chat and /api/generate, which differ in where text stands (`text`)."""

    content_type = "application/x-ndjson"

    def __init__(self, request: Request, served: Served, body: Asked, text: Any):
        options = Options.read(body.options or {}).unread()
        ignored = [name for name in body.unread() if name not in NEUTRAL]
        ignored += [f"options.{name}" for name in options if name not in NEUTRAL_OPTIONS]
        super().__init__([request], body.stream is not False, ignored)
        self._served, self._text, self._start = served, text, time.perf_counter()
        self._with_logprobs = bool(body.logprobs)
        self._calls = 0

    def whole(self, answers: Sequence[Answer]) -> dict[str, Any]:
        (answer,) = answers
        logprobs = {"logprobs": [token_document(token) for token in answer.tokens]} if self._with_logprobs else {}
        text = self._text(answer.text, answer.thought, answer.calls)
        return {**_head(self._served), **text, **logprobs, **self._ended(answer.end)}

    def opening(self, prompt_tokens: int) -> str:
        return ""

    def event(self, index: int, event: Event) -> str:
        match event:
            case Piece(text, "thought") if text:
                return self._line(**self._text("", text, ()))
            case Piece(text, "text", tokens) if text or tokens:
                logprobs = {"logprobs": [token_document(token) for token in tokens]} if tokens else {}
                return self._line(**self._text(text, "", ()), **logprobs)
            case ToolCall():
                self._calls += 1
                return self._line(**self._text("", "", (event,), self._calls - 1))
            case Done():
                return self._line(**self._text("", "", ()), **self._ended(event))
        return ""

    def closing(self, answers: Sequence[Answer]) -> str:
        return ""

    def idle(self, answers: Sequence[Answer]) -> str:
        return self._line(**self._text("", "", ()))

    def failure(self, problem: RequestError) -> str:
        return json.dumps(error(problem), ensure_ascii=False) + "\n"

    def _line(self, **fields: Any) -> str:
        return json.dumps({**_head(self._served), "done": False, **fields}, ensure_ascii=False) + "\n"

    def _ended(self, end: Done) -> dict[str, Any]:
        return {
            "done": True,
            "done_reason": REASONS[end.reason],
            "total_duration": _nanoseconds(time.perf_counter() - self._start),
            "load_duration": 0,
            "prompt_eval_count": end.prompt_tokens,
            "prompt_eval_duration": _nanoseconds(end.prefill_seconds),
            "eval_count": end.completion_tokens,
            "eval_duration": _nanoseconds(end.decode_seconds),
        }


def _options(body: Asked, served: Served) -> dict[str, Any]:
    """The fields of a Request that /api/chat and /api/generate share."""
    served.names.check(body.model)
    refuse_unless_neutral(body.model_extra or {}, NEUTRAL)
    given = Options.read(body.options or {})
    refuse_unless_neutral(given.model_extra or {}, NEUTRAL_OPTIONS)
    values = dict(given)
    if values["repeat_last_n"] == 0:  # nothing counts as repeated
        values |= {"repeat_last_n": None, "repeat_penalty": 1.0}
    effort = {"reasoning_effort": body.think} if isinstance(body.think, str) else {}
    return {
        "options": generate_options(served.defaults, values, OPTIONS, given.stop),
        "think": served.think if body.think is None else bool(body.think),
        "template_options": effort,
        "top_logprobs": (body.top_logprobs or 0) if body.logprobs else None,
    }


def _message(message: dict[str, Any]) -> dict[str, Any]:
    """A message as chat templates take it."""
    role = message.get("role")
    if role not in ("system", "user", "assistant", "tool"):
        raise RequestError(
            f"the role of a message must be system, user, assistant or tool, not {role!r}", param="messages"
        )
    if message.get("images"):
        raise not_text("image", "messages")
    made = {"role": role, "content": text_of(message.get("content"))}
    if message.get("thinking"):
        made["reasoning_content"] = message["thinking"]
    if message.get("tool_name"):
        made["name"] = message["tool_name"]
    if message.get("tool_call_id"):
        made["tool_call_id"] = message["tool_call_id"]
    if calls := message.get("tool_calls"):
        made["tool_calls"] = calls_of(calls)
    return made


def _chat_text(text: str, thought: str, calls: Sequence[ToolCall], first: int = 0) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": text}
    if thought:
        message["thinking"] = thought
    if calls:
        message["tool_calls"] = [
            {
                "id": call.id,
                "function": {"index": at, "name": call.name, "arguments": json.loads(call.arguments or "{}")},
            }
            for at, call in enumerate(calls, first)
        ]
    return {"message": message}


def _generated_text(text: str, thought: str, calls: Sequence[ToolCall], first: int = 0) -> dict[str, Any]:
    return {"response": text, **({"thinking": thought} if thought else {})}


def _head(served: Served) -> dict[str, Any]:
    return {"model": served.names.shown, "created_at": timestamp(time.time())}


def _model(served: Served) -> dict[str, Any]:
    name = served.names.shown
    about = {"name": name, "model": name, "size": served.size_bytes, "digest": served.fingerprint}
    return {**about, "details": _details(served)}


def _details(served: Served) -> dict[str, Any]:
    return {
        "parent_model": "",
        "format": served.file_format,
        "family": served.family,
        "families": [served.family],
        "parameter_size": "",
        "quantization_level": served.quantization,
    }


def _nanoseconds(seconds: float) -> int:
    return round(seconds * 1e9)
