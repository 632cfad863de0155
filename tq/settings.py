"""The environment variables that are no settings of tq.toml (engine/machine/settings.py), and the folders of a user."""

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
    "TQ_API_KEY": "what clients of tq serve must send",
    "TQ_DEBUG": "1: show the traceback behind an error",
}

SECRET = ("TQ_API_KEY",)  # never shown


def debug() -> bool:
    return os.environ.get("TQ_DEBUG", "") not in ("", "0")


def cpu_exact() -> bool:
    """Whether TQ_CPU_EXACT asks for float32 activations in CPU kernels. Models look when they are loaded."""
    return os.environ.get("TQ_CPU_EXACT", "") not in ("", "0")


def api_key(option: str | None) -> str | None:
    """What clients of a server must send: the option, else TQ_API_KEY, else None.

    Without the spaces and the end of a line around it (of `$(cat FILE)`), which a header cannot have.

    Raises:
        UsageError: It is empty, or has nothing but those.
    """
    name, key = ("TQ_API_KEY", os.environ.get("TQ_API_KEY")) if option is None else ("--api-key", option)
    if key is None or (option is None and key == ""):
        return None
    if not key.strip():
        raise UsageError(f"{name} is empty", hint="without it, clients need no key")
    return key.strip()


def threads() -> int | None:
    """The number of threads asked for with TQ_THREADS, or None. Raises UsageError if it is not a positive integer."""
    value = os.environ.get("TQ_THREADS")
    if not value:
        return None
    if not value.isdecimal() or int(value) == 0:
        raise UsageError(f"TQ_THREADS is {value!r}: it must be a positive number")
    return int(value)


def size_bytes(text: str) -> int:
    """Bytes of a size such as 500MB, 8GB or 0; 1 GB is 10^9 bytes. Raises UsageError if it is no size."""
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([kmgt]?)b?", text.strip().lower())
    if found is None:
        raise UsageError(f"{text!r} is no size such as 500MB, 8GB or 0")
    size = float(found[1]) * 1000 ** " kmgt".index(found[2] or " ")
    if size >= 2**63:
        raise UsageError(f"{text.strip()[:20]}... is more than any machine has")
    return int(size)


def config_file() -> Path:
    """The user's tq.toml, in $XDG_CONFIG_HOME/tq, else ~/.config/tq, on macOS too. It need not exist.

    Raises:
        TQError: This user has no home.
    """
    return _user_folder("XDG_CONFIG_HOME", ".config", "settings") / "tq.toml"


def cache_dir() -> Path:
    """What can be made again: $XDG_CACHE_HOME/tq, else ~/.cache/tq, on macOS too. Not created here.

    Raises:
        TQError: This user has no home.
    """
    return _user_folder("XDG_CACHE_HOME", ".cache", "caches")


def _user_folder(variable: str, name: str, purpose: str) -> Path:
    root = os.environ.get(variable, "")
    try:  # one that is not absolute does not count (https://specifications.freedesktop.org/basedir)
        return (Path(root) if os.path.isabs(root) else Path.home() / name) / "tq"
    except RuntimeError as error:
        raise TQError("this user has no home folder", hint=f"set {variable} to a folder for {purpose}") from error
