"""Stream: the events of one answer, for whoever waits for them in another thread."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator

from tq.engine.run.serve.requests import Done, Event
from tq.errors import TQError


class Stream:
    """An iterator of events that ends after Done.

    Attributes:
        cancelled: Nobody wants more.

    Raises:
        TQError: By iteration: generation failed.
    """

    def __init__(self) -> None:
        self._events: queue.SimpleQueue[Event | TQError] = queue.SimpleQueue()
        self._cancelled = threading.Event()
        self._over = threading.Event()
        self._done: Done | None = None
        self._ended = False

    def __iter__(self) -> Iterator[Event]:
        return self

    def __next__(self) -> Event:
        if self._ended:
            raise StopIteration
        return self._received(self._events.get())

    def wait(self, seconds: float) -> Event | None:
        """The next event; None if there is none within so many seconds, or after the last one."""
        if self._ended:
            return None
        try:
            return self._received(self._events.get(timeout=seconds))
        except queue.Empty:
            return None

    def end(self, seconds: float) -> Done | None:
        """The last event, which stays where it is; None: it failed, or goes on after so many seconds."""
        self._over.wait(seconds)
        return self._done

    def cancel(self) -> None:
        """End the answer at the next token: Done("cancelled") follows. Any thread may call this."""
        self._cancelled.set()

    @property
    def cancelled(self) -> bool:
        return self._cancelled.is_set()

    def put(self, event: Event | TQError) -> None:
        """The next event, or what went wrong in place of the last one."""
        self._events.put(event)
        if isinstance(event, Done):
            self._done = event
        if isinstance(event, Done | TQError):
            self._over.set()

    def _received(self, event: Event | TQError) -> Event:
        if isinstance(event, TQError):
            self._ended = True
            raise event
        self._ended = isinstance(event, Done)
        return event
