"""Doctor's checks: what tq finds on this machine, whether it will work, and what to do where it will not."""

import difflib
import os
import platform
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from tq import settings
from tq.cpu import blas, library
from tq.engine.machine.facts import free_disk_bytes, this_machine
from tq.engine.machine.limits import shortfalls
from tq.engine.machine.profiles import load_profile
from tq.engine.machine.settings import SETTINGS, Settings
from tq.errors import TQError

MLX_LM = ((0, 32), (0, 33))  # first version that works, first that does not, as in pyproject.toml
LITTLE_MEMORY_BYTES = 2e9
LITTLE_DISK_BYTES = 5e9


@dataclass(frozen=True)
class Finding:
    """One thing looked at. `ok` False: tq cannot work like this. `fix` says what to do, or what would be better."""

    name: str
    ok: bool
    fact: str
    fix: str | None = None


def examine(chosen: Settings) -> Iterator[Finding]:
    """All findings, in an order that puts causes before effects. None of them needs the network."""
    yield from _machine()
    for name, check in CHECKS.items():
        try:
            yield check()
        except TQError as error:  # a setting that a check reads is wrong
            yield Finding(name, False, error.message, error.hint)
    yield from _settings(chosen)


def _machine() -> Iterator[Finding]:
    machine = this_machine()
    yield Finding("system", True, machine.system)
    yield Finding("chip", True, f"{machine.chip}, {machine.cores} cores for this process")
    yield Finding(
        "memory",
        True,
        f"{machine.memory_bytes / 2**30:.1f} GiB, {machine.memory_free_bytes / 2**30:.1f} GiB free",
        "close other programs before you load a large model"
        if machine.memory_free_bytes < LITTLE_MEMORY_BYTES
        else None,
    )
    free = free_disk_bytes(Path.cwd())
    yield Finding(
        "disk",
        True,
        f"{free / 1e9:.1f} GB free here",
        "a converted model may not fit: give tq convert -o a folder on another disk"
        if free < LITTLE_DISK_BYTES
        else None,
    )


def _python() -> Finding:
    ok = sys.version_info >= (3, 11)
    return Finding("python", ok, platform.python_version(), None if ok else "install Python 3.11 or newer")


def _blas() -> Finding:
    state = blas.enable()
    slow = sys.platform == "linux" and not state.active and os.environ.get("TQ_BLAS") != "off"
    fix = "without it MLX multiplies about 50 times slower on this CPU" if slow else None
    return Finding("blas", True, state.reason, fix)


def _mlx() -> Finding:
    fix = "pip install 'tq[cpu]'" if sys.platform == "linux" else "pip install mlx"
    try:
        import mlx.core  # noqa: F401
    except ImportError as error:
        return Finding("mlx", False, f"cannot be loaded: {error}", fix)
    return Finding("mlx", True, metadata.version("mlx"))


def _device() -> Finding:
    try:
        import mlx.core as mx
    except ImportError:
        return Finding("device", False, "none without mlx")
    if mx.default_device() == mx.Device(mx.cpu):
        return Finding("device", True, "CPU; models run with float32 activations")
    info = mx.device_info()
    memory = int(info.get("max_recommended_working_set_size", 0))
    limit = f", models and caches up to {memory / 2**30:.1f} GiB" if memory else ""
    return Finding("device", True, f"{info.get('device_name', mx.default_device())}{limit}")


def _kernels() -> Finding:
    try:
        import mlx.core as mx
    except ImportError:
        return Finding("kernels", True, "none without mlx")
    if mx.default_device() != mx.Device(mx.cpu):
        return Finding("kernels", True, "tq's CPU kernels are not needed: models run on the GPU")
    state = library.state()
    if not state.active:
        slow = "models run many times slower without tq's CPU kernels"
        return Finding("kernels", True, f"none: {state.reason}", f"{slow}: {state.hint}" if state.hint else slow)
    from tq.cpu import lazy

    how = lazy.state()
    if how.active:
        return Finding("kernels", True, f"{state.reason}, {how.reason}")
    slow = "models run faster with lazy operations"
    return Finding(
        "kernels",
        True,
        f"{state.reason}, called directly: {how.reason}",
        f"{slow}: {how.hint}" if how.hint else slow,
    )


def _mlx_lm() -> Finding:
    fix = "pip install 'mlx-lm>=0.32.2,<0.33'"
    try:
        version = metadata.version("mlx-lm")
    except metadata.PackageNotFoundError:
        return Finding("mlx-lm", False, "not installed", fix)
    first, beyond = MLX_LM
    ok = first <= tuple(int(part) for part in version.split(".")[:2]) < beyond
    return Finding("mlx-lm", ok, version, None if ok else fix)


def _backends() -> Finding:
    from tq.engine import ops

    names = ", ".join(backend.name for backend in ops.BACKENDS)
    return Finding("backends", True, f"{names}; TQ_BACKEND is {ops.forced_backend()}")


def _hub() -> Finding:
    import huggingface_hub
    from huggingface_hub import constants

    token = "a token" if huggingface_hub.get_token() else "no token (public models only)"
    network = "offline (HF_HUB_OFFLINE)" if constants.HF_HUB_OFFLINE else "used when a model is asked for by name"
    return Finding("hub", True, f"{network}, {token}, models in {constants.HF_HUB_CACHE}")


def _settings(chosen: Settings) -> Iterator[Finding]:
    """The files that settings are from, what is wrong with them, and what a profile counts on and is not there."""
    variables = [name for name in sorted(os.environ) if name.startswith("TQ_")]
    sources = [*variables, *map(str, chosen.files)]
    known = [*settings.ENVIRONMENT, *(setting.variable for setting in SETTINGS)]
    unknown = [name for name in variables if name not in known]
    near = [difflib.get_close_matches(name, known, 1) for name in unknown]
    fixes = [
        f"{name} is no setting" + (f": did you mean {n[0]}?" if n else "")
        for name, n in zip(unknown, near, strict=True)
    ]
    yield Finding("settings", True, ", ".join(sources) or "no TQ_* variable and no tq.toml", ", ".join(fixes) or None)
    for mistake in chosen.mistakes:
        yield Finding("settings", False, f"{mistake.where}: {mistake.message}", mistake.hint)
    for use in (lambda: chosen.kv, lambda: chosen.recipe and load_profile(chosen.recipe)):
        try:
            use()
        except TQError as error:
            yield Finding("settings", False, error.message, error.hint)
    if chosen.profile is None:
        why = chosen.profile_reason or "none is asked for"
        yield Finding("profile", True, why)
        return
    reason = f": {chosen.profile_reason}" if chosen.profile_reason else ""
    machine = chosen.profile.values.machine
    short = shortfalls(machine) if machine else []
    fix = "; ".join(f"{one.fact}: {one.fix}" for one in short)
    yield Finding("profile", True, f"{chosen.profile.path}{reason}", fix or None)


def setting_rows(chosen: Settings) -> list[dict[str, Any]]:
    """Every setting: its name, its value, the kind of its source ("flag", "variable", ...), and where that is."""
    rows = [
        {"name": name, "value": found.value, "source": found.source, "where": found.where}
        for name, found in chosen.found.items()
    ]
    for name in settings.ENVIRONMENT:
        value = os.environ.get(name)
        if value and name in settings.SECRET:
            value = "(not shown)"
        rows.append(
            {
                "name": name,
                "value": value,
                "source": "variable" if value else "default",
                "where": name if value else "default",
            }
        )
    return rows


# BLAS before anything that imports mlx: afterwards it is too late to load it.
CHECKS: dict[str, Callable[[], Finding]] = {
    "python": _python,
    "blas": _blas,
    "mlx": _mlx,
    "mlx-lm": _mlx_lm,
    "device": _device,
    "kernels": _kernels,
    "backends": _backends,
    "hub": _hub,
}
