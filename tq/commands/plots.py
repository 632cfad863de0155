"""Panels of lines over contexts, or of bars where there is one context only: in a file, or in the terminal."""

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tq.errors import TQError, UsageError

TERMINAL = "-"
SUFFIXES = (".png", ".svg", ".pdf")
MARKERS = "ox+*#@%&abcdefgh"
WIDTH, HEIGHT = 76, 14  # characters of a panel


@dataclass(frozen=True)
class Panel:
    """One number over contexts.

    Attributes:
        series: (context, value) pairs by label.
    """

    title: str
    series: dict[str, list[tuple[int, float]]]

    @property
    def contexts(self) -> list[int]:
        return sorted({x for points in self.series.values() for x, _ in points})


def panels(records: list[dict[str, Any]], numbers: dict[str, tuple[str, float]]) -> list[Panel]:
    """A panel for each number that any record has.

    Args:
        records: With "label", "context" and numbers.
        numbers: Title of a panel and what a number is multiplied by, by the number's name.
    """
    made = []
    for name, (title, factor) in numbers.items():
        series: dict[str, list[tuple[int, float]]] = {}
        for record in records:
            if record.get(name) is not None:
                series.setdefault(record["label"], []).append((record["context"], record[name] * factor))
        if series:
            made.append(Panel(title, series))
    return made


def check(target: str) -> None:
    """Whether there can be a plot, before hours of measuring.

    Raises:
        UsageError: The file has another ending, or cannot be there.
        TQError: What draws it is not installed.
    """
    path = Path(target)
    if target != TERMINAL:
        if path.suffix.lower() not in SUFFIXES:
            raise UsageError(f"--plot {target} does not end in {', '.join(SUFFIXES)}", "--plot - draws in the terminal")
        if path.is_dir() or not path.absolute().parent.is_dir():
            raise UsageError(f"--plot {target} cannot be written", "name a file in a folder that exists")
    library = "plotext" if target == TERMINAL else "matplotlib"
    if importlib.util.find_spec(library) is None:
        raise TQError(f"--plot {target} needs {library}, which is not installed", "pip install 'tq[plot]'")


def draw_file(drawn: list[Panel], title: str, path: Path) -> None:
    """Write the panels side by side, two in a row."""
    from matplotlib.figure import Figure

    columns = min(2, len(drawn))
    rows = -(-len(drawn) // columns)
    figure = Figure(figsize=(6 * columns, 3.6 * rows), layout="constrained")
    figure.suptitle(title)
    grid = figure.subplots(rows, columns, squeeze=False)
    for n, panel in enumerate(drawn):
        axes = grid[n // columns][n % columns]
        axes.set_title(panel.title)
        if len(panel.contexts) == 1:
            axes.bar(list(panel.series), [points[0][1] for points in panel.series.values()])
            continue
        for label, points in panel.series.items():
            axes.plot(*zip(*points, strict=True), marker="o", label=label)
        axes.set_xticks(panel.contexts)
        axes.set_xlabel("context")
        axes.set_ylim(bottom=0)
        axes.legend()
    for n in range(len(drawn), rows * columns):
        grid[n // columns][n % columns].set_axis_off()
    figure.savefig(path, dpi=144)


def draw_terminal(drawn: list[Panel]) -> str:
    """The panels one below the other, without colours."""
    import plotext

    texts = []
    for panel in drawn:
        figure = plotext.figure
        figure.clear()
        figure.plot_size(WIDTH, HEIGHT)
        highest = max(y for points in panel.series.values() for _, y in points)
        if len(panel.contexts) == 1:
            figure.title(panel.title)
            figure.draw(figure.bar(list(panel.series), [points[0][1] for points in panel.series.values()], width=0.5))
        else:
            marks = dict(zip(panel.series, MARKERS * (1 + len(panel.series) // len(MARKERS)), strict=False))
            figure.title(f"{panel.title}:  " + "  ".join(f"{mark} {label}" for label, mark in marks.items()))
            for label, points in panel.series.items():
                xs, ys = zip(*points, strict=True)
                figure.draw(figure.signal(xs, ys, marker=marks[label]).lines())
            figure.ruler("x").ticks(panel.contexts, [str(x) for x in panel.contexts])
            figure.ruler("y").lim(0, highest or 1)
        texts.append(figure.build().string(colorless=True).rstrip("\n"))
    return "\n\n".join(texts)
