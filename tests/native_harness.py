"""Internals of the kernels that tests call directly: cpu/harness.cpp, compiled together with the thread pool."""

import ctypes
import functools
from ctypes import c_char_p, c_double, c_float, c_int, c_int64, c_void_p
from pathlib import Path

from tq.cpu import build, isa, library

SOURCE = Path(__file__).parent / "cpu" / "harness.cpp"
FUNCTIONS = {
    "check_regions": (c_int, [c_int, c_int, c_int]),
    "region_parts": (c_int, []),
    "nested_parts": (c_int, []),
    "meet": (None, []),
    "scratch_is_aligned_and_kept": (c_int, [c_int64]),
    "exps": (None, [c_void_p, c_void_p, c_int]),
    "gated": (None, [c_int, c_float, c_float, c_void_p, c_void_p, c_void_p, c_int]),
    "rms_norm": (None, [c_void_p, c_void_p, c_float, c_int, c_void_p]),
    "softmax": (c_float, [c_void_p, c_int]),
    "tq_set_threads": (None, [c_int]),
    "tq_get_threads": (c_int, []),
    "tq_read_bandwidth": (c_double, [c_int64]),
    "tq_isa": (c_char_p, []),
    "tq_struct_size": (c_int, [c_char_p]),
}
# The levels that this processor can run.
LEVELS = [level for level in isa.LEVELS if not isa.lacking(level)]


@functools.cache
def harness_path(level: isa.Level) -> Path:
    kernels = library.KERNELS
    sources = (SOURCE, kernels / "pool.cpp", kernels / "machine.cpp")
    flags = (*library.FLAGS, *level.flags, f"-I{kernels}")
    recipe = build.Recipe(f"harness-{level.name}", "C++", sources, tuple(sorted(kernels.glob("*.h"))), flags)
    return build.build(recipe).path


@functools.cache
def harness(level: isa.Level) -> ctypes.CDLL:
    loaded = build.load(harness_path(level))
    for name, (result, arguments) in FUNCTIONS.items():
        function = getattr(loaded, name)
        function.restype, function.argtypes = result, arguments
    return loaded
