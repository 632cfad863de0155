"""The products, compiled for every instruction set that can be run here or emulated, against doubles.

The programs are kept in pytest's cache, since a sanitizer makes compiling slow.
"""

import hashlib
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tq.cpu import isa, library

PROGRAM = Path(__file__).with_name("products.cpp")
SOURCES = ["activations", "decode", "exact", "gather", "matmul", "matvec", "panel", "pool"]
FLAGS = ["-std=c++20", "-Wall", "-Wextra", "-Werror", "-pthread", "-fopenmp-simd", "-ffp-contract=fast", "-fno-math-errno"]
# Without the checks that cost most time to compile; addresses are checked anyway.
SANITIZE = ["-g", "-fsanitize=address,undefined", "-fno-sanitize=null,object-size,vptr", "-fno-sanitize-recover=all"]
RUNNABLE = [level for level in isa.LEVELS if not isa.lacking(level)]
COMPILERS = ["c++", "g++", "clang++"]
CROSS_COMPILERS, EMULATORS = ["aarch64-linux-gnu-g++"], ["qemu-aarch64-static", "qemu-aarch64"]


def found(names: list[str]) -> str:
    """The first of some programs that is installed, or the test is skipped."""
    for name in names:
        if path := shutil.which(name):
            return path
    pytest.skip(f"{names[0]} is not installed")


def compiled(request: pytest.FixtureRequest, name: str, compiler: str, flags: list[str]) -> Path:
    """The test program, made now or by an earlier run."""
    files = [PROGRAM, *(library.KERNELS / f"{source}.cpp" for source in SOURCES)]
    command = [compiler, *FLAGS, *flags, f"-I{library.KERNELS}"]
    headers = sorted(library.KERNELS.glob("*.h"))
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout
    made_from = repr((command, version, [file.read_text() for file in (*files, *headers)]))
    folder = request.config.cache.mkdir("tq-products")
    path = folder / f"{name}-{hashlib.sha256(made_from.encode()).hexdigest()[:16]}"
    if path.exists():
        return path
    for old in folder.glob(f"{name}-*"):
        shutil.rmtree(old) if old.is_dir() else old.unlink()
    objects = folder / f"{path.name}.{os.getpid()}"
    objects.mkdir()
    jobs = [
        subprocess.Popen(
            [*command, "-c", str(file), "-o", str(objects / f"{file.stem}.o")], stderr=subprocess.PIPE, text=True
        )
        for file in files
    ]
    messages = [job.communicate()[1] for job in jobs]
    assert not any(job.returncode for job in jobs), "".join(messages)
    made = objects / "program"
    subprocess.run([*command, *map(str, sorted(objects.glob("*.o"))), "-o", str(made)], check=True)
    os.replace(made, path)
    shutil.rmtree(objects)
    return path


def run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=240)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    assert done.stdout.endswith("0 failures\n")


@pytest.mark.parametrize("level", RUNNABLE, ids=lambda level: level.name)
def test_products_with_each_instruction_set(request, level):
    run([str(compiled(request, level.name, found(COMPILERS), ["-O1", *level.flags]))])


def test_products_touch_nothing_beyond_their_arrays(request):
    level = RUNNABLE[0]
    run([str(compiled(request, f"sanitized-{level.name}", found(COMPILERS), ["-O1", *SANITIZE, *level.flags]))])


def test_products_on_an_emulated_arm_processor(request):
    emulator = found(EMULATORS)
    flags = ["-O1", "-static", *isa.LEVEL["neon"].flags]
    run([emulator, str(compiled(request, "neon", found(CROSS_COMPILERS), flags))])


def test_what_cannot_be_run_here_compiles(request):
    if os.uname().machine not in isa.LEVEL["avx2vnni"].machines:
        pytest.skip("the compiler is for another processor")
    compiled(request, "avx2vnni", found(COMPILERS), ["-O1", *isa.LEVEL["avx2vnni"].flags])
