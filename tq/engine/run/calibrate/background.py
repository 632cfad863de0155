"""Events of work that cannot yield them, because it runs inside of a model's own code."""

import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any

from tq.engine.events import Note, Progress

Report = Callable[[Progress | Note], None]


class Stopped(BaseException):
    """Raised inside of the work when nobody waits for it any more."""


def events_of(work: Callable[[Report], Any]) -> Iterator[Progress | Note]:
    """Run ``work`` on a thread of its own and yield what it reports.

    Everything that it does with MLX must begin and end in it: arrays belong to the thread that made them until they are
    evaluated. What it raises is raised here. When the iterator is closed, the next report ends the work.
    """
    events: queue.SimpleQueue[Progress | Note | None] = queue.SimpleQueue()
    stop = threading.Event()
    raised: list[BaseException] = []

    def report(event: Progress | Note) -> None:
        if stop.is_set():
            raise Stopped
        events.put(event)

    def run() -> None:
        try:
            work(report)
        except BaseException as error:
            raised.append(error)
        finally:
            events.put(None)

    thread = threading.Thread(target=run, name="calibration")
    thread.start()
    try:
        while (event := events.get()) is not None:
            yield event
    finally:
        stop.set()
        thread.join()
    if raised:
        raise raised[0]
