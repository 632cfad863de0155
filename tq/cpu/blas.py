"""Gives MLX on Linux a fast BLAS: a small library, built at first use, that leads to the OpenBLAS in NumPy's wheel.

MLX's own wheel is linked with the reference BLAS: about 2 GFLOP/s where this reaches 170 (benchmarks/blas.json). The
dynamic linker gives a symbol to whoever defined it first, so a library with cblas_sgemm that is loaded globally before
mlx.core takes its matrix products over (blas.c says how). Hence `enable` is called by every command before it imports
the engine, and by `tq.load` and its neighbours when they are first touched; `import tq` alone does nothing.
"""

import ctypes
import fcntl
import functools
import hashlib
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from tq import settings
from tq.errors import TQError

SOURCE = Path(__file__).with_name("blas.c")
FUNCTIONS = (
    "scipy_openblas_set_num_threads64_",
    "scipy_cblas_sgemm64_",
    "scipy_cblas_sgemv64_",
    "scipy_cblas_dgemm64_",
    "scipy_cblas_dgemv64_",
)


@dataclass(frozen=True)
class BlasState:
    """Whether MLX's matrix products go to OpenBLAS, and why or why not."""

    active: bool
    reason: str


class Declined(Exception):
    """Why MLX keeps the BLAS that it has."""


@functools.cache
def enable() -> BlasState:
    """Puts OpenBLAS under MLX where that is possible; the first call in a process decides.

    Raises:
        UsageError: TQ_THREADS is not a positive number.
    """
    try:
        return BlasState(True, _enable())
    except Declined as declined:
        return BlasState(False, str(declined))


def calls() -> int:
    """How many matrix products of this process went to OpenBLAS."""
    return _load(_build()).tq_blas_calls() if enable().active else 0


def _enable() -> str:
    if sys.platform != "linux":
        raise Declined("not needed: MLX uses the BLAS of this system")
    if os.environ.get("TQ_BLAS") == "off":
        raise Declined("switched off by TQ_BLAS=off")
    if "mlx.core" in sys.modules:
        raise Declined("mlx was imported before tq could load a faster BLAS")
    openblas = _open_openblas()
    library = _load(_build())
    wanted = _threads()
    numpy_threads = min(wanted, openblas.scipy_openblas_get_num_threads64_())
    functions = [ctypes.cast(getattr(openblas, name), ctypes.c_void_p) for name in FUNCTIONS]
    threads = library.tq_blas_init(wanted, numpy_threads, *functions)
    return f"OpenBLAS from NumPy's wheel, {threads} thread{'s' if threads > 1 else ''}"


def _open_openblas() -> ctypes.CDLL:
    spec = importlib.util.find_spec("numpy")
    if spec is None or spec.origin is None:
        raise Declined("NumPy is not installed")
    libraries = sorted(Path(spec.origin).parents[1].glob("numpy.libs/libscipy_openblas64_*.so*"))
    if not libraries:
        raise Declined("this NumPy does not bring its own OpenBLAS")
    try:
        openblas = ctypes.CDLL(str(libraries[0]))
        for name in FUNCTIONS:
            getattr(openblas, name)
    except (OSError, AttributeError) as error:
        raise Declined(f"the OpenBLAS of this NumPy cannot be used: {error}") from error
    return openblas


def _threads() -> int:
    """TQ_THREADS, or one for each core that this process may run on."""
    return settings.threads() or len(os.sched_getaffinity(0))


def _load(path: Path) -> ctypes.CDLL:
    try:
        library = ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
    except OSError as error:
        raise Declined(f"the built library cannot be loaded: {error}") from error
    library.tq_blas_calls.restype = ctypes.c_long
    return library


@functools.cache
def _build() -> Path:
    """The library in the cache, compiled if this source and this compiler have not made it yet."""
    compiler = _compiler()
    program = Path(compiler[0])
    made_from = (SOURCE.read_bytes(), compiler, program.resolve(), program.stat().st_mtime_ns, platform.machine())
    key = hashlib.sha256(repr(made_from).encode()).hexdigest()[:16]
    try:
        path = settings.cache_dir() / "native" / f"blas-{key}.so"
    except TQError as error:
        raise Declined(f"there is no cache folder: {error.message}") from error
    if path.exists():
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        # The lock keeps two first uses from compiling twice; the rename keeps anyone from seeing half a file.
        with open(path.with_suffix(".lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not path.exists():
                with tempfile.TemporaryDirectory(dir=path.parent) as folder:
                    made = Path(folder) / path.name
                    _compile(compiler, made)
                    made.rename(path)
    except OSError as error:
        raise Declined(f"the cache cannot be written: {error}") from error
    return path


def _compile(compiler: list[str], path: Path) -> None:
    # No -march=native: a cache on a shared home is read by other processors, and the work is done in OpenBLAS.
    command = [*compiler, "-O2", "-shared", "-fPIC", "-pthread", "-o", str(path), str(SOURCE)]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    if done.returncode:
        raise Declined(f"{compiler[0]} failed: {(done.stderr.strip() or 'no message').splitlines()[0]}")


def _compiler() -> list[str]:
    """$CC, or the first C compiler found, with its full path."""
    for words in [os.environ.get("CC", "").split(), ["cc"], ["gcc"], ["clang"]]:
        program = shutil.which(words[0]) if words else None
        if program:
            return [program, *words[1:]]
    raise Declined("no C compiler (cc, gcc or clang) was found")
