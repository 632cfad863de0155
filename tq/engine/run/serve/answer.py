"""Answers on their way: the events of one or several streams, gathered, and followed as they come."""

from __future__ import annotations

import queue
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from tq.engine.run.serve.body import RequestError
from tq.engine.run.serve.requests import Done, Event, Piece, Reading, Request, TokenLogprob, ToolCall


class Stream(Protocol):
    """What is used of the scheduler's streams. `cancel` may be called from any thread, and after the end."""

    def wait(self, seconds: float) -> Event | None: ...

    def end(self, seconds: float) -> Done | None: ...

    def cancel(self) -> None: ...


@dataclass
class Answer:
    """What has come of one request so far."""

    texts: list[str] = field(default_factory=list)
    thoughts: list[str] = field(default_factory=list)
    calls: list[ToolCall] = field(default_factory=list)
    tokens: list[TokenLogprob] = field(default_factory=list)
    reading: Reading | None = None
    done: Done | None = None

    def add(self, event: Event) -> None:
        match event:
            case Reading():
                self.reading = event
            case Piece(text, "text", tokens):
                self.texts.append(text)
                self.tokens += tokens
            case Piece(text, "thought"):
                self.thoughts.append(text)
            case ToolCall():
                self.calls.append(event)
            case Done():
                self.done = event

    @property
    def text(self) -> str:
        return "".join(self.texts)

    @property
    def thought(self) -> str:
        return "".join(self.thoughts)

    @property
    def end(self) -> Done:
        assert self.done is not None, "the answer goes on"
        return self.done


class Exchange(ABC):
    """A request of one protocol, and how its answer is put there.

    Attributes:
        requests: What the model is asked; several where several answers are wanted.
        streamed: Whether the answer is sent as it comes.
        single_call: The answer ends with its first function call.
        ignored: Fields of the request that mean nothing here.
        content_type: Of a streamed answer.
    """

    content_type = "text/event-stream"

    def __init__(self, requests: Sequence[Request], streamed: bool, ignored: Sequence[str], single_call: bool = False):
        self.requests, self.streamed, self.ignored = tuple(requests), streamed, tuple(ignored)
        self.single_call = single_call

    @abstractmethod
    def whole(self, answers: Sequence[Answer]) -> dict[str, Any]:
        """The document of finished answers."""

    @abstractmethod
    def opening(self, prompt_tokens: int) -> str:
        """What comes before the first event."""

    @abstractmethod
    def event(self, index: int, event: Event) -> str:
        """What an event of the request with this index adds; "" if nothing."""

    @abstractmethod
    def closing(self, answers: Sequence[Answer]) -> str:
        """What comes after the last event."""

    @abstractmethod
    def idle(self, answers: Sequence[Answer]) -> str:
        """What tells a client that waits that somebody works for it."""

    @abstractmethod
    def failure(self, error: RequestError) -> str:
        """What ends a stream that cannot go on."""


def follow(
    streams: Sequence[Stream], beat_seconds: float, single_call: bool = False
) -> Generator[tuple[int, Event] | None, None, None]:
    """Yield (index of its stream, event) as they come, and None every `beat_seconds`, whether any came or not.

    Closing the generator, or an error, cancels all streams.

    Args:
        single_call: An answer ends with its first function call.

    Raises:
        TQError: What a stream raises.
    """
    called: set[int] = set()
    try:
        for index, event in _one(streams[0], beat_seconds) if len(streams) == 1 else _several(streams, beat_seconds):
            if event is None:
                yield None
            elif index not in called:
                yield index, event
                if single_call and isinstance(event, ToolCall):
                    called.add(index)
                    streams[index].cancel()
            elif isinstance(event, Done):
                yield index, replace(event, reason="tool_calls")
    finally:
        for stream in streams:
            stream.cancel()


def _one(stream: Stream, beat_seconds: float) -> Iterator[tuple[int, Event | None]]:
    beat = time.monotonic() + beat_seconds
    while True:
        event = stream.wait(max(beat - time.monotonic(), 0))
        if event is not None:
            yield 0, event
        if isinstance(event, Done):
            return
        if time.monotonic() >= beat:
            beat = time.monotonic() + beat_seconds
            yield 0, None


def _several(streams: Sequence[Stream], beat_seconds: float) -> Iterator[tuple[int, Event | None]]:
    """Each stream is waited for by a thread."""
    events: queue.SimpleQueue[tuple[int, Event | Exception]] = queue.SimpleQueue()

    def pass_on(index: int, stream: Stream) -> None:
        try:
            for _, event in _one(stream, beat_seconds):
                if event is not None:
                    events.put((index, event))
        except Exception as error:
            events.put((index, error))

    for index, stream in enumerate(streams):
        threading.Thread(target=pass_on, args=(index, stream), name="tq-answer", daemon=True).start()
    unfinished = len(streams)
    beat = time.monotonic() + beat_seconds
    while unfinished:
        try:
            index, event = events.get(timeout=max(beat - time.monotonic(), 0))
        except queue.Empty:
            pass
        else:
            if isinstance(event, Exception):
                raise event
            unfinished -= isinstance(event, Done)
            yield index, event
        if time.monotonic() >= beat:
            beat = time.monotonic() + beat_seconds
            yield 0, None
