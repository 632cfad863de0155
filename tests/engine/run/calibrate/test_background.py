"""Events of work on a thread: in order, with its exceptions, and ended when nobody waits for them."""

import threading

import pytest

from tq.engine.events import Note
from tq.engine.run.calibrate.background import events_of


def test_events_come_in_order():
    assert list(events_of(lambda report: [report(Note(str(i))) for i in range(5)])) == [Note(str(i)) for i in range(5)]


def test_what_the_work_raises_comes_after_its_events():
    def work(report):
        report(Note("begun"))
        raise KeyError("broken")

    events = events_of(work)
    assert next(events) == Note("begun")
    with pytest.raises(KeyError, match="broken"):
        next(events)


def test_closing_ends_the_work_at_its_next_report():
    go_on, done = threading.Event(), []

    def work(report):
        report(Note("one"))
        go_on.wait(10)
        report(Note("two"))
        done.append("went on")

    events = events_of(work)
    next(events)
    threading.Timer(0.05, go_on.set).start()
    events.close()
    assert done == []
    assert not any(thread.name == "calibration" for thread in threading.enumerate())
