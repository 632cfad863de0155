"""A TOML file that people write, against a schema: what it says, in which line, and every mistake with its place."""

import difflib
import re
import tomllib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from tq.errors import UsageError

T = TypeVar("T", bound=BaseModel)
# [a.b] or [[a.b]], and `key =` or `a.key =`; where TOML is written otherwise, a value's line is that of its table.
HEADER = re.compile(r"\s*(\[\[?)\s*([\w.\-]+)\s*\]")
SENTENCE = "tq_sentence"  # pydantic's type of an error whose message needs nothing more; its context has a hint
KEY = re.compile(r"\s*([\w.\-]+)\s*=")


class Table(BaseModel):
    """A table of a TOML file. Types are strict, and unknown keys are mistakes.

    Attributes:
        elsewhere: What to do with keys that people look for here, by the key.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)
    elsewhere: ClassVar[dict[str, str]] = {}


@dataclass(frozen=True)
class Mistake:
    """Something in a file or variable that cannot be.

    Attributes:
        where: The file with the line, or the variable.
        message: What is wrong, with the path of the key.
        hint: The next thing to try, or None.
    """

    where: str
    message: str
    hint: str | None = None


@dataclass(frozen=True)
class TomlFile(Generic[T]):
    """A file without mistakes.

    Attributes:
        values: What it says, with the defaults of the schema.
        given: What it says alone, as nested dictionaries.
    """

    path: Path
    values: T
    given: dict[str, Any]
    lines: dict[tuple[str | int, ...], int]

    def where(self, *keys: str | int) -> str:
        """The file, with the line of a value: "tq.toml:3"."""
        return place(self.path, self.lines, keys)


def read(path: Path, schema: type[T]) -> TomlFile[T] | list[Mistake]:
    """A file that exists, or all its mistakes."""
    try:
        text = path.read_text(encoding="utf-8")
        given = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError, RecursionError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        return [Mistake(str(path), f"not a readable TOML file: {why}")]
    lines = line_numbers(text)
    try:
        return TomlFile(path, schema.model_validate(given), given, lines)
    except ValidationError as error:
        found = sorted(error.errors(), key=lambda one: line_of(lines, one["loc"]) or 0)
        return [Mistake(place(path, lines, one["loc"]), *explain(schema, one)) for one in found]


def refuse(mistakes: Sequence[Mistake]) -> None:
    """Raises UsageError if there are mistakes: for one with its message and hint, for several with a line for each."""
    if len(mistakes) == 1:
        raise UsageError(f"{mistakes[0].where}: {mistakes[0].message}", mistakes[0].hint)
    if mistakes:
        lines = [f"{m.where}: {m.message}" + (f" ({m.hint})" if m.hint else "") for m in mistakes]
        raise UsageError("\n  ".join([f"{len(mistakes)} mistakes in settings", *lines]))


def explain(schema: type[BaseModel], error: Any) -> tuple[str, str | None]:
    """Message and hint for one of pydantic's errors."""
    loc, kind = error["loc"], error["type"]
    where = ".".join(map(str, loc))
    if kind in ("model_type", "list_type"):
        table = f"[{where}]" if kind == "model_type" else f"[[{where}]]"
        return f"{where} must be a table, which begins with a line {table}", None
    if kind == "missing":
        return f"{where} is missing", None
    if kind == "extra_forbidden":
        model = _model_at(schema, loc[:-1])
        return f"unknown key {where}", getattr(model, "elsewhere", {}).get(loc[-1]) or _near(str(loc[-1]), model)
    if kind == SENTENCE:
        return f"{where}: {error['msg']}", error["ctx"]["hint"]
    message = error["msg"].removeprefix("Value error, ").partition(", unable to parse")[0]
    # The input of a contradiction is the whole table.
    value = "" if isinstance(error["input"], dict) else f" (it is {error['input']!r})"
    return f"{where}: {message[0].lower()}{message[1:]}{value}", None


def line_numbers(text: str) -> dict[tuple[str | int, ...], int]:
    """The line of each table and value, by its keys; a table of an array of tables has its index as a key."""
    found: dict[tuple[str | int, ...], int] = {}
    table: tuple[str | int, ...] = ()
    counts: dict[tuple[str | int, ...], int] = {}
    for number, line in enumerate(text.splitlines(), 1):
        if header := HEADER.match(line):
            table = tuple(header[2].split("."))
            if header[1] == "[[":
                found.setdefault(table, number)
                n = counts[table] = counts.get(table, -1) + 1
                table = (*table, n)
            found.setdefault(table, number)
        elif key := KEY.match(line):
            found.setdefault((*table, *key[1].split(".")), number)
    return found


def place(path: Path, lines: dict[tuple[str | int, ...], int], keys: Iterable[str | int]) -> str:
    """The file with the line of what these keys name, or of the table that it is in."""
    line = line_of(lines, keys)
    return str(path) if line is None else f"{path}:{line}"


def line_of(lines: dict[tuple[str | int, ...], int], keys: Iterable[str | int]) -> int | None:
    keys = tuple(keys)
    return next((lines[keys[:n]] for n in range(len(keys), 0, -1) if keys[:n] in lines), None)


def _near(key: str, model: type[BaseModel]) -> str:
    valid = sorted(model.model_fields)
    near = difflib.get_close_matches(key, valid, 1)
    return f"did you mean {near[0]}?" if near else f"valid keys: {', '.join(valid)}"


def _model_at(schema: type[BaseModel], keys: Iterable[str | int]) -> type[BaseModel]:
    """The schema of a table."""
    model = schema
    for key in keys:
        if isinstance(key, str):
            annotation = model.model_fields[key].annotation
            options = [annotation, *getattr(annotation, "__args__", ())]
            model = next(o for o in options if isinstance(o, type) and issubclass(o, BaseModel))
    return model
