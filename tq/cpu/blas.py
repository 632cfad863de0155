"""Gives MLX on Linux a fast BLAS: a small library, built at first use, that leads to the OpenBLAS in NumPy's wheel.

MLX's own wheel is linked with the reference BLAS: about 2 GFLOP/s where this reaches 170 (benchmarks/blas.json). The
dynamic linker gives a symbol to whoever defined it first, so a library with cblas_sgemm that is loaded globally before
mlx.core takes its matrix products over (blas.c says how). Hence `enable` is called by every command before it imports
the engine, and by `tq.load` and its neighbours when they are first touched; `import tq` alone does nothing.
"""

import ctypes
import functools
import importlib.util
import os
import sys
from dataclasses import dataclass
from pathlib import Path

from tq.cpu import build, cores
from tq.cpu.build import Declined, Recipe

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
    wanted = cores.threads()
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


def _load(path: Path) -> ctypes.CDLL:
    library = build.load(path, ctypes.RTLD_GLOBAL)
    library.tq_blas_calls.restype = ctypes.c_long
    return library


def _build() -> Path:
    # The work is done in OpenBLAS, so any processor can have the same flags.
    return build.build(Recipe("blas", "C", (SOURCE,), flags=("-O2", "-pthread"))).path
