"""Writes what is derived from the command line itself: docs/cli.md and completions/. A test compares them."""

import os
import subprocess
import sys
from pathlib import Path

from tq.cli import app

ROOT = Path(__file__).resolve().parents[1]


def generated() -> dict[str, str]:
    """The text of every generated file, by its path from the root of the project."""
    return {
        "docs/cli.md": reference(),
        "completions/tq.bash": completion("bash"),
        "completions/_tq": autoloaded(completion("zsh")),
        "completions/tq.fish": completion("fish"),
    }


def reference() -> str:
    parts = ["# Command reference\n\nMade from `tq --help` by `make docs`."]
    for words in [[], *([command.name] for command in app.registered_commands)]:
        parts.append(f"## {' '.join(['tq', *words])}\n\n```text\n{tq(*words, '--help').strip()}\n```")
    return "\n\n".join(parts) + "\n"


def completion(shell: str) -> str:
    return tq(_TQ_COMPLETE=f"source_{shell}").strip() + "\n"


def autoloaded(script: str) -> str:
    """zsh runs a file of its fpath as the completion function itself, so the script calls what it defines."""
    return script.replace("compdef _tq_completion tq", '_tq_completion "$@"')


def tq(*arguments: str, **environment: str) -> str:
    environment = {**os.environ, "COLUMNS": "80", "NO_COLOR": "1", **environment}
    command = [sys.executable, "-m", "tq", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, text=True).stdout


if __name__ == "__main__":
    for path, text in generated().items():
        (ROOT / path).write_text(text)
