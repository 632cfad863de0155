"""Anthropic's protocol: /v1/messages and /v1/messages/count_tokens, as words only. https://docs.anthropic.com/en/api."""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import Field

from tq.engine.run.serve.answer import Answer, Exchange
from tq.engine.run.serve.body import (
    Body,
    RequestError,
    call_of,
    function,
    generate_options,
    goes_on,
    not_text,
    refuse_unless_neutral,
    text_of,
)
from tq.engine.run.serve.requests import Done, Event, Piece, Request, ToolCall
from tq.engine.run.serve.served import Served

OPTIONS = {"temperature": "temp", "top_p": "top_p", "top_k": "top_k", "max_tokens": "max_tokens"}
NEUTRAL: dict[str, tuple[tuple[Any, ...], str]] = {
    "mcp_servers": (([],), "servers of tools are the client's to call"),
    "container": ((), "there is no code execution"),
}
STOP = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}
ERRORS = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}
# The first line of Claude Code's system message: an account of the request that differs each time and is not for the
# model. Left in, no prompt would begin like the one before, and each would be read from its first token.
BILLING = "x-anthropic-billing-header:"


class Thinking(Body):
    """Whether the model may think."""

    type: str


class Counted(Body):
    """The body of /v1/messages/count_tokens."""

    model: str | None = None
    messages: list[dict[str, Any]] = Field(min_length=1)
    system: str | list[dict[str, Any]] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: dict[str, Any] | None = None
    thinking: Thinking | None = None


class Create(Counted):
    """The body of /v1/messages."""

    max_tokens: int = Field(ge=1)
    stream: bool | None = None
    stop_sequences: list[str] | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None


def message(document: Mapping[str, Any], served: Served) -> MessageExchange:
    """A body of /v1/messages.

    Raises:
        RequestError: It cannot be done, or not as asked.
    """
    body = Create.read(document)
    options = generate_options(served.defaults, dict(body), OPTIONS, body.stop_sequences)
    refuse_unless_neutral(body.model_extra or {}, NEUTRAL)
    asked = (body.model_extra or {}).get("output_config")
    if isinstance(asked, dict) and asked.get("format") is not None:
        raise RequestError("output_config.format is not supported here: the form of an answer cannot be guaranteed")
    single = bool((body.tool_choice or {}).get("disable_parallel_tool_use"))
    request = _request(body, served, options=options)
    ignored = [name for name in body.unread() if name not in NEUTRAL]
    ignored += [f"thinking.{name}" for name in (body.thinking.unread() if body.thinking else ())]
    return MessageExchange([request], served, bool(body.stream), ignored, single)


def counted(document: Mapping[str, Any], served: Served) -> Request:
    """A body of /v1/messages/count_tokens, as the request whose prompt is to be counted.

    Raises:
        RequestError: As for `message`.
    """
    return _request(Counted.read(document), served)


def error(problem: RequestError) -> dict[str, Any]:
    """The document of an error."""
    kind = ERRORS.get(problem.status, "invalid_request_error" if problem.status < 500 else "api_error")
    message = f"{problem.message} ({problem.hint})" if problem.hint else problem.message
    return {"type": "error", "error": {"type": kind, "message": message}}


class MessageExchange(Exchange):
    """/v1/messages: an answer is a list of blocks, each of reasoning, of text, or of a call."""

    def __init__(
        self,
        requests: Sequence[Request],
        served: Served,
        streamed: bool,
        ignored: Sequence[str] = (),
        single_call: bool = False,
    ):
        super().__init__(requests, streamed, ignored, single_call)
        self._id, self._model = f"msg_{uuid.uuid4().hex}", served.names.shown
        self._open: str | None = None  # the kind of the block that goes on
        self._blocks = 0

    def whole(self, answers: Sequence[Answer]) -> dict[str, Any]:
        (answer,) = answers
        blocks: list[dict[str, Any]] = []
        if answer.thought:
            blocks.append({"type": "thinking", "thinking": answer.thought, "signature": ""})
        if answer.text or not (blocks or answer.calls):
            blocks.append({"type": "text", "text": answer.text})
        blocks += [{**_call(call), "input": json.loads(call.arguments or "{}")} for call in answer.calls]
        return {**self._head(), "content": blocks, **_stopped(answer.end), "usage": _usage(answer.end)}

    def opening(self, prompt_tokens: int) -> str:
        usage = {"input_tokens": prompt_tokens, "output_tokens": 0}
        start = {**self._head(), "content": [], "stop_reason": None, "stop_sequence": None, "usage": usage}
        return _sse("message_start", message=start) + _sse("ping")

    def event(self, index: int, event: Event) -> str:
        match event:
            case Piece(text, "thought") if text:
                block = {"type": "thinking", "thinking": "", "signature": ""}
                return self._in(block) + self._delta("thinking_delta", thinking=text)
            case Piece(text, "text") if text:
                return self._in({"type": "text", "text": ""}) + self._delta("text_delta", text=text)
            case ToolCall():
                return (
                    self._closed()
                    + self._in({**_call(event), "input": {}})
                    + self._delta("input_json_delta", partial_json=event.arguments)
                    + self._closed()
                )
            case Done():
                # Clients expect a block, even of an answer without a word.
                empty = "" if self._blocks else self._in({"type": "text", "text": ""})
                delta = _sse("message_delta", delta=_stopped(event), usage=_usage(event))
                return empty + self._closed() + delta
        return ""

    def closing(self, answers: Sequence[Answer]) -> str:
        return _sse("message_stop")

    def idle(self, answers: Sequence[Answer]) -> str:
        return _sse("ping")

    def failure(self, problem: RequestError) -> str:
        return _sse(**error(problem))

    def _head(self) -> dict[str, Any]:
        return {"id": self._id, "type": "message", "role": "assistant", "model": self._model}

    def _in(self, block: dict[str, Any]) -> str:
        """Begins a block, unless one of its kind goes on."""
        if self._open == block["type"]:
            return ""
        closed = self._closed()
        self._open = block["type"]
        self._blocks += 1
        return closed + _sse("content_block_start", index=self._blocks - 1, content_block=block)

    def _delta(self, kind: str, **content: str) -> str:
        return _sse("content_block_delta", index=self._blocks - 1, delta={"type": kind, **content})

    def _closed(self) -> str:
        if self._open is None:
            return ""
        signature = self._delta("signature_delta", signature="") if self._open == "thinking" else ""
        self._open = None
        return signature + _sse("content_block_stop", index=self._blocks - 1)


def _request(body: Counted, served: Served, **more: Any) -> Request:
    served.names.check(body.model)
    messages = [part for given in body.messages for part in _messages(given)]
    if system := _system(body.system):
        messages.insert(0, {"role": "system", "content": system})
    think = served.think if body.thinking is None else body.thinking.type != "disabled"
    return Request(messages=tuple(messages), tools=_tools(body), think=think, continue_last=goes_on(messages), **more)


def _system(system: str | list[dict[str, Any]] | None) -> str:
    blocks = [{"type": "text", "text": system}] if isinstance(system, str) else system or []
    return text_of([block for block in blocks if not str(block.get("text")).startswith(BILLING)], "system")


def _messages(given: dict[str, Any]) -> list[dict[str, Any]]:
    """A message of blocks as the messages that chat templates take: results of tools have a role of their own."""
    role, content = given.get("role"), given.get("content")
    if role not in ("user", "assistant", "system"):
        raise RequestError(f"the role of a message must be user, assistant or system, not {role!r}", param="messages")
    if isinstance(content, str):
        return [{"role": role, "content": content}]
    if not isinstance(content, list) or not all(isinstance(block, dict) for block in content):
        raise RequestError("content must be a text or a list of blocks", param="messages")
    texts, thoughts, calls, results = [], [], [], []
    for block in content:
        match block.get("type"):
            case "text":
                texts.append(block)
            case "thinking":
                thoughts.append(str(block.get("thinking") or ""))
            case "redacted_thinking":
                pass  # nobody but its author can read it
            case "tool_use":
                calls.append(call_of(block.get("id"), block.get("name"), block.get("input")))
            case "tool_result":
                text = text_of(block.get("content"), "tool_result")
                results.append({"role": "tool", "tool_call_id": block.get("tool_use_id"), "content": text})
            case kind:
                raise not_text(kind, "messages.content")
    made: dict[str, Any] = {"role": role, "content": text_of(texts)}
    if thoughts:
        made["reasoning_content"] = "\n".join(thoughts)
    if calls:
        made["tool_calls"] = calls
    return results if results and not texts else [*results, made]


def _tools(body: Counted) -> tuple[dict[str, Any], ...]:
    tools = body.tools or []
    for tool in tools:
        if tool.get("type") not in (None, "custom"):
            raise RequestError(
                f"the tool {tool.get('type')!r} is one of Anthropic's servers; here the client runs its own",
                param="tools",
            )
        if not isinstance(tool.get("name"), str):
            raise RequestError("a tool has no name", param="tools")
    match (body.tool_choice or {}).get("type", "auto"):
        case "auto":
            return tuple(function(tool["name"], tool.get("description"), tool.get("input_schema")) for tool in tools)
        case "none":
            return ()
        case other:
            raise RequestError(
                f"tool_choice {other!r} cannot be guaranteed here; auto and none are what there is",
                param="tool_choice",
            )


def _call(call: ToolCall) -> dict[str, Any]:
    return {"type": "tool_use", "id": call.id, "name": call.name}


def _stopped(end: Done) -> dict[str, Any]:
    reason = "stop_sequence" if end.stop_text is not None and end.reason == "stop" else STOP[end.reason]
    return {"stop_reason": reason, "stop_sequence": end.stop_text if reason == "stop_sequence" else None}


def _usage(end: Done) -> dict[str, int]:
    """`input_tokens` are those that had to be read."""
    return {
        "input_tokens": end.prompt_tokens - end.cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": end.cached_tokens,
        "output_tokens": end.completion_tokens,
    }


def _sse(type: str, **fields: Any) -> str:
    return f"event: {type}\ndata: {json.dumps({'type': type, **fields}, ensure_ascii=False)}\n\n"
