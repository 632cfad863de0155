"""A library is compiled once, is never seen half made, and every way in which that cannot be has its reason."""

import os
import platform
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tq.cpu import build
from tq.cpu.build import Declined, Recipe

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="native code is built on Linux only")
ONE = '#include "number.h"\nint two(void);\nint three(void) { return NUMBER + two(); }\n'
TWO = "int two(void) { return 2; }\n"
make = build.build.__wrapped__  # without the memory of this process


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache/tq/native"


@pytest.fixture
def recipe(tmp_path):
    (tmp_path / "one.c").write_text(ONE)
    (tmp_path / "two.c").write_text(TWO)
    (tmp_path / "number.h").write_text("#define NUMBER 1\n")
    return Recipe("numbers", "C", (tmp_path / "one.c", tmp_path / "two.c"), (tmp_path / "number.h",), ("-O1",))


@pytest.fixture
def compiler(tmp_path, monkeypatch):
    """A compiler that writes down how it was called, then runs `before`, then the real one."""

    def use(before=""):
        path = tmp_path / "compiler"
        log = tmp_path / "calls"
        path.write_text(f'#!/bin/sh\necho "$*" >> {log}\n{before}\nexec cc "$@"\n')
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setenv("CC", str(path))
        return lambda: [line for line in log.read_text().splitlines() if line != "--version"]

    return use


def test_it_is_compiled_once_and_then_found(recipe, compiler, cache):
    calls = compiler()
    first, second = make(recipe), make(recipe)
    assert build.load(first.path).three() == 3
    assert first.path == second.path
    assert first.seconds > 0
    assert second.seconds is None
    assert len(calls()) == 3  # two sources, one link
    assert {path.suffix for path in cache.iterdir()} == {".so", ".lock"}


@pytest.mark.parametrize("change", ["source", "header", "flags", "versions", "compiler", "machine", "C library"])
def test_whatever_it_is_made_from_has_its_own_library(recipe, compiler, monkeypatch, change):
    compiler()
    before = make(recipe).path
    if change == "source":
        recipe.sources[1].write_text("int two(void) { return 20; }\n")
    elif change == "header":
        recipe.headers[0].write_text("#define NUMBER 10\n")
    elif change == "flags":
        recipe = Recipe("numbers", "C", recipe.sources, recipe.headers, ("-O2",))
    elif change == "versions":
        recipe = Recipe("numbers", "C", recipe.sources, recipe.headers, ("-O1",), made_for=("2",))
    elif change == "compiler":
        os.utime(os.environ["CC"], ns=(1, 1))
    elif change == "machine":
        monkeypatch.setattr(platform, "machine", lambda: "another")
    else:
        monkeypatch.setattr(os, "confstr", lambda name: "another")
    after = make(recipe)
    assert after.path != before
    assert after.seconds is not None
    assert build.load(after.path).three() == {"source": 21, "header": 12}.get(change, 3)


def test_sources_are_compiled_at_the_same_time(recipe, compiler, tmp_path):
    """Each of the two waits until the other has begun."""
    wait = f"""case "$*" in *" -c "*)
        touch {tmp_path}/begun.$$
        for i in $(seq 200); do [ $(ls {tmp_path}/begun.* | wc -l) -ge 2 ] && break; sleep 0.1; done
        [ $(ls {tmp_path}/begun.* | wc -l) -ge 2 ] || exit 1;;
    esac"""
    compiler(wait)
    assert build.load(make(recipe).path).three() == 3


PROCESS = """
import sys
from pathlib import Path
from tq.cpu import build
folder = Path(sys.argv[1])
print(build.build(build.Recipe("numbers", "C", (folder / "one.c", folder / "two.c"), (folder / "number.h",), ("-O1",))))
"""


def test_processes_that_begin_together_compile_once(recipe, compiler, tmp_path):
    calls = compiler("sleep 0.3")
    command = [sys.executable, "-c", PROCESS, str(tmp_path)]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    said = [process.communicate()[0] for process in running]
    assert sum("seconds=None" in line for line in said) == 3
    assert len({line.split("seconds")[0] for line in said}) == 1
    assert len(calls()) == 3


def test_without_locks_both_compile_and_both_work(recipe, monkeypatch):
    def no_locks(*_):
        raise OSError("no locks available")

    monkeypatch.setattr(build.fcntl, "flock", no_locks)
    assert build.load(make(recipe).path).three() == 3


def test_no_compiler(recipe, monkeypatch):
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(Declined, match=r"^no C compiler \(cc, gcc or clang\) was found$") as declined:
        make(recipe)
    assert "apt install" in declined.value.hint


def test_a_compiler_that_is_not_there_is_looked_for_elsewhere(recipe, monkeypatch):
    monkeypatch.setenv("CC", "/nonexistent/cc -m32")
    assert build.load(make(recipe).path).three() == 3


def test_words_of_the_variable_are_passed_on(recipe, monkeypatch):
    recipe.sources[1].write_text("int two(void) { return MINE; }\n")
    monkeypatch.setenv("CC", "cc -DMINE=5")
    assert build.load(make(recipe).path).three() == 6


def test_a_failed_compilation_says_the_first_error_and_leaves_nothing(recipe, cache):
    recipe.sources[0].write_text(
        '#warning "first"\nint three(void) { return nothing; }\nint four(void) { return less; }'
    )
    with pytest.raises(Declined, match=r"/cc failed: .*one\.c:2:.*error: .*nothing"):
        make(recipe)
    assert [path.suffix for path in cache.iterdir()] == [".lock"]
    recipe.sources[0].write_text(ONE)
    assert build.load(make(recipe).path).three() == 3


@pytest.mark.parametrize(
    ("text", "reason"), [("exit 1", "failed: no message"), ("echo first; echo second >&2; exit 1", "failed: second")]
)
def test_a_failing_compiler(recipe, compiler, text, reason):
    compiler(f'case "$*" in --version) exit 0;; *) {text};; esac')
    with pytest.raises(Declined, match=f"compiler {reason}"):
        make(recipe)


def test_a_compiler_that_is_no_program(recipe, tmp_path, monkeypatch):
    broken = tmp_path / "broken"
    broken.write_text("#!/nonexistent/shell\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CC", str(broken))
    with pytest.raises(Declined, match="broken cannot be run: "):
        make(recipe)


def read_only(*_, **__):
    raise OSError(30, "Read-only file system")


def test_a_cache_that_cannot_be_written(recipe, monkeypatch):
    monkeypatch.setattr(Path, "mkdir", read_only)
    with pytest.raises(Declined, match=r"^the cache cannot be written: .*Read-only file system") as declined:
        make(recipe)
    assert "XDG_CACHE_HOME" in declined.value.hint


def test_what_a_cache_that_cannot_be_written_holds_is_used(recipe, monkeypatch):
    path = make(recipe).path
    monkeypatch.setattr(Path, "mkdir", read_only)
    monkeypatch.setattr("builtins.open", read_only)
    assert make(recipe) == build.Built(path, None)


def test_a_full_disk(recipe, monkeypatch, cache):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(Declined, match=r"^the cache cannot be written: .*No space left"):
        make(recipe)
    assert [path.suffix for path in cache.iterdir()] == [".lock"]


def test_no_home_for_a_cache(recipe, monkeypatch):
    def none():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setattr(Path, "home", none)
    with pytest.raises(Declined, match=r"^there is no cache folder: this user has no home folder$"):
        make(recipe)


def test_the_cache_is_in_the_home_folder_where_nothing_else_is_said(recipe, monkeypatch, tmp_path):
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert make(recipe).path.parent == tmp_path / "home/.cache/tq/native"


def test_a_file_that_cannot_be_loaded(recipe):
    """As in a cache on a file system mounted noexec."""
    path = make(recipe).path
    path.write_bytes(b"not a library")
    with pytest.raises(Declined, match=r"^the built library cannot be loaded: ") as declined:
        build.load(path)
    assert "may hold programs" in declined.value.hint


def test_only_forgotten_files_of_its_own_are_removed(recipe, cache):
    cache.mkdir(parents=True)
    names = ["kernels-avx2-0123456789abcdef.so", "kernels-avx2-0123456789abcdef.lock", "notes.txt", "numbers.so"]
    old, new = time.time() - 40 * 86400, time.time() - 10 * 86400
    for name in [*names, "blas-0123456789abcdef.so"]:
        (cache / name).write_text("")
        os.utime(cache / name, (old, old))
    os.utime(cache / "blas-0123456789abcdef.so", (new, old))  # read ten days ago
    (cache / "build-left_behind").mkdir()
    (cache / "build-left_behind/one.o").write_text("")
    os.utime(cache / "build-left_behind", (old, old))
    made = make(recipe).path
    left = {path.name for path in cache.iterdir()}
    assert left == {"notes.txt", "numbers.so", "blas-0123456789abcdef.so", made.name, made.with_suffix(".lock").name}


def test_what_declined_stays_declined_and_threads_wait_for_each_other():
    calls = []

    @build.once
    def attempt(fail):
        calls.append(fail)
        time.sleep(0.05)
        if fail:
            raise Declined("no", "try yes")
        return 7

    found = []
    threads = [threading.Thread(target=lambda: found.append(attempt(False))) for _ in range(3)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    for _ in range(2):
        with pytest.raises(Declined, match="no") as declined:
            attempt(True)
        assert declined.value.hint == "try yes"
    assert (found, calls) == ([7, 7, 7], [False, True])


def test_the_note_is_for_those_who_waited_and_comes_once(recipe):
    build.notes()
    make(recipe)
    (note,) = build.notes()
    assert note.startswith("compiled tq's CPU code for this machine in ")
    assert build.notes() == []
    make(recipe)
    assert build.notes() == []
