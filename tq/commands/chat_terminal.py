"""The terminal of `tq chat`: a line editor with history for messages, and answers written as they come."""

import contextlib
import os
import signal
import sys
import termios
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import Completer, Completion, PathCompleter
from prompt_toolkit.document import Document
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings
from prompt_toolkit.output import ColorDepth

from tq.commands.chat_commands import NAMES, SETTINGS
from tq.engine.events import Note, Progress
from tq.engine.run.chat import Answer, Event, Piece
from tq.output import Output, may_colour

QUOTES = '"""'
DIM, RESET, ERASE_LINE = "\x1b[2m", "\x1b[0m", "\r\x1b[K"
PROGRESS_AFTER_SECONDS = 0.5


class Terminal:
    """Reads messages and shows answers.

    Args:
        history: A file for what was typed, or None to forget it.
    """

    def __init__(self, history: Path | None):
        self._session: PromptSession[str] = PromptSession(
            message=">>> ",
            multiline=True,
            prompt_continuation="... ",
            history=_history(history),
            key_bindings=_keys(),
            completer=_Completer(),
            complete_while_typing=False,
            color_depth=None if may_colour(sys.stdout) else ColorDepth.DEPTH_1_BIT,
        )

    def read(self) -> str | None:
        """The next message; None when the person leaves. Ctrl-C begins the line anew."""
        while True:
            try:
                return unquoted(self._session.prompt())
            except KeyboardInterrupt:
                continue
            except EOFError:
                return None

    def show(self, events: Iterable[Event], out: Output, interrupt: Callable[[], None]) -> Answer | None:
        """Write an answer as it comes, and return it. Ctrl-C calls `interrupt`; the second one ends everything."""
        writer = _Writer(out)
        with _interrupts(interrupt), _no_echo():
            try:
                for event in events:
                    writer.show(event)
            finally:
                writer.end()
        return writer.answer


def unquoted(text: str) -> str:
    text = text.strip("\n")
    if text.lstrip().startswith(QUOTES):
        return text.strip().removeprefix(QUOTES).removesuffix(QUOTES).strip("\n")
    return text


def is_open(text: str) -> bool:
    """Whether a message has begun with quotes that nothing closes yet."""
    text = text.strip()
    return text.startswith(QUOTES) and not (len(text) >= 2 * len(QUOTES) and text.endswith(QUOTES))


class _Writer:
    """One answer on the terminal: reasoning dimmed, or after a word where there are no colours."""

    def __init__(self, out: Output):
        self.answer: Answer | None = None
        self._out = out
        self._colour = may_colour(sys.stdout)
        self._thought: bool | None = None  # of the piece before, which ended like
        self._tail = ""
        self._start, self._progress = time.monotonic(), False

    def show(self, event: Event) -> None:
        if isinstance(event, Progress):
            if time.monotonic() - self._start > PROGRESS_AFTER_SECONDS and not self._out.quiet:
                self._write(f"{ERASE_LINE}reading {event.done} of {event.total} tokens")
                self._progress = True
            return
        if self._progress:
            self._write(ERASE_LINE)
            self._progress = False
        if isinstance(event, Note):
            self._out.say(event.message)
        elif isinstance(event, Piece):
            self._piece(event)
        else:
            self.answer = event

    def end(self) -> None:
        if self._progress:
            self._write(ERASE_LINE)
        if self._thought is not None:
            self._new_lines(1)

    def _piece(self, piece: Piece) -> None:
        if piece.thought != self._thought:
            if self._thought is not None:
                self._new_lines(2)
            if piece.thought and not self._colour:
                self._write("(thinking) ")
            self._thought = piece.thought
        # Reset after each piece: nothing stays dimmed, whatever ends the answer.
        self._write(f"{DIM}{piece.text}{RESET}" if piece.thought and self._colour else piece.text)
        self._tail = (self._tail + piece.text)[-2:]

    def _new_lines(self, count: int) -> None:
        """End the text with so many line ends."""
        self._write("\n" * (count - (len(self._tail) - len(self._tail.rstrip("\n")))))
        self._tail = ""

    def _write(self, text: str) -> None:
        self._out.stream(text)


@contextlib.contextmanager
def _interrupts(interrupt: Callable[[], None]) -> Iterator[None]:
    """Ctrl-C asks for an end, as long as it has not done so before."""

    def handle(number: int, frame: Any) -> None:
        interrupt()
        signal.signal(signal.SIGINT, signal.default_int_handler)

    before = signal.signal(signal.SIGINT, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextlib.contextmanager
def _no_echo() -> Iterator[None]:
    """What is typed while an answer comes is kept for the next message, and does not appear in the answer."""
    descriptor = sys.stdin.fileno()
    before = termios.tcgetattr(descriptor)
    silent = termios.tcgetattr(descriptor)
    silent[3] &= ~termios.ECHO
    termios.tcsetattr(descriptor, termios.TCSADRAIN, silent)
    try:
        yield
    finally:
        termios.tcsetattr(descriptor, termios.TCSADRAIN, before)


def _history(path: Path | None) -> History:
    if path is None:
        return InMemoryHistory()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))  # what people ask is their own affair
    except OSError:
        return InMemoryHistory()
    return FileHistory(str(path))


def _keys() -> KeyBindings:
    keys = KeyBindings()

    @keys.add("enter")
    def _(event: Any) -> None:
        buffer = event.current_buffer
        if is_open(buffer.text):
            buffer.insert_text("\n")
        else:
            buffer.validate_and_handle()

    @keys.add("escape", "enter")
    def _(event: Any) -> None:
        event.current_buffer.insert_text("\n")

    return keys


class _Completer(Completer):
    """Commands, what /set takes, and files."""

    def __init__(self) -> None:
        self._files = PathCompleter(expanduser=True)

    def get_completions(self, document: Document, complete_event: Any) -> Iterator[Completion]:
        text = document.text_before_cursor
        name, space, argument = text.partition(" ")
        if not text.startswith("/") or "\n" in text:
            return
        if not space:
            yield from (Completion(known, -len(name)) for known in NAMES if known.startswith(name))
        elif name in ("/save", "/load"):
            yield from self._files.get_completions(Document(argument), complete_event)
        elif name == "/set" and " " not in argument:
            names = [setting.replace("_", "-") for setting in SETTINGS] + ["think"]
            yield from (Completion(known, -len(argument)) for known in names if known.startswith(argument))
