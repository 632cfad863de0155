"""The compiler, from the ziglang wheel, and the cache of what it has compiled.

`zig clang -cc1` is clang's front end, which knows C++ for OpenCL; `zig ld.lld` is the linker. A file in the cache is
named after everything that it is made from, and appears there complete.
"""

import contextlib
import functools
import hashlib
import importlib.util
import os
import platform
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from tq import settings
from tq.cpu import build

from . import lowering

FOLDER = Path(__file__).parent
FORGOTTEN_SECONDS = 30 * 86400
_MACHINES = {"x86_64": ["-target-cpu", "x86-64-v3"], "aarch64": []}  # v3 has conversions of half
_EXTENSIONS = [  # clang's own choice depends on the machine
    "+__cl_clang_function_pointers",
    "+__cl_clang_non_portable_kernel_param_types",
    "-__opencl_c_pipes",
    "-__opencl_c_device_enqueue",
    "-__opencl_c_program_scope_global_variables",
    "+cl_khr_fp16",
    "-cl_khr_fp64",
    "-__opencl_c_fp64",
]
_WARNINGS = [
    "-Wall",
    "-Wextra",
    *("-Wno-double-promotion", "-Wno-missing-field-initializers", "-Wno-pass-failed", "-Wno-unknown-attributes"),
    *("-Wno-unknown-pragmas", "-Wno-unused-local-typedefs", "-Wno-unused-parameter", "-Wno-unused-variable"),
]


def unavailable() -> str | None:
    """Why nothing can be emulated here, or None."""
    if platform.system() != "Linux" or platform.machine() not in _MACHINES:
        this = f"{platform.system()} on {platform.machine()}"
        return f"the Metal emulator runs on Linux on x86-64 and aarch64, this is {this}"
    if zig() is None:
        return "the Metal emulator needs clang from the ziglang wheel: pip install ziglang"
    try:
        runtime()
    except build.Declined as declined:
        return f"the Metal emulator's runtime cannot be compiled: {declined}"
    return None


@functools.cache
def zig() -> Path | None:
    specification = importlib.util.find_spec("ziglang")
    if specification is None or specification.origin is None:
        return None
    program = Path(specification.origin).parent / "zig"
    return program if program.exists() else None


@functools.cache
def compiler_version() -> str:
    return subprocess.run([str(zig()), "clang", "-cc1", "-version"], capture_output=True, text=True).stdout


def runtime() -> Path:
    """The shared library that kernels run in.

    Raises:
        tq.cpu.build.Declined: There is no C++ compiler, or it fails.
    """
    sources = tuple(sorted(FOLDER.glob("runtime/*.cpp")))
    headers = tuple(sorted(FOLDER.glob("runtime/*.h")))
    return build.build(build.Recipe("metal-emulator", "C++", sources, headers, ("-O2", "-std=c++17"))).path


def target() -> list[str]:
    machine = platform.machine()
    return ["-triple", f"{machine}-unknown-linux-gnu", *_MACHINES[machine]]


def front_end(generic_address_space: bool) -> list[str]:
    """A command for Metal text, without its input: `-include-pch` has the prelude.

    Without the generic address space, a pointer that names no space is one into thread memory.
    """
    return list(_front_end(generic_address_space))


@functools.cache
def _front_end(generic_address_space: bool) -> tuple[str, ...]:
    extensions = [("+" if generic_address_space else "-") + "__opencl_c_generic_address_space", *_EXTENSIONS]
    options = ["-cl-std=clc++2021", "-cl-ext=" + ",".join(extensions), *target(), "-ferror-limit", "0", *_WARNINGS]
    prelude = _prelude(tuple(options), with_errors=not generic_address_space)
    return ("-x", "clcpp", *options, "-fno-validate-pch", "-include-pch", str(prelude))


def compile(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    """Runs clang's front end; the caller looks at the outcome."""
    return subprocess.run([str(zig()), "clang", "-cc1", *arguments], capture_output=True, text=True, errors="replace")


def link(object_file: Path, library: Path) -> None:
    subprocess.run([str(zig()), "ld.lld", "-shared", "-o", str(library), str(object_file)], check=True)


@functools.cache
def _prelude(options: tuple[str, ...], with_errors: bool) -> Path:
    """The precompiled prelude. Its text stays beside it, for clang to quote from.

    Without the generic address space, MLX's complex numbers don't compile: `with_errors`, the rest still serves.
    """
    allowance = ["-fallow-pch-with-compiler-errors"] if with_errors else []

    def write(folder: Path, path: Path) -> None:
        path.write_text(lowering.prelude())

    def precompile(folder: Path, path: Path) -> None:
        done = compile(["-x", "clcpp-header", *options, *allowance, "-emit-pch", str(text), "-o", str(path)])
        if not path.exists():
            raise RuntimeError(f"the prelude of the Metal emulator does not compile:\n{done.stderr}")

    text = cached("prelude", ".h", lowering.prelude(), write)
    return cached("prelude", ".pch", (str(text), lowering.prelude(), options), precompile)


@functools.cache
def _folder() -> Path:
    """Where compiled things are kept; removes what nobody used for a month."""
    folder = settings.cache_dir() / "native" / "metal-emulator"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    folder = folder.resolve()  # tests link to it from a home that goes away
    for path in folder.iterdir():
        with contextlib.suppress(OSError):  # another process may do the same
            status = path.stat()
            if path.is_file() and max(status.st_atime, status.st_mtime) < time.time() - FORGOTTEN_SECONDS:
                path.unlink()
    return folder


def cached(name: str, suffix: str, made_from: object, make: Callable[[Path, Path], None]) -> Path:
    """A file of the cache; if it is missing, `make(folder, path)` makes it at `path`, with `folder` for other files."""
    key = hashlib.sha256(repr((made_from, compiler_version(), target())).encode()).hexdigest()[:20]
    path = _folder() / f"{name}-{key}{suffix}"
    if not path.exists():
        with tempfile.TemporaryDirectory(prefix="making-", dir=_folder()) as folder:
            made = Path(folder) / path.name
            make(Path(folder), made)
            os.replace(made, path)  # nobody sees half a file; who was second replaces it by its equal
    return path
