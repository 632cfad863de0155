"""Where settings come from: the environment variables that tq reads, listed once, and the folders it may write to."""

import os
import re
from pathlib import Path

from tq.errors import TQError, UsageError

ENVIRONMENT = {
    "TQ_BACKEND": "auto, or the one backend that may run operations on packed weights",
    "TQ_BLAS": "off: leave MLX on Linux with the matrix products of its own wheel",
    "TQ_THREADS": "threads for native CPU code (default: the physical cores this process may use)",
    "TQ_CPU_ISA": "the one instruction set to build CPU kernels for: avx512, avx2vnni, avx2, neon or generic",
    "TQ_CPU_EXACT": "1: CPU kernels compute with float32 activations instead of 8-bit ones (slower)",
    "TQ_PROMPT_CACHE": "disk space for prompts that tq chat has read, such as 500MB or 8GB; 0: none (default: 2GB)",
    "TQ_DEBUG": "1: show the traceback behind an error",
}


def debug() -> bool:
    return os.environ.get("TQ_DEBUG", "") not in ("", "0")


def cpu_exact() -> bool:
    """Whether TQ_CPU_EXACT asks for float32 activations in CPU kernels. Models look when they are loaded."""
    return os.environ.get("TQ_CPU_EXACT", "") not in ("", "0")


def threads() -> int | None:
    """The number of threads asked for with TQ_THREADS, or None. Raises UsageError if it is not a positive integer."""
    value = os.environ.get("TQ_THREADS")
    if not value:
        return None
    if not value.isdecimal() or int(value) == 0:
        raise UsageError(f"TQ_THREADS is {value!r}: it must be a positive number")
    return int(value)


def prompt_cache_bytes(option: str | None = None) -> int:
    """Bytes of disk for prompts: the option, else TQ_PROMPT_CACHE, else 2 GB. Raises UsageError if it is no size."""
    name, value = (
        ("TQ_PROMPT_CACHE", os.environ.get("TQ_PROMPT_CACHE")) if option is None else ("--prompt-cache", option)
    )
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([kmgt]?)b?", (value or "2GB").strip().lower())
    if found is None:
        raise UsageError(f"{name} is {value!r}: it must be a size such as 500MB or 8GB, or 0")
    return int(float(found[1]) * 1000 ** " kmgt".index(found[2] or " "))


def cache_dir() -> Path:
    """What can be made again: $XDG_CACHE_HOME/tq, else ~/.cache/tq, on macOS too. Not created here.

    Raises:
        TQError: This user has no home.
    """
    root = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(root) if root else Path.home() / ".cache") / "tq"
    except RuntimeError as error:
        raise TQError("this user has no home folder", hint="set XDG_CACHE_HOME to a folder for caches") from error
