"""One list of records in every style, sizes and times for people, and progress with and without a terminal."""

import csv
import io
import json
import sys

import pytest

from tq.engine.events import Note, Progress
from tq.output import Output, Pace, PlainProgress, facts, human_bytes, human_count, human_seconds, render

RECORDS = [
    {"name": "a|b", "bits": 4, "error": 0.123456, "note": None, "fast": True},
    {"name": "c, d", "bits": 16, "error": 2e-07, "note": "x", "fast": False},
]


def test_table_aligns_numbers_right_and_text_left():
    assert render(RECORDS, "table").splitlines() == [
        "name  bits   error  note  fast",
        "a|b      4  0.1235        yes",
        "c, d    16   2e-07  x     no",
    ]


def test_markdown_escapes_its_separator():
    assert render(RECORDS, "markdown").splitlines() == [
        "| name | bits | error | note | fast |",
        "| --- | ---: | ---: | --- | --- |",
        "| a\\|b | 4 | 0.1235 |  | yes |",
        "| c, d | 16 | 2e-07 | x | no |",
    ]


def test_csv_is_read_back_by_the_csv_module():
    rows = list(csv.DictReader(io.StringIO(render(RECORDS, "csv"))))
    assert [row["name"] for row in rows] == ["a|b", "c, d"]


def test_json_keeps_every_digit():
    assert json.loads(render(RECORDS, "json")) == RECORDS


@pytest.mark.parametrize("style", ["table", "csv", "markdown", "json"])
def test_no_records_is_no_error(style):
    render([], style)


@pytest.mark.parametrize(
    ("size_bytes", "text"),
    [(0, "0 B"), (999, "999 B"), (999.6, "1.00 kB"), (1234, "1.23 kB"), (98_362_432, "98.4 MB"), (2.5e12, "2.50 TB")],
)
def test_human_bytes(size_bytes, text):
    assert human_bytes(size_bytes) == text


def test_human_count_and_seconds():
    assert [human_count(n) for n in (7, 134_515_008, 1.2e9)] == ["7", "135M", "1.20G"]
    assert [human_seconds(s) for s in (0.44, 12.4, 200, 8000)] == ["0.4 s", "12 s", "3 min", "2.2 h"]


def test_facts_align_values():
    assert facts({"a": 1, "long name": 2.34567}) == "a          1\nlong name  2.346"


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def test_pace_counts_from_the_first_event_so_that_a_resumed_run_is_not_fast():
    clock = Clock()
    pace = Pace(clock)
    assert pace.describe(Progress(900, 1000, "bytes")) == "900 B of 1.00 kB"
    clock.now += 2
    assert pace.describe(Progress(920, 1000, "bytes")) == "920 B of 1.00 kB, 10 B/s, 8.0 s left"


def test_plain_progress_says_a_line_only_every_ten_seconds(capsys):
    clock = Clock()
    show = PlainProgress("Converting", clock)
    for done in range(25):
        show(Progress(done, 100, "windows", f"layer {done}"))
        clock.now += 1
    assert capsys.readouterr().err.splitlines() == [
        "Converting: 10 %, 10 of 100 windows, 1/s, 90 s left (layer 10)",
        "Converting: 20 %, 20 of 100 windows, 1/s, 80 s left (layer 20)",
    ]


def test_follow_hands_on_what_is_not_progress_and_says_notes(capsys):
    events = [Progress(0, 2, "x"), Note("resuming"), "result", Progress(2, 2, "x")]
    assert list(Output().follow(events, "Doing")) == ["result"]
    assert capsys.readouterr().err == "resuming\n"


def test_quiet_says_nothing_but_warnings(capsys):
    out = Output(quiet=True)
    assert list(out.follow([Note("resuming"), "result"], "Doing")) == ["result"]
    out.say("talk")
    out.warn("careful")
    assert capsys.readouterr() == ("", "warning: careful\n")


def test_details_only_when_verbose(capsys):
    Output().detail("why")
    Output(verbose=True).detail("because")
    assert capsys.readouterr().err == "because\n"


def test_json_output_is_one_document_with_no_invalid_numbers(capsys):
    Output(json=True).result({"perplexity": float("inf"), "list": [float("nan"), 1.5]}, "text")
    assert json.loads(capsys.readouterr().out) == {"perplexity": None, "list": [None, 1.5]}


def test_on_a_terminal_a_bar_shows_and_is_gone_at_the_end(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    screen = Terminal()
    monkeypatch.setattr("sys.stderr", screen)
    monkeypatch.setenv("TERM", "xterm")
    events = [Progress(0, 10, "windows"), Progress(5, 10, "windows", "layer 5"), "result"]
    assert list(Output().follow(events, "Evaluating")) == ["result"]
    shown = screen.getvalue()
    assert "Evaluating" in shown and "50 %" in shown and "layer 5" in shown
    assert shown.endswith("\x1b[1A\x1b[2K")  # up a line, and erased


def test_a_dumb_terminal_gets_plain_lines(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr("sys.stderr", Terminal())
    monkeypatch.setenv("TERM", "dumb")
    list(Output().follow([Progress(5, 10, "windows")], "Evaluating"))
    assert "\x1b" not in sys.stderr.getvalue()
