"""What lines that begin with / do in a conversation: /help, /set, /save and the others."""

import difflib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from tq.engine.run.chat import Answer, Conversation, Event, Message
from tq.engine.run.sampling import GenerateOptions, resolve_options
from tq.errors import TQError, UsageError
from tq.output import Output, facts, human_bytes

HELP = {
    "/help": "Show this.",
    "/regenerate": "Answer the last message again.",
    "/clear": "Begin a new conversation; the system message stays.",
    "/system [TEXT]": "Show the system message, or set it; none: take it away.",
    "/set [NAME VALUE]": "Show the options, or set one: temp 0.7, max-tokens 4000, think off.",
    "/stats": "How fast it was, and how much of the context is in use.",
    "/save FILE": "Write the conversation to a file.",
    "/load FILE": "Go on with a conversation from a file.",
    "/exit": "Leave; so does Ctrl-D.",
}
NAMES = [usage.split()[0] for usage in HELP]
INPUT_HELP = (
    'Enter sends, Alt-Enter begins a new line, and text between """ and """ may have many lines.\n'
    "Ctrl-C stops an answer. A message that begins with / needs a space before it."
)
WHOLE = ("top_k", "max_tokens", "min_tokens", "repetition_context", "seed")
FROM_MODEL = ("temp", "top_p", "top_k", "min_p", "repetition_penalty")  # "default" is what the checkpoint says
SETTINGS = [
    *("temp", "top_p", "top_k", "min_p", "repetition_penalty", "repetition_context"),
    *("max_tokens", "min_tokens", "seed"),
]


class Leave(Exception):
    """The person wants to go."""


class Commands:
    """Runs these lines on a conversation.

    Attributes:
        answers: What was answered so far, for /stats.
    """

    def __init__(self, conversation: Conversation, model: str):
        self.conversation, self.model = conversation, model
        self.answers: list[Answer] = []
        self.tell = Output().say  # what somebody asks for is said with --quiet too

    def run(self, line: str) -> Iterator[Event] | None:
        """Do what the line says; the events of an answer if that is one.

        Raises:
            Leave: /exit.
            TQError: There is no such command, or it cannot be done.
        """
        name, _, argument = line.partition(" ")
        argument = argument.strip()
        if name not in NAMES:
            near = difflib.get_close_matches(name, NAMES, 1)
            hint = f"did you mean {near[0]}?" if near else "a message that begins with / needs a space before it"
            raise UsageError(f"there is no command {name}; /help lists them", hint)
        takes = next(usage for usage in HELP if usage.split()[0] == name)
        if argument and " " not in takes:
            raise UsageError(f"{name} takes nothing")
        if not argument and takes.endswith(" FILE"):
            raise UsageError(f"{name} needs the name of a file", f"{name} talk.json")
        do: Callable[[str], Iterator[Event] | None] = getattr(self, f"_{name[1:]}")
        return do(argument)

    def _help(self, _: str) -> None:
        self.tell(f"{facts(HELP)}\n{INPUT_HELP}")

    def _exit(self, _: str) -> None:
        raise Leave

    def _regenerate(self, _: str) -> Iterator[Event]:
        return self.conversation.regenerate()

    def _clear(self, _: str) -> None:
        self.conversation.clear()
        self.tell("A new conversation.")

    def _system(self, text: str) -> None:
        if text:
            self.conversation.system = None if text == "none" else text
        self.tell(self.conversation.system or "There is no system message.")

    def _stats(self, _: str) -> None:
        conversation = self.conversation
        used = len(conversation.context.tokens)
        of = "tokens" if conversation.limit is None else f"of {conversation.limit} tokens"
        lines = {"context": f"{used} {of}, {human_bytes(conversation.context.nbytes)} of memory"}
        if self.answers:
            lines["last answer"] = stats_line(self.answers[-1])
            lines["all answers"] = f"{len(self.answers)}, {sum(answer.tokens for answer in self.answers)} tokens"
        self.tell(facts(lines))

    def _set(self, argument: str) -> None:
        conversation = self.conversation
        if not argument:
            return self.tell(facts(self._options()))
        name, _, value = argument.partition(" ")
        value = value.strip()
        key = name.lstrip("-").replace("-", "_")
        if key not in (*SETTINGS, "think"):
            names = [_shown(setting) for setting in SETTINGS] + ["think"]
            near = difflib.get_close_matches(name, names, 1)
            hint = f"did you mean {near[0]}?" if near else None
            raise UsageError(f"there is no option {name}; there are {', '.join(names)}", hint)
        if not value:
            raise UsageError(f"what should {name} be?", f"/set {name} VALUE")
        if key == "think":
            if value not in ("on", "off"):
                raise UsageError(f"think must be on or off, not {value}")
            conversation.think = value == "on"
        else:
            changes: dict[str, Any] = {key: _value(key, value)}
            conversation.set_options(replace(conversation.options, **changes))

    def _options(self) -> dict[str, str]:
        options, sources = resolve_options(self.conversation.loaded, self.conversation.options)
        from_file = {name for name, source in sources.items() if source != "option"}
        shown = {
            _shown(name): f"{getattr(options, name):g}" + (" (default)" if name in from_file else "")
            for name in SETTINGS
            if name != "seed"
        }
        return shown | {"think": "on" if self.conversation.think else "off"}

    def _save(self, name: str) -> None:
        path = Path(name).expanduser()
        if path.exists():
            try:
                read_conversation(path)
            except TQError:
                raise UsageError(f"{path} exists and is no conversation: it is not overwritten") from None
        document = {"model": self.model, "messages": self.conversation.transcript()}
        partial = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            partial.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
            partial.replace(path)
        except OSError as error:
            partial.unlink(missing_ok=True)
            raise TQError(f"{path} cannot be written: {error.strerror}") from error
        self.conversation.keep = True
        self.tell(f"Saved to {path}.")

    def _load(self, name: str) -> None:
        path = Path(name).expanduser()
        messages = read_conversation(path)
        self.conversation.replace(messages)
        turns = sum(message["role"] == "user" for message in messages)
        self.tell(f"Loaded {turns} {'turn' if turns == 1 else 'turns'} from {path}.")


def read_conversation(path: Path) -> list[Message]:
    """The messages of a file that /save wrote, or of any JSON object with "messages" as chat programs know them.

    Raises:
        TQError: It cannot be read, or is no conversation: an optional system message, then user and assistant in turn.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise TQError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise TQError(f"{path} is no conversation: it is not JSON") from error
    messages = document.get("messages") if isinstance(document, dict) else None
    if not isinstance(messages, list) or not all(
        isinstance(message, dict) and all(isinstance(message.get(key), str) for key in ("role", "content"))
        for message in messages
    ):
        raise TQError(f'{path} is no conversation: it has no "messages" with a role and a content each')
    said = messages[1:] if messages and messages[0]["role"] == "system" else messages
    if len(said) % 2 or any(m["role"] != ("user", "assistant")[n % 2] for n, m in enumerate(said)):
        raise TQError(f"{path} is no conversation: user and assistant must take turns, and the assistant be the last")
    keys = ("role", "content", "reasoning_content")
    return [{key: message[key] for key in keys if isinstance(message.get(key), str)} for message in messages]


def stats_line(answer: Answer) -> str:
    """How an answer went, in one line."""
    new = answer.prompt_tokens - answer.cached_tokens
    return (
        f"prompt {answer.prompt_tokens} tokens, {answer.cached_tokens} kept, "
        f"{new} read at {answer.prefill_tokens_per_second:.1f}/s; "
        f"answer {answer.tokens} tokens at {answer.decode_tokens_per_second:.1f}/s"
    )


def _value(key: str, text: str) -> float | int | None:
    if text == "default" and key in FROM_MODEL:
        return None
    if text == "default":
        return getattr(GenerateOptions(), key)
    try:
        return int(text) if key in WHOLE else float(text)
    except ValueError:
        kind = "a whole number" if key in WHOLE else "a number"
        raise UsageError(f"{_shown(key)} must be {kind} or default, not {text}") from None


def _shown(key: str) -> str:
    return key.replace("_", "-")
