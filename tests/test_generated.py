"""What is derived from the command line is up to date, and the completions complete."""

import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
GENERATED = runpy.run_path(str(ROOT / "docs" / "generate.py"))["generated"]()


@pytest.mark.parametrize("path", GENERATED)
def test_generated_files_are_up_to_date(path):
    assert (ROOT / path).read_text() == GENERATED[path], "run `make docs`"


def test_every_command_is_in_the_reference():
    from tq.cli import app

    for command in app.registered_commands:
        assert f"\n## tq {command.name}\n" in GENERATED["docs/cli.md"]


def test_zsh_finds_its_completion_by_the_first_line():
    assert GENERATED["completions/_tq"].startswith("#compdef tq\n")
    assert GENERATED["completions/_tq"].endswith('_tq_completion "$@"\n')


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_bash_completes_commands_and_options(tmp_path):
    # A `tq` on the path, and the script asked as bash asks it.
    (tmp_path / "tq").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m tq "$@"\n')
    (tmp_path / "tq").chmod(0o755)
    script = (
        f"source {ROOT}/completions/tq.bash\n"
        'ask() { COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _tq_completion tq; echo ${COMPREPLY[@]}; }\n'
        "ask tq con\nask tq convert --rot\n"
    )
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(["bash", "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["convert", "--rotation"]
