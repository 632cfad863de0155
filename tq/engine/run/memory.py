"""How much memory this process takes, now and at most: MLX's arrays on a GPU, on a CPU all (weights of kernels too)."""

import contextlib
import ctypes
import gc
import resource
import sys
from pathlib import Path

import mlx.core as mx
import psutil


def on_gpu() -> bool:
    return mx.default_device() != mx.Device(mx.cpu)


def held_bytes() -> int:
    """What is taken now."""
    return mx.get_active_memory() if on_gpu() else psutil.Process().memory_info().rss


def peak_bytes() -> int:
    """The most since `start_peak`."""
    if on_gpu():
        return mx.get_peak_memory()
    with contextlib.suppress(OSError, StopIteration):
        # Not ru_maxrss there: it begins with the peak of the process that started this one.
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def start_peak() -> bool:
    """Forget earlier peaks. False where the system cannot: then the peak is that of the whole process so far."""
    if on_gpu():
        mx.reset_peak_memory()
        return True
    try:
        Path("/proc/self/clear_refs").write_text("5")  # proc(5): resets the peak resident set size
    except OSError:
        return False
    return True


def settle() -> None:
    """Give back what nobody uses, so that it does not count for what comes next."""
    gc.collect()
    mx.clear_cache()
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):  # other C libraries have no malloc_trim
            ctypes.CDLL(None).malloc_trim(0)
