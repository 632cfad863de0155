"""The command line as a whole: help, version, mistakes, exit codes, colour, and a sentence for every failure."""

import errno
import os
import pty
import subprocess
import sys

import pytest

from tq import __version__, cli
from tq.errors import TQError, UsageError

COMMANDS = ["convert", "calibrate", "plan", "run", "stream", "chat", "serve", "eval", "bench", "demo", "doctor"]


def test_version_alone_on_stdout(tq):
    assert tq("--version") == type(tq("--version"))(0, f"tq {__version__}\n", "")


def test_tq_alone_shows_its_help_and_the_commands(tq):
    alone = tq()
    assert (alone.code, alone.err) == (0, "")
    assert alone.out == tq("--help").out == tq("-h").out
    assert [line.split()[0] for line in alone.out.split("Commands:\n")[1].split("\n\n")[0].splitlines()] == COMMANDS


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_examples_and_its_own_words(tq, command):
    shown = tq(command, "-h")
    assert (shown.code, shown.err) == (0, "")
    assert shown.out == tq(command, "--help").out
    assert f"Usage: tq {command} " in shown.out
    assert f"  Examples:\n    tq {command}" in shown.out
    assert max(len(line) for line in shown.out.splitlines()) <= 80


@pytest.mark.parametrize(
    ("arguments", "message", "hint"),
    [
        (["convrt"], "No such command 'convrt'. Did you mean 'convert'?", "tq --help lists what is there"),
        (["zzz"], "No such command 'zzz'", "tq --help lists what is there"),
        (
            ["convert", "--bit", "4"],
            "No such option: --bit. Did you mean --bits?",
            "tq convert --help lists what is there",
        ),
        (["run"], "Missing option '--model' / '-m'", "tq run --help lists what is there"),
        (["run", "-m"], "Option '-m' requires an argument", "tq --help lists what is there"),
        (
            ["eval", "-m", "x", "--seq-len", "many"],
            "Invalid value for '--seq-len': must be a valid integer",
            "tq eval --help lists what is there",
        ),
        (["convert"], "convert needs a model", "tq convert -m MODEL; tq convert --help lists the options"),
        (
            ["convert", "-m", "x", "--format", "zip"],
            "Invalid value for '--format': 'zip' is not one of 'tq', 'turboquant'",
            None,
        ),
        (["run", "-m", "x"], "there is no prompt", 'tq run -m MODEL "What is gravity?", or pipe a text in'),
        (
            ["run", "-m", "x", "one", "-p", "two"],
            "the prompt is given twice, as an argument and with --prompt: use one of them",
            None,
        ),
    ],
)
def test_a_wrong_command_line_is_one_sentence_and_exit_code_2(tq, arguments, message, hint):
    result = tq(*arguments)
    assert (result.code, result.out) == (2, "")
    lines = result.err.splitlines()
    assert lines[0].startswith(f"error: {message}")
    assert len(lines) <= 2
    if hint:
        assert lines[1] == f"hint: {hint}"


@pytest.fixture
def raising(tq, monkeypatch):
    """raising(exception): the result of a command that raises it."""

    def call(exception):
        def examine(*arguments):
            raise exception

        monkeypatch.setattr("tq.engine.machine.doctor.examine", examine)
        return tq("doctor")

    return call


@pytest.mark.parametrize(
    ("exception", "code", "message", "hint"),
    [
        (TQError("the model is not there", hint="look elsewhere"), 1, "the model is not there", "look elsewhere"),
        (UsageError("bits 9 is not one of 1 to 8"), 2, "bits 9 is not one of 1 to 8", None),
        (OSError(errno.ENOSPC, "x", "/out/a"), 1, "no space left on the disk: /out/a", None),
        (PermissionError(errno.EACCES, "x", "/root"), 1, "permission denied: /root", None),
        (OSError(errno.EROFS, "x"), 1, "the file system is read-only", None),
        (
            ImportError("libmlx.so: cannot open shared object file"),
            1,
            "MLX cannot be loaded here (libmlx.so: cannot open shared object file)",
            "on Linux, install it with its backend: pip install 'tq[cpu]' or 'tq[cuda13]'",
        ),
        (
            ZeroDivisionError("division by zero"),
            1,
            "internal error: ZeroDivisionError: division by zero",
            "this is a bug in tq; TQ_DEBUG=1 shows where it happened",
        ),
    ],
)
def test_every_failure_has_a_sentence_and_a_code(raising, exception, code, message, hint):
    result = raising(exception)
    expected = f"error: {message}\n" + (f"hint: {hint}\n" if hint else "")
    assert (result.code, result.out, result.err) == (code, "", expected)


def test_ctrl_c_is_130_without_a_word(raising):
    assert raising(KeyboardInterrupt()).code == 130
    assert raising(KeyboardInterrupt()).err == ""


@pytest.mark.parametrize("exception", [TQError("gone"), ValueError("bad")])
def test_tq_debug_shows_the_traceback_before_the_sentence(raising, monkeypatch, exception):
    assert "Traceback" not in raising(exception).err
    monkeypatch.setenv("TQ_DEBUG", "1")
    shown = raising(exception).err
    assert shown.startswith("Traceback (most recent call last):\n")
    assert shown.splitlines()[-1 if isinstance(exception, TQError) else -2].startswith("error: ")
    monkeypatch.setenv("TQ_DEBUG", "0")
    assert "Traceback" not in raising(exception).err


def test_a_closed_pipe_is_quiet(program):
    code = (
        "import subprocess, sys\n"
        "p = subprocess.Popen([sys.executable, '-m', 'tq', 'doctor'], stdout=subprocess.PIPE, stderr=subprocess.PIPE)\n"
        "p.stdout.close()\n"
        "print(p.stderr.read().decode(), p.wait())"
    )
    assert program(code=code).out.split() == ["1"]


def terminal(arguments, **environment):
    """What a program shows on a terminal, its stdout and stderr together."""
    master, slave = pty.openpty()
    environment = {name: value for name, value in os.environ.items() if name != "NO_COLOR"} | environment
    process = subprocess.Popen([sys.executable, "-m", "tq", *arguments], stdout=slave, stderr=slave, env=environment)
    os.close(slave)
    shown = b""
    try:
        while piece := os.read(master, 4096):
            shown += piece
    except OSError:  # Linux says so when the other end has closed
        pass
    os.close(master)
    process.wait()
    return shown.decode()


def test_colour_on_a_terminal_only_and_never_with_no_color():
    assert "\x1b[1;31merror" in terminal(["zzz"], TERM="xterm-256color")
    assert terminal(["zzz"], TERM="xterm-256color", NO_COLOR="1").startswith("error: ")
    assert "\x1b[" not in terminal(["zzz"], TERM="dumb")


def test_no_colour_off_a_terminal(program):
    result = program("zzz", TERM="xterm-256color")
    assert result.err == "error: No such command 'zzz'\nhint: tq --help lists what is there\n"


def test_force_color_colours_a_pipe(program):
    code = "import os; os.environ.pop('NO_COLOR'); from tq.cli import run_command; run_command(['zzz'])"
    assert "\x1b[" in program(code=code, FORCE_COLOR="1").err


def test_the_module_is_the_program():
    done = subprocess.run([sys.executable, "-m", "tq", "--version"], capture_output=True, text=True)
    assert done.stdout == f"tq {cli.__version__}\n"
