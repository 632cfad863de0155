"""Products and attention, compiled for every instruction set that can be run here or emulated, against doubles.

Programs are kept in pytest's cache: compiling them takes most of the time.
"""

import hashlib
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tq.cpu import isa, library

# A program beside this file, and the kernels that it checks.
PROGRAMS = {
    "products": ["activations", "decode", "exact", "gather", "machine", "matmul", "matvec", "panel", "pool"],
    "caches": [
        "activations", "attention", "attention_float", "attention_op", "attention_packed", "attention_rows",
        "attention_unpack", "kv_append", "kv_encode", "pack", "pool", "rotate",
    ],
}  # fmt: skip
FLAGS = ["-std=c++20", "-O1", "-Wall", "-Wextra", "-Werror", "-pthread", "-fopenmp-simd", "-ffp-contract=fast"]
SANITIZE = [
    "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all",
    "-fno-sanitize=null,object-size,vptr", "-fno-sanitize-address-use-after-scope",  # they take minutes to compile
]  # fmt: skip
COMPILERS, CROSS_COMPILERS = ["c++", "g++", "clang++"], ["aarch64-linux-gnu-g++"]
EMULATORS = ["qemu-aarch64-static", "qemu-aarch64"]
RUNNABLE = [level for level in isa.LEVELS if not isa.lacking(level)]


def found(names: list[str]) -> str:
    """The first of some programs that is installed, or the test is skipped."""
    for name in names:
        if path := shutil.which(name):
            return path
    pytest.skip(f"{names[0]} is not installed")


def with_included(files: list[Path]) -> dict[Path, str]:
    """The text of files and of the kernels' headers that they include, directly or not."""
    texts: dict[Path, str] = {}
    pending = list(files)
    while pending:
        file = pending.pop()
        if file not in texts:
            texts[file] = file.read_text()
            pending += [library.KERNELS / name for name in re.findall(r'#include "(.+)"', texts[file])]
    return texts


def objects(command: list[str], files: list[Path], folder: Path) -> list[str]:
    """Compiles all files at once."""
    made = [str(folder / f"{file.stem}.o") for file in files]
    jobs = [
        subprocess.Popen([*command, "-c", str(file), "-o", to], stderr=subprocess.PIPE, text=True)
        for file, to in zip(files, made, strict=True)
    ]
    messages = [job.communicate()[1] for job in jobs]
    assert not any(job.returncode for job in jobs), "".join(messages)
    return made


@pytest.fixture(params=PROGRAMS)
def source(request: pytest.FixtureRequest) -> str:
    return request.param


def program(request: pytest.FixtureRequest, source: str, level: str, compiler: str, flags: list[str]) -> str:
    """A test program, made now or by an earlier run."""
    name = f"{source}-{level}"
    files = [Path(__file__).with_name(f"{source}.cpp"), *(library.KERNELS / f"{n}.cpp" for n in PROGRAMS[source])]
    command = [compiler, *FLAGS, *flags, f"-I{library.KERNELS}"]
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout
    texts = with_included([*files, *Path(__file__).parent.glob("*.h")])
    made_from = repr((command, version, sorted(texts.items())))
    folder = request.config.cache.mkdir("tq-programs")
    path = folder / f"{name}-{hashlib.sha256(made_from.encode()).hexdigest()[:16]}"
    if not path.exists():
        for old in folder.glob(f"{name}-*"):
            shutil.rmtree(old) if old.is_dir() else old.unlink()
        work = folder / f"{path.name}.{os.getpid()}"
        work.mkdir()
        subprocess.run([*command, *objects(command, files, work), "-o", str(work / "program")], check=True)
        os.replace(work / "program", path)
        shutil.rmtree(work)
    return str(path)


def run(command: list[str]) -> str:
    """What a program says whose checks all pass."""
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=240)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    assert done.stdout.endswith("0 failures\n")
    return done.stdout


def test_no_array_is_left(request, source):
    level = RUNNABLE[0]
    run([program(request, source, f"sanitized-{level.name}", found(COMPILERS), [*SANITIZE, *level.flags])])


@pytest.mark.parametrize("level", RUNNABLE[1:], ids=lambda level: level.name)
def test_lesser_instruction_sets_of_this_processor(request, source, level):
    run([program(request, source, level.name, found(COMPILERS), [*level.flags])])


def test_an_emulated_arm_processor(request, source):
    emulator, compiler = found(EMULATORS), found(CROSS_COMPILERS)
    run([emulator, program(request, source, "neon", compiler, ["-static", *isa.LEVEL["neon"].flags])])


@pytest.fixture
def emulated(request: pytest.FixtureRequest) -> str:
    """The program that checks products, for AMX with tile registers in plain C++."""
    if isa.lacking(isa.LEVEL["avx512"]):
        pytest.skip("AMX needs AVX512 around it")
    flags = [flag for flag in isa.LEVEL["amx"].flags if not flag.startswith("-mamx")]
    flags += ['-DTQ_TILES="emulated_tiles.h"', f"-I{Path(__file__).parent}"]
    return program(request, "products", "amx-emulated", found(COMPILERS), flags)


def test_emulated_tiles_give_the_results_of_avx512_bit_for_bit(request, emulated):
    plain = run([program(request, "products", "avx512", found(COMPILERS), [*isa.LEVEL["avx512"].flags])])
    assert run([emulated]) == plain
    assert re.fullmatch(r"results [0-9a-f]{16}\n0 failures\n", plain)


@pytest.mark.parametrize(
    ("tiles", "says"),
    [
        ("wrong", "the tile unit gives other products than plain arithmetic"),
        ("denied", "the system does not let this process use the tile registers"),
    ],
)
def test_tiles_that_do_not_work_are_found_before_they_are_used(emulated, tiles, says):
    environment = {**os.environ, "EMULATED_TILES": tiles}
    done = subprocess.run([emulated], capture_output=True, text=True, timeout=240, env=environment)
    assert (done.returncode, done.stdout) == (1, f"{says}\n")


@pytest.mark.parametrize(
    "level", [isa.LEVEL[name] for name in ("amx", "avx512", "avx2vnni")], ids=lambda level: level.name
)
def test_what_this_processor_lacks_compiles(request, source, level):
    if not isa.lacking(level):
        pytest.skip("this processor has it")
    if os.uname().machine not in level.machines:
        pytest.skip("the compiler is for another processor")
    program(request, source, level.name, found(COMPILERS), [*level.flags])
