"""What every test runs in: a home of its own, no colours, and the BLAS that commands use, before mlx is imported."""

import os
import tempfile

_HOME = tempfile.TemporaryDirectory(prefix="tq-tests-")
for name in [name for name in os.environ if name.startswith("TQ_")] + ["FORCE_COLOR", "HF_HUB_OFFLINE"]:
    os.environ.pop(name, None)
os.environ.update(
    HOME=_HOME.name,
    XDG_CACHE_HOME=os.path.join(_HOME.name, "cache"),
    HF_HOME=os.path.join(_HOME.name, "huggingface"),
    TQ_THREADS="1",  # the tests themselves run in parallel
    NO_COLOR="1",
    COLUMNS="80",
)

from tq.cpu import blas  # noqa: E402 (the environment comes first)

blas.enable()
