"""Compiles C and C++ sources of this package to shared libraries, once, into the user's cache.

A library's name holds a hash of all it was made from, so a cache on a shared home serves other machines, other
compilers and later versions of tq side by side; what nobody used for a month is removed when something new is built.
"""

import contextlib
import ctypes
import fcntl
import functools
import hashlib
import os
import platform
import re
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar, TypeVarTuple

from tq import settings
from tq.cpu import cores
from tq.errors import TQError

# $CC or $CXX, then these.
COMPILERS = {"C": ("CC", ["cc", "gcc", "clang"]), "C++": ("CXX", ["c++", "g++", "clang++"])}
WRITTEN_HERE = re.compile(r"[a-z0-9-]+-[0-9a-f]{16}\.(so|lock)|build-\w+")
FORGOTTEN_SECONDS = 30 * 86400
ANOTHER_CACHE = "set XDG_CACHE_HOME to a folder that can be written and may hold programs"

Arguments = TypeVarTuple("Arguments")
Result = TypeVar("Result")


class Declined(Exception):
    """Why a piece of native code is not used, in one sentence without a full stop, and what would help."""

    def __init__(self, reason: str, hint: str | None = None):
        super().__init__(reason)
        self.hint = hint


def once(function: Callable[[*Arguments], Result]) -> Callable[[*Arguments], Result]:
    """Like functools.cache, but what declined stays declined, and a second thread waits for the first."""
    lock = threading.RLock()
    outcomes: dict[tuple[*Arguments], Result | Declined] = {}

    @functools.wraps(function)
    def call(*arguments: *Arguments) -> Result:
        with lock:
            if arguments not in outcomes:
                try:
                    outcomes[arguments] = function(*arguments)
                except Declined as declined:
                    outcomes[arguments] = declined
            outcome = outcomes[arguments]
        if isinstance(outcome, Declined):
            raise Declined(str(outcome), outcome.hint)
        return outcome

    return call


@dataclass(frozen=True)
class Recipe:
    """What a library is made from.

    Attributes:
        name: How its file begins: lower case letters, digits and dashes.
        sources: Files that are compiled, each on its own.
        headers: Files that those include, as far as they may change without a new compiler.
        flags: For the compiler, and for it as the linker.
        libraries: Files that the result is linked with.
        made_for: Versions of other things that the result fits.
    """

    name: str
    language: Literal["C", "C++"]
    sources: tuple[Path, ...]
    headers: tuple[Path, ...] = ()
    flags: tuple[str, ...] = ()
    libraries: tuple[Path, ...] = ()
    made_for: tuple[str, ...] = ()


@dataclass(frozen=True)
class Built:
    """A library in the cache; `seconds` is what making it took, or None if it was there."""

    path: Path
    seconds: float | None


@once
def build(recipe: Recipe) -> Built:
    """The library of a recipe: found in the cache, or compiled into it.

    Raises:
        Declined: There is no compiler, or it fails, or the cache cannot be written.
    """
    compiler = _compiler(recipe.language)
    path = _path(recipe, compiler)
    if path.exists():
        return Built(path, None)
    begin = time.monotonic()
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        # The lock keeps two first uses from compiling twice; the rename keeps anyone from seeing half a file.
        with open(path.with_suffix(".lock"), "w") as lock:
            with contextlib.suppress(OSError):  # a file system without locks: both compile, and that is all
                fcntl.flock(lock, fcntl.LOCK_EX)
            if path.exists():
                return Built(path, None)
            with tempfile.TemporaryDirectory(prefix="build-", dir=path.parent) as folder:
                _compile(recipe, compiler, Path(folder) / path.name)
                os.replace(Path(folder) / path.name, path)
            _prune(path.parent)
    except OSError as error:
        raise Declined(f"the cache cannot be written: {error}", ANOTHER_CACHE) from error
    built = Built(path, time.monotonic() - begin)
    _made.append(built)
    return built


def notes() -> list[str]:
    """What a person should know who has waited for compilers since this was asked last."""
    seconds = sum(built.seconds or 0 for built in _made)
    said = [f"compiled tq's CPU code for this machine in {seconds:.0f} s; it is kept for next time"] if _made else []
    _made.clear()
    return said


_made: list[Built] = []


def load(path: Path, mode: int = ctypes.DEFAULT_MODE) -> ctypes.CDLL:
    """Opens a built library.

    Raises:
        Declined: It is damaged, or its folder allows no programs.
    """
    try:
        return ctypes.CDLL(str(path), mode=mode)
    except OSError as error:
        raise Declined(f"the built library cannot be loaded: {error}", ANOTHER_CACHE) from error


def _path(recipe: Recipe, compiler: list[str]) -> Path:
    program = Path(compiler[0])
    made_from = (
        [(file.name, file.read_bytes()) for file in (*recipe.sources, *recipe.headers)],
        (recipe.flags, recipe.libraries, recipe.made_for),
        (compiler, program.resolve(), program.stat().st_mtime_ns, _version(compiler)),
        (platform.machine(), _c_library()),
    )
    key = hashlib.sha256(repr(made_from).encode()).hexdigest()[:16]
    try:
        return settings.cache_dir() / "native" / f"{recipe.name}-{key}.so"
    except TQError as error:
        raise Declined(f"there is no cache folder: {error.message}", error.hint) from error


def _compiler(language: str) -> list[str]:
    """$CC or $CXX, or the first compiler found, with its full path."""
    variable, names = COMPILERS[language]
    for words in [os.environ.get(variable, "").split(), *([name] for name in names)]:
        program = shutil.which(words[0]) if words else None
        if program:
            return [program, *words[1:]]
    raise Declined(
        f"no {language} compiler ({', '.join(names[:-1])} or {names[-1]}) was found",
        "install g++ (Debian and Ubuntu: apt install g++; Fedora: dnf install gcc-c++)",
    )


@functools.cache
def _version_of(command: tuple[str, ...], modified_ns: int) -> str:
    done = subprocess.run([*command, "--version"], capture_output=True, text=True, errors="replace")
    return done.stdout


def _version(compiler: list[str]) -> str:
    """What the compiler calls itself: the program at its path may be a wrapper that stays when the compiler changes."""
    try:
        return _version_of(tuple(compiler), Path(compiler[0]).stat().st_mtime_ns)
    except OSError as error:
        raise Declined(f"{compiler[0]} cannot be run: {error}") from error


def _c_library() -> str | None:
    """A library made with a newer one does not load with an older one, which a shared cache may meet."""
    with contextlib.suppress(ValueError, OSError):
        return os.confstr("CS_GNU_LIBC_VERSION")
    return None


def _compile(recipe: Recipe, compiler: list[str], path: Path) -> None:
    common = [*compiler, *recipe.flags, "-fPIC"]
    objects = [path.parent / f"{i}-{source.stem}.o" for i, source in enumerate(recipe.sources)]
    commands = [
        [*common, "-c", str(source), "-o", str(made)] for source, made in zip(recipe.sources, objects, strict=True)
    ]
    with ThreadPoolExecutor(max(2, cores.available())) as pool:
        for _ in pool.map(_run, commands):
            pass
    _run([*common, "-shared", "-o", str(path), *map(str, (*objects, *recipe.libraries))])


def _run(command: list[str]) -> None:
    environment = {**os.environ, "LC_ALL": "C"}
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", env=environment)
    except OSError as error:
        raise Declined(f"{command[0]} cannot be run: {error}") from error
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no message"]
        raise Declined(f"{command[0]} failed: {next((line for line in lines if 'error' in line), lines[0]).strip()}")


def _prune(folder: Path) -> None:
    """Removes what this module wrote for sources, compilers or machines that have not come back for a month."""
    for path in folder.iterdir():
        with contextlib.suppress(OSError):  # another process may do the same
            status = path.stat()
            if WRITTEN_HERE.fullmatch(path.name) and max(status.st_atime, status.st_mtime) < (
                time.time() - FORGOTTEN_SECONDS
            ):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
