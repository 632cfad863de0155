"""Machines to plan for: the Macs that there are, by name, and this one. What a model may take there, and how fast
memory is read."""

import difflib
import re
from dataclasses import dataclass

from tq.errors import UsageError

THIS = "this"
GIB = 2**30
MEASUREMENTS = 3  # of bandwidth, a tenth of a second each
# GB/s of memory, and the sizes in GB that each chip is sold with, by Apple's technical specifications
# (support.apple.com/docs/mac, apple.com/newsroom). Where a chip has two memory buses, sizes tell them apart: the M3 Max
# with 36 and 96 GB, the M4 Max and the M5 Max with 36 GB.
_CHIPS: dict[str, dict[int, float]] = {
    "m1": dict.fromkeys((8, 16), 68.25),
    "m1-pro": dict.fromkeys((16, 32), 200.0),
    "m1-max": dict.fromkeys((32, 64), 400.0),
    "m1-ultra": dict.fromkeys((64, 128), 800.0),
    "m2": dict.fromkeys((8, 16, 24), 100.0),
    "m2-pro": dict.fromkeys((16, 32), 200.0),
    "m2-max": dict.fromkeys((32, 64, 96), 400.0),
    "m2-ultra": dict.fromkeys((64, 128, 192), 800.0),
    "m3": dict.fromkeys((8, 16, 24), 100.0),
    "m3-pro": dict.fromkeys((18, 36), 150.0),
    "m3-max": dict.fromkeys((36, 96), 300.0) | dict.fromkeys((48, 64, 128), 400.0),
    "m3-ultra": dict.fromkeys((96, 256, 512), 819.0),
    "m4": dict.fromkeys((16, 24, 32), 120.0),
    "m4-pro": dict.fromkeys((24, 48, 64), 273.0),
    "m4-max": {36: 410.0} | dict.fromkeys((48, 64, 128), 546.0),
    "m5": dict.fromkeys((16, 24, 32), 153.0),
    "m5-pro": dict.fromkeys((24, 48, 64), 307.0),
    "m5-max": {36: 460.0} | dict.fromkeys((48, 64, 128), 614.0),
}
# The share of memory that macOS 15 and later let the GPU take unless iogpu.wired_limit_mb says otherwise, up to so many
# GB: Metal's recommendedMaxWorkingSetSize as people's logs of llama.cpp show it (12713.12 MB of 16 GiB, 19069.67 of 24,
# 26800.60 of 32, 30150.67 of 36, 40200.90 of 48, 55662.79 of 64, 115448.73 of 128; 96 GB as 64, nobody showed one).
# macOS 14 gave two thirds, and three quarters from 36 GB on.
_GPU_SHARES = ((8, 2 / 3), (24, 0.74), (48, 0.78), (96, 0.81))
_LARGEST_SHARE = 0.84


@dataclass(frozen=True)
class Target:
    """A machine to plan for.

    Attributes:
        name: ``m4-16gb``, or ``this``.
        chip: For people.
        memory_bytes: All of it.
        gpu_bytes: What the GPU may take now; None where models run on the CPU.
        bandwidth_gb_s: At which memory is read; None if nobody knows.
        measured: Whether that was measured here, and is no maker's number.
        free_bytes: What programs can have now without swapping; None for a machine that is not this one.
    """

    name: str
    chip: str
    memory_bytes: int
    gpu_bytes: int | None
    bandwidth_gb_s: float | None
    measured: bool = False
    free_bytes: int | None = None


def names() -> list[str]:
    """Every Mac that `find` knows, by age and size."""
    return [f"{chip}-{size}gb" for chip, sizes in _CHIPS.items() for size in sizes]


def find(name: str) -> Target:
    """A machine by its name.

    Raises:
        UsageError: There is none of that name.
    """
    wanted = name.strip().lower().replace("_", "-").replace(" ", "-")
    if wanted == THIS:
        return this_target()
    found = re.fullmatch(r"(m\d+(?:-(?:pro|max|ultra))?)-(\d{1,4})(?:gb)?", wanted)
    if found is None or found[1] not in _CHIPS:
        near = difflib.get_close_matches(wanted, names(), 3)
        raise UsageError(
            f"--hardware {name!r} is none that tq knows: {THIS}, or a chip ({', '.join(_CHIPS)}) with its memory",
            f"did you mean {' or '.join(near)}?" if near else "for example --hardware m4-16gb",
        )
    chip, size = found[1], int(found[2])
    if size not in _CHIPS[chip]:
        sizes = ", ".join(map(str, _CHIPS[chip]))
        message = f"--hardware {name!r}: the {_title(chip)} is sold with {sizes} GB"
        raise UsageError(message, f"for example {chip}-{min(_CHIPS[chip])}gb")
    memory = size * GIB
    return Target(f"{chip}-{size}gb", f"Apple {_title(chip)}", memory, gpu_default(memory), _CHIPS[chip][size])


def gpu_default(memory_bytes: int) -> int:
    """What macOS lets the GPU of a Mac with so much memory take, in bytes."""
    size = memory_bytes / GIB
    return int(memory_bytes * next((share for most, share in _GPU_SHARES if size <= most), _LARGEST_SHARE))


def this_target() -> Target:
    """This machine, with the limit of its GPU as it is set now and the bandwidth that it was measured to have."""
    import mlx.core as mx

    from tq.engine.machine.facts import this_machine
    from tq.engine.ops.selftest import read_bandwidth

    facts = this_machine()
    on_gpu = mx.default_device() != mx.Device(mx.cpu)
    limit = int(mx.device_info().get("max_recommended_working_set_size", 0)) if on_gpu else 0
    # The best of some: other programs only make it less.
    rates = [rate for rate in (read_bandwidth() for _ in range(MEASUREMENTS)) if rate is not None]
    bandwidth = max(rates, default=None)
    return Target(
        THIS, facts.chip, facts.memory_bytes, limit or None, bandwidth, bandwidth is not None, facts.memory_free_bytes
    )


def _title(chip: str) -> str:
    return chip.replace("-", " ").title()
