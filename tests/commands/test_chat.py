"""`tq chat`: through pipes, where answers alone are on stdout, and on a terminal, as a person uses it."""

import json
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest

from tq import settings
from tq.commands import chat_commands
from tq.commands.chat import _messages
from tq.commands.chat_commands import HELP, read_conversation
from tq.errors import TQError, UsageError

ROOT = Path(__file__).parents[2]
SYSTEM = "You are a patient teacher. " * 4


@pytest.fixture
def prompts():
    """The folder of stored prompts, empty."""
    folder = settings.cache_dir() / "prompts"
    shutil.rmtree(folder, ignore_errors=True)
    return folder


def answers(result):
    return [answer["text"] for answer in json.loads(result.out)["answers"]]


# --- pipes ---


def test_each_line_is_a_message_and_answers_alone_are_on_stdout(tq, checkpoint):
    document = tq("chat", "-m", checkpoint, "-n", "6", "--json", stdin="Hello\n\nAnd you?\n")
    assert (document.code, len(answers(document))) == (0, 2)
    plain = tq("chat", "-m", checkpoint, "-n", "6", stdin="Hello\n\nAnd you?\n")
    assert plain.out == "".join(text + ("" if text.endswith("\n") else "\n") for text in answers(document))
    assert json.loads(document.out)["messages"] == [
        {"role": role, "content": text}
        for role, text in zip(
            ("user", "assistant", "user", "assistant"),
            ("Hello", answers(document)[0], "And you?", answers(document)[1]),
            strict=True,
        )
    ]


def test_the_first_answer_is_that_of_run(tq, checkpoint):
    arguments = ["-m", checkpoint, "-n", "9", "--system", "Be brief.", "--temp", "0.7", "--seed", "3"]
    assert tq("chat", *arguments, stdin="Hello\n").out == tq("run", *arguments, "Hello").out


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (["a\n", "\n", "  \n", "b"], ["a", "b"]),
        (['"""a\n', "\n", 'b"""\n', "c\n"], ["a\n\nb", "c"]),
        (['"""a"""\n', '"""\n', "b\n", '"""\n'], ["a", "b"]),
        (['"""never closed\n', "b\n"], ["never closed\nb"]),
        ([" /etc/hosts\n"], [" /etc/hosts"]),
    ],
)
def test_messages_of_a_pipe(lines, expected):
    assert list(_messages(lines)) == expected


def test_options_reach_the_engine(tq, checkpoint, monkeypatch):
    from tq.engine.run import chat, generate
    from tq.engine.run.sampling import GenerateOptions

    given = []
    real = generate.generate

    def spy(loaded, tokens, options, **rest):
        given.append(options)
        return real(loaded, tokens, options, **rest)

    monkeypatch.setattr(chat, "generate", spy)
    arguments = "--temp 0.5 --top-p 0.9 --top-k 7 --min-p 0.1 --repetition-penalty 1.1 --repetition-context 9".split()
    arguments += "--min-tokens 2 -n 5 --seed 4 --stop zz --stop yy".split()
    assert tq("chat", "-m", checkpoint, *arguments, stdin="Hello\n/set temp default\n/set top-k 3\nHi\n").code == 0
    first = GenerateOptions(
        max_tokens=5, temp=0.5, top_p=0.9, top_k=7, min_p=0.1, repetition_penalty=1.1, repetition_context=9,
        min_tokens=2, stop=("zz", "yy"),
    )  # fmt: skip
    from dataclasses import replace

    assert given == [first, replace(first, temp=None, top_k=3)]


def test_kv_options_pack_the_conversation(tq, checkpoint):
    result = tq("chat", "-m", checkpoint, "-n", "4", "--kv-bits", "8,4", "--kv-sink", "2", "--json", stdin="Hello\n")
    assert (result.code, len(answers(result))) == (0, 1), result.err


def test_stats_and_commands_talk_on_stderr(tq, checkpoint):
    result = tq("chat", "-q", "-m", checkpoint, "-n", "3", stdin="/stats\nHello\n/stats\n/set\n/help\n/system\n")
    assert "0 of 256 tokens" in result.err and "read at" in result.err and "max-tokens          3" in result.err
    assert all(usage in result.err for usage in HELP)
    assert "There is no system message." in result.err
    assert result.out.count("\n") >= 1 and "tokens" not in result.out
    assert "(prompt " in tq("chat", "--stats", "-m", checkpoint, "-n", "3", stdin="Hello\n").err


def test_exit_ends_it(tq, checkpoint):
    result = tq("chat", "-m", checkpoint, "-n", "3", "--json", stdin="Hello\n/exit\nnever\n")
    assert len(answers(result)) == 1


def test_clear_forgets_and_regenerate_answers_again(tq, checkpoint):
    result = tq("chat", "-m", checkpoint, "-n", "5", "--json", stdin="Hello\n/regenerate\n/clear\nHello\n")
    first, again, anew = answers(result)
    assert first == again == anew
    assert len(json.loads(result.out)["messages"]) == 2


def test_a_system_message_can_be_changed(tq, checkpoint):
    result = tq("chat", "-m", checkpoint, "-n", "5", "--json", stdin="/system Be brief.\nHello\n/system none\n")
    given = tq("chat", "-m", checkpoint, "-n", "5", "--json", "--system", "Be brief.", stdin="Hello\n")
    assert answers(result) == answers(given)
    assert json.loads(given.out)["messages"][0] == {"role": "system", "content": "Be brief."}
    assert json.loads(result.out)["messages"][0]["role"] == "user"


def test_a_conversation_is_saved_and_loaded(tq, checkpoint, tmp_path):
    whole = tq("chat", "-m", checkpoint, "-n", "5", "--json", "--system", "Be brief.", stdin="One\nTwo\n")
    tq("chat", "-m", checkpoint, "-n", "5", "--system", "Be brief.", stdin="One\n/save talk.json\n")
    assert [m["role"] for m in read_conversation(tmp_path / "talk.json")] == ["system", "user", "assistant"]
    rest = tq("chat", "-m", checkpoint, "-n", "5", "--json", stdin="/load talk.json\nTwo\n/save talk.json\n")
    assert answers(rest) == answers(whole)[1:]
    assert json.loads(rest.out)["messages"] == json.loads(whole.out)["messages"]
    assert json.loads((tmp_path / "talk.json").read_text())["messages"] == json.loads(whole.out)["messages"]
    assert [path.name for path in tmp_path.iterdir()] == ["talk.json"]


# --- stored prompts ---


def test_the_next_start_with_the_same_system_message_reads_it_from_disk(tq, checkpoint, prompts):
    arguments = ["-m", checkpoint, "-n", "5", "--system", SYSTEM, "--json"]
    first, second = (json.loads(tq("chat", *arguments, stdin="Hello\n").out)["answers"][0] for _ in range(2))
    assert first["text"] == second["text"]
    assert (first["cached_tokens"], second["cached_tokens"] > len(SYSTEM)) == (0, True)
    other = json.loads(tq("chat", *arguments, "--kv-bits", "8,4", stdin="Hello\n").out)["answers"][0]
    assert other["cached_tokens"] == 0
    assert len(list(prompts.glob("*.safetensors"))) == 2


@pytest.mark.parametrize(("arguments", "variable"), [(["--prompt-cache", "0"], "1GB"), ([], "0")])
def test_nothing_is_stored_if_nobody_wants_it(tq, checkpoint, prompts, monkeypatch, arguments, variable):
    monkeypatch.setenv("TQ_PROMPT_CACHE", variable)
    assert tq("chat", "-m", checkpoint, "-n", "2", "--system", SYSTEM, *arguments, stdin="Hello\n").code == 0
    assert not prompts.exists()


@pytest.mark.parametrize(("text", "size"), [("0", 0), ("500MB", 5e8), ("1.5g", 1.5e9), ("7", 7), ("2 TB", 2e12)])
def test_sizes(text, size):
    assert settings.size_bytes(text) == size


def test_damage_is_said_and_costs_nothing_else(tq, checkpoint, prompts):
    arguments = ["-m", checkpoint, "-n", "5", "--system", SYSTEM]
    first = tq("chat", *arguments, stdin="Hello\n")
    path = next(prompts.glob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:-9] + b"x" * 9)
    second = tq("chat", *arguments, stdin="Hello\n")
    assert second.out == first.out and "damaged" in second.err and second.code == 0
    assert "damaged" not in tq("chat", *arguments, stdin="Hello\n").err


# --- mistakes ---


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/hlep", "there is no command /hlep; /help lists them\nhint: did you mean /help?"),
        ("/etc/hosts?", "a message that begins with / needs a space before it"),
        ("/clear all", "/clear takes nothing"),
        ("/save", "/save needs the name of a file"),
        ("/load missing.json", "missing.json cannot be read: No such file or directory"),
        ("/load bad.json", "bad.json is no conversation: it is not JSON"),
        ("/load list.json", 'list.json is no conversation: it has no "messages"'),
        ("/load turns.json", "user and assistant must take turns"),
        ("/save bad.json", "bad.json exists and is no conversation: it is not overwritten"),
        ("/save missing/talk.json", "missing/talk.json cannot be written: No such file or directory"),
        ("/set tmp 1", "did you mean temp?"),
        ("/set temp", "what should temp be?"),
        ("/set temp hot", "temp must be a number or default, not hot"),
        ("/set top-k 1.5", "top-k must be a whole number or default, not 1.5"),
        ("/set temp -1", "temp must be 0 (greedy) or more"),
        ("/set think maybe", "think must be on or off, not maybe"),
        ("/regenerate", "there is no answer yet"),
    ],
)
def test_mistakes_in_commands_are_sentences(tq, checkpoint, tmp_path, line, message):
    (tmp_path / "bad.json").write_text("not json")
    (tmp_path / "list.json").write_text("[1]")
    (tmp_path / "turns.json").write_text('{"messages": [{"role": "assistant", "content": "Hi"}]}')
    result = tq("chat", "-m", checkpoint, stdin=f"{line}\nHello\n")
    assert message in result.err and "Traceback" not in result.err
    assert (result.code > 0, result.out) == (True, "")
    assert (tmp_path / "bad.json").read_text() == "not json"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--temp", "-1"], "temp must be 0 (greedy) or more"),
        (["--prompt-cache", "much"], "--prompt-cache: 'much' is no size such as 500MB, 8GB or 0"),
    ],
)
def test_mistakes_in_options_are_sentences(tq, checkpoint, arguments, message):
    result = tq("chat", "-m", checkpoint, *arguments, stdin="Hello\n")
    assert (result.code, result.out) == (2, "") and message in result.err


def test_a_message_that_does_not_fit_ends_a_pipe(tq, checkpoint):
    result = tq("chat", "-m", checkpoint, stdin=f"{'x' * 400}\nHello\n")
    assert (result.code, result.out) == (1, "") and "this model takes 255" in result.err


def test_dropped_turns_are_said(tq, checkpoint):
    result = tq("chat", "-m", checkpoint, "-n", "8", stdin="x" * 90 + "\n" + "y" * 120 + "\nHello\n")
    assert result.code == 0 and "the model no longer sees the" in result.err


def test_a_conversation_keeps_only_what_it_knows(tmp_path):
    path = tmp_path / "talk.json"
    message = {"role": "user", "content": "Hi", "name": "x", "reasoning_content": 3}
    path.write_text(
        json.dumps({"messages": [message, {"role": "assistant", "content": "", "reasoning_content": "hm"}]})
    )
    assert read_conversation(path) == [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "", "reasoning_content": "hm"},
    ]
    path.write_text('{"messages": [{"role": "tool", "content": "x"}, {"role": "assistant", "content": "x"}]}')
    with pytest.raises(TQError, match="take turns"):
        read_conversation(path)


def test_every_command_exists():
    for usage in HELP:
        assert callable(getattr(chat_commands.Commands, f"_{usage.split()[0][1:]}"))
    with pytest.raises(UsageError):
        chat_commands.Commands(None, "").run("/run")


# --- a terminal ---


READY = r"Ctrl-D leaves\.\s+>>>"


class Terminal:
    """`tq chat` on a pseudo-terminal; `text` is all it has written, without what moves the cursor."""

    def __init__(self, *arguments, folder, **environment):
        pid, self.master = pty.fork()
        if pid == 0:
            os.chdir(folder)
            environment = {**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm-256color", **environment}
            command = [sys.executable, "-m", "tq", "chat", *map(str, arguments)]
            os.execve(sys.executable, command, environment)
        termios.tcsetwinsize(self.master, (24, 80))
        self.pid, self.raw, self.seen = pid, "", 0

    @property
    def text(self):
        return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]|\x1b[()][A-Z0-9]", "", self.raw).replace("\r", "")

    def wait(self, pattern, seconds=30):
        """What has been written since the last call, up to what matches."""
        deadline = time.monotonic() + seconds
        start = self.seen
        while not (found := re.search(pattern, self.text[start:])):
            assert time.monotonic() < deadline, f"no {pattern!r} in {self.text[start:]!r}"
            self.read()
        self.seen = start + found.end()
        return self.text[start : self.seen]

    def more(self, count):
        """Wait until so many characters have been written, whatever they are."""
        end = len(self.raw) + count
        while len(self.raw) < end:
            self.read()

    def read(self):
        if select.select([self.master], [], [], 1)[0]:
            try:
                chunk = os.read(self.master, 65536).decode(errors="replace")
            except OSError as error:
                raise AssertionError(f"ended after {self.text!r}") from error
            self.raw += chunk
            if "\x1b[6n" in chunk:  # prompt_toolkit asks where the cursor is
                os.write(self.master, b"\x1b[1;1R")

    def type(self, text):
        os.write(self.master, text.encode())

    def end(self):
        """The exit code."""
        while True:
            try:
                if not os.read(self.master, 65536):
                    break
            except OSError:
                break
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


@pytest.fixture
def terminal(checkpoint, tmp_path):
    started = []

    def start(*arguments, model=checkpoint, **environment):
        started.append(Terminal("-m", model, *arguments, folder=tmp_path, **environment))
        return started[-1]

    yield start
    for one in started:
        os.close(one.master)
        try:
            os.kill(one.pid, signal.SIGKILL)
            os.waitpid(one.pid, 0)
        except (ProcessLookupError, ChildProcessError):
            pass


def test_a_conversation_on_a_terminal(terminal):
    chat = terminal("-n", "5", "--stats")
    chat.wait(READY)
    chat.type("Hello\r")
    chat.wait(r"answer \d tokens at")
    chat.type("/hlep\r")
    chat.wait(r"did you mean /help\?\s+>>>")
    chat.type("\x04")
    assert chat.end() == 0


def test_messages_of_several_lines(terminal, tmp_path):
    chat = terminal("-n", "2")
    chat.wait(READY)
    chat.type("one\x1b\rtwo\r")  # Alt-Enter
    chat.type('"""three\r\rfour"""\r')
    chat.type("\x1b[200~five\nsix\x1b[201~\r")  # pasted
    chat.type("/save talk.json\r")
    chat.wait("Saved to talk.json")
    chat.type("/exit\r")
    assert chat.end() == 0
    said = [message["content"] for message in read_conversation(tmp_path / "talk.json") if message["role"] == "user"]
    assert said == ["one\ntwo", "three\n\nfour", "five\nsix"]


@pytest.fixture(scope="module")
def endless(checkpoint, tmp_path_factory):
    """A model that goes on for a long time: its tokenizer knows no end of a sequence that it would say."""
    folder = tmp_path_factory.mktemp("models") / "endless"
    shutil.copytree(checkpoint, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 10**6}))
    return folder


def test_ctrl_c_stops_the_answer_and_not_the_program(terminal, endless):
    chat = terminal("-n", "100000", "--min-tokens", "100000", model=endless)
    chat.wait(READY)
    chat.type("Hello\r")
    chat.more(300)
    chat.type("\x03")
    chat.wait(r"\(stopped\)\s+>>>")
    chat.type("half a line\x03")  # at the prompt, it empties the line
    chat.type("/stats\r")
    chat.wait("of 1000000 tokens")
    chat.type("/exit\r")
    assert chat.end() == 0


def test_what_is_typed_during_an_answer_is_not_shown_in_it_and_not_lost(terminal, endless):
    chat = terminal("-n", "500", "--min-tokens", "500", model=endless)
    chat.wait(READY)
    chat.type("Hello\r")
    chat.more(300)
    chat.type("/exit\r")
    assert "/exit" not in chat.wait("cut off after 500 tokens")
    assert chat.end() == 0


def test_history_is_kept_and_private(terminal):
    history = settings.cache_dir() / "chat-history"
    history.unlink(missing_ok=True)
    chat = terminal("-n", "2")
    chat.wait(READY)
    chat.type("remember me\r")
    chat.wait(r"cut off after 2 tokens.*\s+>>>")
    chat.type("\x04")
    assert chat.end() == 0
    assert history.stat().st_mode & 0o777 == 0o600
    chat = terminal("-n", "2")
    chat.wait(READY)
    deadline = time.monotonic() + 30
    while "remember me" not in chat.text and time.monotonic() < deadline:  # it is read while the person looks on
        chat.type("\x1b[A")
        chat.read()
    assert "remember me" in chat.text
    chat.type("\x15/exit\r")
    assert chat.end() == 0


def test_tab_completes_commands(terminal):
    chat = terminal("-n", "2")
    chat.wait(READY)
    chat.type("/sta\t")
    chat.wait("ts")  # only what changes is drawn
    chat.type("\r")
    chat.wait("context +0 of 256 tokens")
    chat.type("/exit\r")
    assert chat.end() == 0


def test_reasoning_is_dimmed(capsys, monkeypatch):
    from tq.commands.chat_terminal import _Writer
    from tq.engine.run.chat import Piece
    from tq.output import Output

    for colour, expected in (
        ("1", "\x1b[2mhm\x1b[0m\x1b[2m, well\n\x1b[0m\nYes\n"),
        ("", "(thinking) hm, well\n\nYes\n"),
    ):
        monkeypatch.setenv("FORCE_COLOR", colour)
        monkeypatch.setenv("NO_COLOR", "" if colour else "1")
        writer = _Writer(Output())
        for text, thought in (("hm", True), (", well\n", True), ("Yes", False)):
            writer.show(Piece(text, thought))
        writer.end()
        assert capsys.readouterr().out == expected


def test_progress_is_gone_before_the_answer(capsys, monkeypatch):
    from tq.commands import chat_terminal
    from tq.engine.events import Progress
    from tq.engine.run.chat import Piece
    from tq.output import Output

    monkeypatch.setattr(chat_terminal, "PROGRESS_AFTER_SECONDS", -1)
    writer = chat_terminal._Writer(Output())
    for event in (Progress(512, 900, "tokens"), Piece("Yes", False)):
        writer.show(event)
    writer.end()
    assert capsys.readouterr().out == "\r\x1b[Kreading 512 of 900 tokens\r\x1b[KYes\n"


def test_json_needs_a_pipe(terminal):
    chat = terminal("--json")
    chat.wait("--json needs messages that are piped in")
    assert chat.end() == 2


def test_what_is_not_text_is_refused(checkpoint, tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", "tq", "chat", "-m", str(checkpoint)],
        input=b"\xff\xfe\n", cwd=tmp_path, env=environment, capture_output=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 1 and b"not text in UTF-8" in done.stderr
