"""What a profile or a model counts on and this machine does not have, and what to do about it."""

import sys
from dataclasses import dataclass

from tq.engine.machine.profiles import GIB, VISIBLE_SHARE
from tq.engine.machine.tables import MachineTable

MIB = 2**20
TIGHT = 0.9  # of the limit, from which mlx-lm warns too
MOST = 0.85  # of memory: above that, macOS itself has too little (turboquant-mlx-full's planner warns there)


@dataclass(frozen=True)
class Shortfall:
    """Something that is less than it should be. `fix` says what to do."""

    fact: str
    fix: str


def shortfalls(machine: MachineTable) -> list[Shortfall]:
    """Where this machine has less than these facts of a profile say."""
    found = []
    memory = memory_bytes()
    if memory < machine.memory_gb * VISIBLE_SHARE * GIB:
        found.append(
            Shortfall(
                f"the profile is for {machine.memory_gb:g} GB of memory, and this machine has {memory / GIB:.1f}",
                "--profile auto picks one that fits",
            )
        )
    limit = gpu_limit_bytes()
    if machine.wired_limit_mb is not None and limit is not None and limit < machine.wired_limit_mb * MIB:
        found.append(
            Shortfall(
                f"the profile counts on {machine.wired_limit_mb} MB for the GPU, and macOS allows {limit // MIB}",
                f"sudo sysctl iogpu.wired_limit_mb={machine.wired_limit_mb} allows it until the next restart",
            )
        )
    return found


def tight(weights_bytes: int) -> Shortfall | None:
    """Said of weights that leave the GPU little or no memory for anything else: macOS pages what is above its limit."""
    limit = gpu_limit_bytes()
    if limit is None or weights_bytes <= TIGHT * limit:
        return None
    most = int(MOST * memory_bytes())
    fits = limit < most and weights_bytes <= TIGHT * most
    return Shortfall(
        f"the weights take {weights_bytes / MIB:.0f} MB, and macOS allows the GPU {limit // MIB}: it may be slow",
        f"sudo sysctl iogpu.wired_limit_mb={most // MIB} allows more until the next restart"
        if fits
        else "fewer bits make the model smaller (tq convert --bits)",
    )


def memory_bytes() -> int:
    """All memory of this machine."""
    import psutil

    return psutil.virtual_memory().total


def gpu_limit_bytes() -> int | None:
    """What macOS lets the GPU keep in memory, which `iogpu.wired_limit_mb` raises; None on other systems."""
    if sys.platform == "darwin":
        import mlx.core as mx

        return int(mx.device_info().get("max_recommended_working_set_size", 0)) or None
    return None
