"""The command line: the Typer app made of commands/, and main(), which gives every failure a sentence and an exit code.

Exit codes: 0 done, 1 failed, 2 used wrongly, 130 interrupted.
"""

import errno
import logging
import os
import re
import sys
import traceback
from typing import Annotated

import typer

from tq import __version__, output, settings
from tq.commands import bench, calibrate, chat, convert, demo, doctor, eval, plan, run, serve, stream
from tq.commands.options import examples
from tq.errors import TQError, UsageError

INTERRUPTED = 130

app = typer.Typer(
    name="tq",
    help="Large language models that fit, run fast and stay sharp on one machine.",
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    epilog=examples(
        "tq demo",
        "tq convert -m HuggingFaceTB/SmolLM2-135M-Instruct --bits 4",
        'tq run -m SmolLM2-135M-Instruct-tq4 "What is gravity?"',
    ),
)
for command in (convert, calibrate, plan, run, stream, chat, serve, eval, bench, demo, doctor):
    name = command.__name__.rpartition(".")[2]
    app.command(name, epilog=command.EPILOG)(getattr(command, name))


def _print_version(asked: bool) -> None:
    if asked:
        print(f"tq {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """The console script `tq`."""
    sys.exit(run_command(sys.argv[1:]))


def run_command(arguments: list[str]) -> int:
    """Runs one command line and returns its exit code; what went wrong is said on stderr."""
    logging.getLogger("tq").handlers = [_Warnings()]
    if not output.is_terminal(sys.stderr):
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        # A command returns None; Typer hands back the code of typer.Exit, and 130 for Ctrl-C.
        code = app(args=arguments or ["--help"], prog_name="tq", standalone_mode=False) or 0
        sys.stdout.flush()
        return code
    except (KeyboardInterrupt, typer.Abort):
        return INTERRUPTED
    except BrokenPipeError:
        # The reader has gone. Nothing more can be said to it, not even by the flush at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as exception:
        if settings.debug():
            traceback.print_exc()
        error = explain(exception)
        output.report_error(error)
        return error.exit_code


class _Warnings(logging.Handler):
    """What the engine logs is said as the commands say it."""

    def emit(self, record: logging.LogRecord) -> None:
        output.labelled("warning", record.getMessage())


def explain(exception: Exception) -> TQError:
    """The sentence, hint and exit code for anything that a command may raise."""
    if isinstance(exception, TQError):
        return exception
    if isinstance(exception, typer.TyperException):
        return _explain_usage(exception)
    if isinstance(exception, OSError) and exception.errno in SYSTEM_ERRORS:
        where = f": {exception.filename}" if exception.filename else ""
        return TQError(SYSTEM_ERRORS[exception.errno] + where)
    if isinstance(exception, ImportError) and "mlx" in str(exception):
        return TQError(
            f"MLX cannot be loaded here ({exception})",
            hint="on Linux, install it with its backend: pip install 'tq[cpu]' or 'tq[cuda13]'",
        )
    return TQError(
        f"internal error: {type(exception).__name__}: {exception}",
        hint="this is a bug in tq; TQ_DEBUG=1 shows where it happened",
    )


SYSTEM_ERRORS = {
    errno.ENOSPC: "no space left on the disk",
    errno.EDQUOT: "the disk quota is used up",
    errno.EACCES: "permission denied",
    errno.EPERM: "permission denied",
    errno.EROFS: "the file system is read-only",
}


def _explain_usage(exception: typer.TyperException) -> TQError:
    """Typer's own complaints about a command line, in our form."""
    message = exception.format_message().rstrip(".")
    # Values are parsed by pydantic, which has sentences of its own.
    message = message.replace("Value error, ", "")
    message = re.sub(r"Input should be (a valid \w+), .*", r"must be \1", message)
    similar = getattr(exception, "possibilities", None)  # closest first
    if similar:
        message = f"{exception.message}. Did you mean {similar[0]}?"
    context = getattr(exception, "ctx", None)
    return UsageError(message, hint=f"{context.command_path if context else 'tq'} --help lists what is there")
