"""Answers in OpenAI's protocol: documents and server-sent events of chat and text completions, and errors.

Reasoning is `reasoning_content` (DeepSeek, llama.cpp) and `reasoning` (mlx-lm, vLLM): clients read one of them.
`timings` are llama.cpp's.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Sequence
from typing import Any

from tq.engine.run.serve.answer import Answer, Exchange
from tq.engine.run.serve.body import RequestError
from tq.engine.run.serve.requests import Done, Event, Piece, Request, TokenLogprob, ToolCall
from tq.engine.run.serve.served import Served

FINISH = {"stop": "stop", "length": "length", "tool_calls": "tool_calls"}
ERRORS = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
LEAST_LOGPROB = -9999.0  # OpenAI's; JSON has no infinity


class _Choices(Exchange):
    """What both kinds of completions share: ids, usage, and events as server-sent ones."""

    prefix: str
    kind: str  # of a document; a streamed one's is chunk_kind
    chunk_kind: str

    def __init__(
        self,
        requests: Sequence[Request],
        served: Served,
        *,
        streamed: bool = False,
        with_usage: bool = False,
        per_prompt: int = 1,
        ignored: Sequence[str] = (),
        single_call: bool = False,
    ):
        """`with_usage`: a stream ends with the usage. `per_prompt`: so many requests in turn have the same prompt."""
        super().__init__(requests, streamed, ignored, single_call)
        self._usage_wanted, self._per_prompt = with_usage, per_prompt
        self._head = {
            "id": f"{self.prefix}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": served.names.shown,
        }

    def whole(self, answers: Sequence[Answer]) -> dict[str, Any]:
        choices = [self._choice(index, answer) for index, answer in enumerate(answers)]
        return {
            **self._head,
            "object": self.kind,
            "choices": choices,
            "usage": self._usage(answers),
            "timings": timings(answers[0].end),
        }

    def closing(self, answers: Sequence[Answer]) -> str:
        end = self._chunk(None, usage=self._usage(answers)) if self._usage_wanted else ""
        return f"{end}data: [DONE]\n\n"

    def idle(self, answers: Sequence[Answer]) -> str:
        read = [answer.reading for answer in answers if answer.reading is not None]
        return f": keepalive {sum(r.done for r in read)}/{sum(r.total for r in read)}\n\n"

    def failure(self, problem: RequestError) -> str:
        return sse(error(problem))

    def _choice(self, index: int, answer: Answer) -> dict[str, Any]:
        raise NotImplementedError

    def _chunk(self, choice: dict[str, Any] | None, **more: Any) -> str:
        choices = [] if choice is None else [choice]
        return sse({**self._head, "object": self.chunk_kind, "choices": choices, **more})

    def _usage(self, answers: Sequence[Answer]) -> dict[str, Any]:
        """A prompt counts once, however many answers it gets."""
        ends = [answer.end for answer in answers]
        prompts = ends[:: self._per_prompt]
        prompt, completion = sum(e.prompt_tokens for e in prompts), sum(e.completion_tokens for e in ends)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": sum(e.cached_tokens for e in prompts)},
        }


class ChatExchange(_Choices):
    """/v1/chat/completions."""

    prefix, kind, chunk_kind = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def __init__(self, *arguments: Any, **named: Any):
        super().__init__(*arguments, **named)
        self._calls = [0] * len(self.requests)

    def opening(self, prompt_tokens: int) -> str:
        return "".join(
            self._chunk(_delta(index, {"role": "assistant", "content": ""})) for index in range(len(self.requests))
        )

    def event(self, index: int, event: Event) -> str:
        match event:
            case Piece(text, "thought") if text:
                return self._chunk(_delta(index, {"reasoning_content": text, "reasoning": text}))
            case Piece(text, "text", tokens) if text or tokens:
                return self._chunk(_delta(index, {"content": text}, logprobs=_chat_logprobs(tokens)))
            case ToolCall():
                call = {"index": self._calls[index], **_call(event)}
                self._calls[index] += 1
                return self._chunk(_delta(index, {"tool_calls": [call]}))
            case Done():
                return self._chunk(_delta(index, {}, FINISH[event.reason]), timings=timings(event))
        return ""

    def _choice(self, index: int, answer: Answer) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": answer.text or (None if answer.calls else "")}
        if answer.thought:
            message |= {"reasoning_content": answer.thought, "reasoning": answer.thought}
        if answer.calls:
            message["tool_calls"] = [_call(call) for call in answer.calls]
        wanted = self.requests[index].top_logprobs is not None
        return {
            "index": index,
            "message": message,
            "logprobs": {"content": [token_document(token) for token in answer.tokens]} if wanted else None,
            "finish_reason": FINISH[answer.end.reason],
        }


class CompletionExchange(_Choices):
    """/v1/completions."""

    prefix, kind, chunk_kind = "cmpl", "text_completion", "text_completion"

    def __init__(self, *arguments: Any, **named: Any):
        super().__init__(*arguments, **named)
        self._offsets = [0] * len(self.requests)

    def opening(self, prompt_tokens: int) -> str:
        return ""

    def event(self, index: int, event: Event) -> str:
        match event:
            case Piece(text, _, tokens) if text or tokens:
                logprobs = self._logprobs(index, tokens) if tokens else None
                return self._chunk({"index": index, "text": text, "logprobs": logprobs, "finish_reason": None})
            case Done():
                last = {"index": index, "text": "", "logprobs": None, "finish_reason": FINISH[event.reason]}
                return self._chunk(last, timings=timings(event))
        return ""

    def _choice(self, index: int, answer: Answer) -> dict[str, Any]:
        wanted = self.requests[index].top_logprobs is not None
        return {
            "index": index,
            "text": answer.text,
            "logprobs": self._logprobs(index, answer.tokens) if wanted else None,
            "finish_reason": FINISH[answer.end.reason],
        }

    def _logprobs(self, index: int, tokens: Sequence[TokenLogprob]) -> dict[str, Any]:
        offsets = []
        for token in tokens:
            offsets.append(self._offsets[index])
            self._offsets[index] += len(token.text)
        return {
            "tokens": [token.text for token in tokens],
            "token_logprobs": [max(token.logprob, LEAST_LOGPROB) for token in tokens],
            "top_logprobs": [{text: max(value, LEAST_LOGPROB) for _, text, value in token.top} for token in tokens],
            "text_offset": offsets,
        }


def timings(end: Done) -> dict[str, Any]:
    """llama.cpp's figures of an answer."""
    read, made = end.prompt_tokens - end.cached_tokens, end.completion_tokens
    return {
        "cache_n": end.cached_tokens,
        "prompt_n": read,
        "prompt_ms": end.prefill_seconds * 1e3,
        "prompt_per_second": read / end.prefill_seconds if end.prefill_seconds else None,
        "predicted_n": made,
        "predicted_ms": end.decode_seconds * 1e3,
        "predicted_per_second": (made - 1) / end.decode_seconds if end.decode_seconds and made > 1 else None,
    }


def error(problem: RequestError) -> dict[str, Any]:
    """The document of an error."""
    kind = ERRORS.get(problem.status, "invalid_request_error" if problem.status < 500 else "server_error")
    message = f"{problem.message} ({problem.hint})" if problem.hint else problem.message
    return {"error": {"message": message, "type": kind, "param": problem.param, "code": problem.code}}


def _delta(index: int, delta: dict[str, Any], finish: str | None = None, logprobs: Any = None) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}


def _call(call: ToolCall) -> dict[str, Any]:
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


def _chat_logprobs(tokens: Sequence[TokenLogprob]) -> dict[str, Any] | None:
    return {"content": [token_document(token) for token in tokens]} if tokens else None


def token_document(token: TokenLogprob) -> dict[str, Any]:
    """A token with its log-probability."""
    top = [{"id": i, **_logprob(text, logprob)} for i, text, logprob in token.top]
    return {"id": token.token_id, **_logprob(token.text, token.logprob), "top_logprobs": top}


def _logprob(text: str, logprob: float) -> dict[str, Any]:
    """A token that is no whole character has no bytes here: its text stands for them."""
    return {
        "token": text,
        "logprob": max(logprob, LEAST_LOGPROB),
        "bytes": None if "\ufffd" in text else list(text.encode()),
    }


def sse(document: dict[str, Any]) -> str:
    return f"data: {json.dumps(document, ensure_ascii=False)}\n\n"
