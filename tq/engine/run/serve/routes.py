"""What each path does: a request's body to its protocol, to the scheduler, and back. Sockets are http.py's."""

from __future__ import annotations

import contextlib
import json
import logging
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from tq import __version__, settings
from tq.engine.run.serve import anthropic, ollama, openai, openai_answer
from tq.engine.run.serve.answer import Answer, Exchange, Stream, follow
from tq.engine.run.serve.body import Body, RequestError
from tq.engine.run.serve.metrics import CONTENT_TYPE, Metrics, Record
from tq.engine.run.serve.requests import Busy, Done, Event, Request, Stats
from tq.engine.run.serve.served import Served
from tq.errors import TQError, UsageError

BEAT_SECONDS = 0.5  # between two looks whether a client is still there
KEEPALIVE_SECONDS = 5.0  # silence after which a stream says that it lives
SETTLE_SECONDS = 1.0  # for the figures of an answer that was cancelled
BUSY_SECONDS, LOADING_SECONDS = 1, 5  # when to try again

logger = logging.getLogger(__name__)


class Scheduler(Protocol):
    """What is used of the scheduler."""

    def submit(self, request: Request) -> Stream: ...

    def stats(self) -> Stats: ...


class Tokens(Protocol):
    """What is used of the tokenizer."""

    def count(self, request: Request) -> int: ...

    def encode(self, text: str, special: bool) -> list[int]: ...

    def decode(self, tokens: Sequence[int]) -> str: ...


class ClientGone(Exception):
    """Nobody reads the answer any more."""


@dataclass
class Call:
    """A request of a client. `gone` tells whether it has left; `record` is filled on the way."""

    method: str
    path: str
    body: bytes
    record: Record
    gone: Callable[[], bool] = lambda: False


@dataclass
class Reply:
    """A whole response. `content`: a document for JSON, or a text."""

    status: int
    content: dict[str, Any] | str
    content_type: str = "application/json"
    headers: dict[str, str] = field(default_factory=dict)


@dataclass
class Streaming:
    """A response that is sent as it comes; an empty chunk is only a beat. `cancel` must be called when it is over."""

    content_type: str
    chunks: Generator[str, None, None]
    cancel: Callable[[], None]


Response = Reply | Streaming


@dataclass(frozen=True)
class _Engine:
    scheduler: Scheduler
    tokens: Tokens
    served: Served


class Service:
    """The routes over one model. It is there before the model is: until `ready`, requests are asked to come again."""

    def __init__(self) -> None:
        self.metrics = Metrics()
        self.closing = False
        self._engine: _Engine | None = None
        self._routes: dict[tuple[str, str], Callable[[Call], Response]] = {
            ("GET", "/"): self._root,
            ("GET", "/health"): self._health,
            ("GET", "/metrics"): self._metrics,
            ("GET", "/v1/models"): lambda call: Reply(200, openai.models(self._now().served)),
            ("POST", "/v1/chat/completions"): self._chat,
            ("POST", "/v1/completions"): self._completion,
            ("POST", "/v1/messages"): self._message,
            ("POST", "/v1/messages/count_tokens"): self._count,
            ("POST", "/api/chat"): self._ollama_chat,
            ("POST", "/api/generate"): self._ollama_generate,
            ("GET", "/api/tags"): lambda call: Reply(200, ollama.tags(self._now().served)),
            ("GET", "/api/ps"): lambda call: Reply(200, ollama.running(self._now().served)),
            ("POST", "/api/show"): lambda call: Reply(200, ollama.show(_document(call), self._now().served)),
            ("GET", "/api/version"): lambda call: Reply(200, {"version": ollama.VERSION, "tq": __version__}),
            ("POST", "/tokenize"): self._tokenize,
            ("POST", "/detokenize"): self._detokenize,
        }
        for short in ("/chat/completions", "/models"):  # mlx-lm's and llama.cpp's servers have them
            self._routes |= {(m, short): do for (m, path), do in list(self._routes.items()) if path == f"/v1{short}"}

    def ready(self, scheduler: Scheduler, tokens: Tokens, served: Served) -> None:
        """Answer from now on."""
        self._engine = _Engine(scheduler, tokens, served)

    def respond(self, call: Call) -> Response:
        """The response to a call; what goes wrong is one too.

        Raises:
            ClientGone: There is nobody to respond to.
        """
        try:
            return self._route(call)(call)
        except ClientGone:
            raise
        except Exception as problem:
            return self.problem(call.path, problem, call.record)

    def problem(self, path: str, problem: Exception, record: Record) -> Reply:
        """An error in the words of the protocol that the path belongs to."""
        error = as_request_error(problem)
        record.error = error.message
        headers = {} if error.retry_seconds is None else {"Retry-After": str(error.retry_seconds)}
        if error.status == 405:
            headers["Allow"] = ", ".join(self.methods(path))
        if path.startswith("/v1/messages"):
            document = anthropic.error(error)
        elif path.startswith("/api/"):
            document = ollama.error(error)
        else:
            document = openai_answer.error(error)
        return Reply(error.status, document, headers=headers)

    def _route(self, call: Call) -> Callable[[Call], Response]:
        method = "GET" if call.method == "HEAD" else call.method
        path = call.path.rstrip("/") or "/"
        if found := self._routes.get((method, path)):
            call.record.route = path
            return found
        if method == "GET" and path.startswith("/v1/models/"):
            call.record.route = "/v1/models/{id}"
            return self._model
        if methods := self.methods(path):
            wanted = " or ".join(methods)
            raise RequestError(f"{path} takes {wanted}, not {call.method}", status=405, code="method_not_allowed")
        raise RequestError(
            f"there is no {path} here; there are {', '.join(sorted({route for _, route in self._routes}))}",
            status=404,
            code="not_found",
        )

    def methods(self, path: str) -> list[str]:
        """The methods that a path takes."""
        return sorted({method for method, route in self._routes if route == (path.rstrip("/") or "/")})

    def _now(self) -> _Engine:
        """What answers. Raises RequestError: nothing does yet, or any more."""
        if self.closing:
            raise RequestError("the server is stopping", status=503, code="stopping", retry_seconds=LOADING_SECONDS)
        if self._engine is None:
            raise RequestError("the model is loading", status=503, code="loading", retry_seconds=LOADING_SECONDS)
        return self._engine

    # --- generation ---

    def _chat(self, call: Call) -> Response:
        return self._run(openai.chat(_document(call), self._now().served), call)

    def _completion(self, call: Call) -> Response:
        return self._run(openai.completion(_document(call), self._now().served), call)

    def _message(self, call: Call) -> Response:
        return self._run(anthropic.message(_document(call), self._now().served), call)

    def _count(self, call: Call) -> Reply:
        engine = self._now()
        return Reply(200, {"input_tokens": engine.tokens.count(anthropic.counted(_document(call), engine.served))})

    def _ollama_chat(self, call: Call) -> Response:
        served = self._now().served
        exchange = ollama.chat(_document(call), served)
        return Reply(200, ollama.loaded(served, chat=True)) if exchange is None else self._run(exchange, call)

    def _ollama_generate(self, call: Call) -> Response:
        served = self._now().served
        exchange = ollama.generate(_document(call), served)
        return Reply(200, ollama.loaded(served, chat=False)) if exchange is None else self._run(exchange, call)

    def _run(self, exchange: Exchange, call: Call) -> Response:
        call.record.ignored = exchange.ignored
        streams = self._submit(exchange)
        answers = [Answer() for _ in streams]
        if exchange.streamed:
            return Streaming(exchange.content_type, _chunks(exchange, streams, answers, call), lambda: _cancel(streams))
        try:
            with contextlib.closing(_events(exchange, streams)) as events:
                for beat_or_event in events:
                    if beat_or_event is not None:
                        answers[beat_or_event[0]].add(beat_or_event[1])
                    elif call.gone():
                        raise ClientGone
        finally:
            _settle(streams, answers, call.record)
        return Reply(200, exchange.whole(answers))

    def _submit(self, exchange: Exchange) -> list[Stream]:
        engine, streams = self._now(), list[Stream]()
        try:
            for request in exchange.requests:
                try:
                    streams.append(engine.scheduler.submit(request))
                except UsageError as problem:
                    raise _too_long(request, engine) or problem from problem
        except BaseException:
            _cancel(streams)
            raise
        return streams

    # --- everything else ---

    def _root(self, call: Call) -> Reply:
        name = self._engine.served.names.shown if self._engine else "a model that is loading"
        return Reply(200, f"tq {__version__} serves {name}\n", "text/plain; charset=utf-8")

    def _health(self, call: Call) -> Reply:
        self._now()
        return Reply(200, {"status": "ok"})

    def _metrics(self, call: Call) -> Reply:
        engine = self._now()
        return Reply(200, self.metrics.text(engine.scheduler.stats(), engine.served.names.shown), CONTENT_TYPE)

    def _model(self, call: Call) -> Reply:
        served = self._now().served
        served.names.check(call.path.removeprefix("/v1/models/").rstrip("/"))
        return Reply(200, openai.model(served))

    def _tokenize(self, call: Call) -> Reply:
        body = Tokenize.read(_document(call))
        return Reply(200, {"tokens": self._now().tokens.encode(body.content, special=bool(body.add_special))})

    def _detokenize(self, call: Call) -> Reply:
        return Reply(200, {"content": self._now().tokens.decode(Detokenize.read(_document(call)).tokens)})


class Tokenize(Body):
    content: str
    add_special: bool | None = None


class Detokenize(Body):
    tokens: list[int]


def _too_long(request: Request, engine: _Engine) -> RequestError | None:
    """The refusal of a prompt that leaves no room for an answer, if it is one, in words that clients look for.

    They shorten the conversation then: Claude Code by the first words, others by the code.
    """
    most = engine.served.context_length
    try:
        count = engine.tokens.count(request)
    except TQError:
        return None
    if most is None or count < most:
        return None
    return RequestError(
        f"prompt is too long: {count} tokens > {most - 1} maximum; "
        f"the model's maximum context length is {most} tokens, answer included",
        code="context_length_exceeded",
        param="prompt" if request.messages is None else "messages",
    )


def as_request_error(problem: Exception) -> RequestError:
    """What a client is told of any failure."""
    if isinstance(problem, RequestError):
        return problem
    if isinstance(problem, Busy):
        return RequestError(problem.message, hint=problem.hint, status=429, code="busy", retry_seconds=BUSY_SECONDS)
    if isinstance(problem, TQError):
        return RequestError(problem.message, hint=problem.hint)
    if isinstance(problem, RecursionError):
        return RequestError("the request is nested too deeply", code="invalid_json")
    if settings.debug():
        logger.error("internal error", exc_info=problem)
    return RequestError(f"internal error: {type(problem).__name__}: {problem}", status=500, code="internal_error")


def _cancel(streams: Sequence[Stream]) -> None:
    for stream in streams:
        stream.cancel()


def _events(exchange: Exchange, streams: Sequence[Stream]) -> Generator[tuple[int, Event] | None, None, None]:
    """`follow`, where an answer that cannot be finished is the server's failure."""
    with contextlib.closing(follow(streams, BEAT_SECONDS, exchange.single_call)) as events:
        try:
            for beat_or_event in events:
                yield beat_or_event
                if beat_or_event is not None and _is_cancelled(beat_or_event[1]):
                    raise RequestError("the server is stopping", status=503, code="stopping")
        except RequestError:
            raise
        except TQError as error:
            raise RequestError(error.message, hint=error.hint, status=500, code="generation_failed") from error


def _is_cancelled(event: Event) -> bool:
    return isinstance(event, Done) and event.reason == "cancelled"


def _chunks(
    exchange: Exchange, streams: Sequence[Stream], answers: Sequence[Answer], call: Call
) -> Generator[str, None, None]:
    """The text of a stream; an empty one is a beat."""
    opened, spoken = False, time.monotonic()
    try:
        with contextlib.closing(_events(exchange, streams)) as events:
            for beat_or_event in events:
                text = ""
                if beat_or_event is not None:
                    answers[beat_or_event[0]].add(beat_or_event[1])
                if not opened:  # not before the first event or beat: it may tell the length of the prompt
                    opened = True
                    yield exchange.opening(sum(a.reading.total for a in answers if a.reading is not None))
                if beat_or_event is not None and not _is_cancelled(beat_or_event[1]):
                    text = exchange.event(*beat_or_event)
                elif time.monotonic() - spoken >= KEEPALIVE_SECONDS:
                    text = exchange.idle(answers)
                if text:
                    spoken = time.monotonic()
                yield text
        yield exchange.closing(answers)
    except Exception as problem:
        error = as_request_error(problem)
        call.record.error = error.message
        yield exchange.failure(error)
    finally:
        _settle(streams, answers, call.record)


def _settle(streams: Sequence[Stream], answers: Sequence[Answer], record: Record) -> None:
    """Cancel what goes on, and take the figures of all over."""
    _cancel(streams)
    until = time.monotonic() + SETTLE_SECONDS
    ends = [
        answer.done or stream.end(max(until - time.monotonic(), 0))
        for stream, answer in zip(streams, answers, strict=True)
    ]
    record.generated(end for end in ends if end is not None)


def _document(call: Call) -> dict[str, Any]:
    """The body of a call, which must be a JSON object."""
    try:
        document = json.loads(call.body)
        json.dumps(document, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:  # JSON can spell them
        raise RequestError("the body has half of a character (a lone surrogate)", code="invalid_json") from error
    except (ValueError, RecursionError) as error:
        raise RequestError(f"the body is not JSON: {error}", code="invalid_json") from error
    if not isinstance(document, dict):
        raise RequestError(f"the body must be a JSON object, not a {type(document).__name__}", code="invalid_json")
    return document
