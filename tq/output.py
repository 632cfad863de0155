"""The only place that prints: data to stdout, talk to stderr, one form for people and one for programs."""

import csv
import io
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TextIO

from tq.engine.events import Note, Progress
from tq.errors import TQError

PLAIN_INTERVAL_SECONDS = 10.0
COLOURS = {"error": "1;31", "warning": "1;33", "hint": "36"}  # bold red, bold yellow, cyan

Record = dict[str, Any]


class Output:
    """What a command says.

    Args:
        json: the result is one JSON document and nothing else reaches stdout.
        quiet: no talk except warnings and errors.
        verbose: also the details that explain a choice.
    """

    def __init__(self, *, json: bool = False, quiet: bool = False, verbose: bool = False):
        self.json = json
        self.quiet = quiet
        self.verbose = verbose

    def result(self, document: Any, text: str) -> None:
        """The answer of a command that reports: `document` as JSON, or `text` for a person."""
        print(as_json(document) if self.json else text)

    def stream(self, text: str) -> None:
        """A piece of a text that is still growing."""
        sys.stdout.write(text)
        sys.stdout.flush()

    def say(self, message: str = "") -> None:
        if not self.quiet:
            print(message, file=sys.stderr)

    def detail(self, message: str) -> None:
        if self.verbose:
            print(message, file=sys.stderr)

    def warn(self, message: str) -> None:
        labelled("warning", message)

    def follow(self, events: Iterable[Any], title: str) -> Iterator[Any]:
        """Shows the `Progress` of some work, says its `Note`s and hands on every other event."""
        show = self._nothing if self.quiet else Bar(title) if is_terminal(sys.stderr) else PlainProgress(title)
        try:
            for event in events:
                if isinstance(event, Progress):
                    show(event)
                elif isinstance(event, Note):
                    self.say(event.message)
                else:
                    yield event
        finally:
            if isinstance(show, Bar):
                show.close()

    @staticmethod
    def _nothing(progress: Progress) -> None:
        pass


class Pace:
    """How fast work goes, from the first event on: what an interrupted run had done does not count."""

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock = clock
        self._start: tuple[float, int] | None = None

    def describe(self, progress: Progress) -> str:
        """`12 MB of 80 MB, 3 MB/s, 23 s left`; rate and time left once there is something to divide."""
        done_of_total = f"{amount(progress.done, progress.unit)} of {amount(progress.total, progress.unit)}"
        parts = [done_of_total if progress.unit == "bytes" else f"{done_of_total} {progress.unit}"]
        now = self._clock()
        if self._start is None:
            self._start = (now, progress.done)
        seconds, done = now - self._start[0], progress.done - self._start[1]
        if seconds > 0 and done > 0:
            parts.append(f"{amount(done / seconds, progress.unit)}/s")
            parts.append(f"{human_seconds((progress.total - progress.done) * seconds / done)} left")
        return ", ".join(parts)


class PlainProgress:
    """Progress where nothing may move: a full line now and then."""

    def __init__(self, title: str, clock: Callable[[], float] = time.monotonic):
        self._title, self._clock, self._pace = title, clock, Pace(clock)
        self._last = clock()

    def __call__(self, progress: Progress) -> None:
        text = self._pace.describe(progress)
        if self._clock() - self._last >= PLAIN_INTERVAL_SECONDS:
            self._last = self._clock()
            label = f" ({progress.label})" if progress.label else ""
            print(f"{self._title}: {percent(progress)}, {text}{label}", file=sys.stderr)


class Bar:
    """Progress on a terminal: one line that moves, and is gone when the work is done."""

    def __init__(self, title: str):
        from rich.console import Console
        from rich.progress import BarColumn, TextColumn
        from rich.progress import Progress as Columns

        self._pace = Pace()
        self._columns = Columns(
            TextColumn(title),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[text]}"),
            console=Console(stderr=True),
            transient=True,
        )
        self._task = self._columns.add_task(title, total=1, text="")
        self._columns.start()

    def __call__(self, progress: Progress) -> None:
        text = f"{percent(progress)}  {self._pace.describe(progress)}  {progress.label}"
        self._columns.update(self._task, completed=progress.done, total=max(progress.total, 1), text=text)

    def close(self) -> None:
        self._columns.stop()


def report_error(error: TQError) -> None:
    labelled("error", error.message)
    if error.hint:
        labelled("hint", error.hint)


def labelled(label: str, message: str) -> None:
    """`label: message` on stderr."""
    if may_colour(sys.stderr):
        label = f"\x1b[{COLOURS[label]}m{label}\x1b[0m"
    print(f"{label}: {message}", file=sys.stderr)


def is_terminal(stream: TextIO) -> bool:
    """Whether lines may move there."""
    return stream.isatty() and os.environ.get("TERM") != "dumb"


def may_colour(stream: TextIO) -> bool:
    """Terminals only, except as NO_COLOR (https://no-color.org) and FORCE_COLOR say."""
    if os.environ.get("NO_COLOR"):
        return False
    return bool(os.environ.get("FORCE_COLOR")) or is_terminal(stream)


def render(records: list[Record], style: str) -> str:
    """The same records as "table", "json", "csv" or "markdown". Columns are the keys of the first record.

    JSON keeps every value; the others show floats with four significant digits and None as an empty cell.
    """
    if style == "json":
        return as_json(records)
    columns = list(records[0]) if records else []
    rows = [[cell(record.get(column)) for column in columns] for record in records]
    if style == "csv":
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows([columns, *rows])
        return text.getvalue().rstrip("\n")
    numeric = [all(is_number(record.get(column)) for record in records) for column in columns]
    if style == "markdown":
        rule = ["---:" if right else "---" for right in numeric]
        escaped = [[text.replace("|", "\\|") for text in row] for row in rows]
        return "\n".join("| " + " | ".join(row) + " |" for row in [columns, rule, *escaped])
    lines = [columns, *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    aligned = [
        "  ".join(
            text.rjust(width) if right else text.ljust(width)
            for text, width, right in zip(line, widths, numeric, strict=True)
        )
        for line in lines
    ]
    return "\n".join(line.rstrip() for line in aligned)


def as_json(document: Any) -> str:
    """JSON has no infinity and no NaN: they become null."""
    return json.dumps(_finite(document), indent=2, ensure_ascii=False, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def facts(pairs: dict[str, Any]) -> str:
    """`name  value` lines with the values aligned."""
    width = max(len(name) for name in pairs)
    return "\n".join(f"{name.ljust(width)}  {cell(value)}" for name, value in pairs.items())


def cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value)


def is_number(value: Any) -> bool:
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))


def percent(progress: Progress) -> str:
    return f"{100 * progress.done // max(progress.total, 1)} %"


def amount(value: float, unit: str) -> str:
    return human_bytes(value) if unit == "bytes" else human_count(value)


def human_bytes(size_bytes: float) -> str:
    """Decimal units, as disks and model hubs count: 1 GB is 10^9 bytes."""
    return _scaled(size_bytes, ["B", "kB", "MB", "GB", "TB"], " ")


def human_count(count: float) -> str:
    return _scaled(count, ["", "k", "M", "G", "T"], "")


def _scaled(value: float, units: list[str], space: str) -> str:
    for unit in units:
        # 999.5 would round to "1000 kB"
        if value < 999.5 or unit == units[-1]:
            break
        value /= 1000
    digits = 0 if unit == units[0] and value == int(value) else max(0, 3 - len(str(int(value))))
    return f"{value:.{digits}f}{space}{unit}"


def human_seconds(seconds: float) -> str:
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds <= 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
