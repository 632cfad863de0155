"""`tq chat`: a conversation in the terminal, or with messages that are piped in, one a line."""

import contextlib
import dataclasses
import sys
from collections.abc import Iterable, Iterator
from typing import Annotated, Any

import typer

from tq import settings
from tq.commands import groups, options
from tq.errors import TQError, UsageError
from tq.output import Output, is_terminal, report_error

EPILOG = options.examples(
    "tq chat -m SmolLM2-135M-Instruct-tq4",
    "tq chat -m MODEL --system 'You are a pirate.' --temp 0.7",
    "tq chat -m MODEL --kv-bits 8,3 --max-tokens 4000",
    "printf 'Hello!\\nAnd in French?\\n' | tq chat -m MODEL",
)


@groups.flat
def chat(
    *,
    model: options.Model,
    system: options.System = None,
    no_think: options.NoThink = False,
    max_tokens: options.MaxTokens = 2048,
    sampling: groups.Sampling,
    seed: options.Seed = None,
    caching: groups.Caching,
    profile: options.Profile = None,
    prompt_cache: options.PromptCache = None,
    stream: options.Stream = None,
    stats: Annotated[bool, typer.Option("--stats", help="Say after each answer how fast it was.")] = False,
    loading: groups.Loading,
    printing: groups.Printing,
) -> None:
    """Hold a conversation.

    /help lists the commands there. Without a terminal, each line that is piped in is a message or such a command, and
    answers alone go to stdout.
    """
    out = Output(**vars(printing))
    configured = options.read_settings(out, profile=profile, **vars(caching), prompt_cache=prompt_cache, budget=stream)
    interactive = sys.stdin is not None and is_terminal(sys.stdin) and is_terminal(sys.stdout)
    if interactive and printing.json:
        raise UsageError("--json needs messages that are piped in", hint="printf 'Hello!\\n' | tq chat -m MODEL --json")

    from tq.cpu import blas

    out.detail(f"BLAS: {blas.enable().reason}")
    from tq.commands.chat_commands import Commands
    from tq.engine.model.load import load
    from tq.engine.run.chat import Conversation
    from tq.engine.run.generate import packing_notes, prompt_notes
    from tq.engine.run.sampling import GenerateOptions

    chosen = GenerateOptions(max_tokens=max_tokens, **sampling.asked, seed=seed, prefill_step=configured.prefill_step)
    kv = configured.kv
    streaming = options.stream_settings(configured) if stream else None
    with _loading(model, interactive and not printing.quiet, out):
        loaded = load(model, **vars(loading), stream=streaming)
    prompts = options.prompt_cache(out, configured, loaded)
    conversation = Conversation(loaded, system, chosen, kv, prompts, think=not no_think)
    asked = prompt_notes(loaded.tokenizer, think=not no_think) + packing_notes(loaded.model, kv)
    for message in [*loaded.notes, *(note.message for note in asked)]:
        out.say(message)
    if streaming is None:
        options.say_if_tight(out, loaded.size_bytes)
    commands = Commands(conversation, model)
    if interactive:
        _talk(conversation, commands, out, stats)
    else:
        _answer_lines(conversation, commands, out, stats)
    conversation.store()
    for note in conversation.notes():
        out.say(note.message)
    if printing.json:
        answers = [
            dataclasses.asdict(answer)
            | {name: getattr(answer, name) for name in ("prefill_tokens_per_second", "decode_tokens_per_second")}
            for answer in commands.answers
        ]
        out.result({"model": model, "messages": conversation.transcript(), "answers": answers}, "")


@contextlib.contextmanager
def _loading(model: str, shown: bool, out: Output) -> Iterator[None]:
    """Says on a terminal what takes so long, for as long as it does."""
    if shown:
        out.stream(f"loading {model} ...")
    try:
        yield
    finally:
        if shown:
            out.stream("\r\x1b[K")


def _talk(conversation: Any, commands: Any, out: Output, stats: bool) -> None:
    """With a person: what goes wrong is said, and the conversation goes on."""
    from tq.commands.chat_commands import Leave
    from tq.commands.chat_terminal import Terminal

    terminal = Terminal(settings.cache_dir() / "chat-history")
    context = "" if conversation.limit is None else f"Context of {conversation.limit} tokens. "
    out.say(f"{context}/help shows what you can do, Ctrl-D leaves.")
    while (text := terminal.read()) is not None:
        if not text.strip():
            continue
        try:
            events = commands.run(text.rstrip()) if text.startswith("/") else conversation.ask(text)
            if events is not None:
                _ended(terminal.show(events, out, conversation.interrupt), commands, out, stats)
                out.stream("\n")
        except TQError as error:
            report_error(error)
        except Leave:
            break


def _answer_lines(conversation: Any, commands: Any, out: Output, stats: bool) -> None:
    """With a program: answers on stdout, and the first thing that goes wrong ends it."""
    from tq.commands.chat_commands import Leave
    from tq.engine.events import Note
    from tq.engine.run.chat import Answer, Piece

    for text in _messages(sys.stdin):
        try:
            events = commands.run(text.rstrip()) if text.startswith("/") else conversation.ask(text)
        except Leave:
            break
        answer, end = None, ""
        for event in events or ():
            if isinstance(event, Piece) and not event.thought and not out.json:
                out.stream(event.text)
                end = event.text[-1]
            elif isinstance(event, Note):
                out.say(event.message)
            elif isinstance(event, Answer):
                answer = event
        if answer is not None:
            if end != "\n" and not out.json:
                out.stream("\n")
            _ended(answer, commands, out, stats)


def _ended(answer: Any, commands: Any, out: Output, stats: bool) -> None:
    """What is to say after an answer."""
    from tq.commands.chat_commands import stats_line

    if answer is None:
        return
    if answer.reason == "interrupted":
        out.say("(stopped)" if answer.text else "(stopped; the message is taken back)")
    if not answer.tokens:
        return
    commands.answers.append(answer)
    if answer.reason == "length":
        full = answer.tokens < commands.conversation.options.max_tokens
        why = "the context is full" if full else f"after {answer.tokens} tokens: /set max-tokens N allows more"
        out.say(f"(cut off: {why})" if full else f"(cut off {why})")
    if stats:
        out.say(f"({stats_line(answer)})")


def _messages(lines: Iterable[str]) -> Iterator[str]:
    '''A message a line, or between """ and """; empty lines are none.'''
    from tq.commands.chat_terminal import is_open, unquoted

    held = ""
    try:
        for line in lines:
            line.encode()  # where the locale is C, Python lets bytes through that are no UTF-8
            held += line
            if not is_open(held):
                if held.strip():
                    yield unquoted(held.rstrip("\n"))
                held = ""
    except UnicodeError as error:
        raise TQError("what was piped in is not text in UTF-8") from error
    if held.strip():
        yield unquoted(held.rstrip("\n"))
