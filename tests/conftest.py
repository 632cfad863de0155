"""What every test runs in: a home of its own, no colours, and the BLAS that commands use, before mlx is imported."""

import contextlib
import os
import tempfile

from tq import settings

_NATIVE = settings.cache_dir() / "native"  # the user's: libraries are named after all that they are made from
_HOME = tempfile.TemporaryDirectory(prefix="tq-tests-")
_KEPT = {"TQ_METAL_DEVICE", "TQ_REQUIRE_EMULATOR"}  # what Metal kernels are tested with
for name in [name for name in os.environ if name.startswith("TQ_")] + ["FORCE_COLOR", "HF_HUB_OFFLINE"]:
    if name not in _KEPT:
        os.environ.pop(name, None)
os.environ.update(
    HOME=_HOME.name,
    XDG_CACHE_HOME=os.path.join(_HOME.name, "cache"),
    XDG_CONFIG_HOME=os.path.join(_HOME.name, "config"),  # nobody's tq.toml
    HF_HOME=os.path.join(_HOME.name, "huggingface"),
    TQ_THREADS="1",  # the tests themselves run in parallel
    TQ_CPU_EXACT="1",  # most compare with a reference; those of 8-bit activations take it away
    NO_COLOR="1",
    COLUMNS="80",
)

with contextlib.suppress(OSError):  # each worker of a parallel run would compile everything for itself
    _NATIVE.mkdir(parents=True, exist_ok=True, mode=0o700)
    settings.cache_dir().mkdir(parents=True)
    (settings.cache_dir() / "native").symlink_to(_NATIVE)

from tq.cpu import blas, build, library  # noqa: E402 (the environment comes first)

blas.enable()

from tq.cpu import lazy  # noqa: E402 (it imports mlx)

library.state(), lazy.state()
build.notes()  # so that no test sees them
