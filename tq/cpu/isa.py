"""The instruction sets that the kernels are compiled for, and which of them this processor has."""

import functools
import os
import platform
from dataclasses import dataclass
from pathlib import Path

from tq.errors import UsageError

CPUINFO = Path("/proc/cpuinfo")


@dataclass(frozen=True)
class Level:
    """One instruction set.

    Attributes:
        machines: What platform.machine() may say; empty: anything.
        features: What the processor must have, by the kernel's names in /proc/cpuinfo.
        flags: For the compiler. Never -march=native: other processors may read the same cache.
        on_trial: Whether it may turn out that a compiler, the system or a self-check does not allow it; then the next
            level serves.
    """

    name: str
    machines: tuple[str, ...]
    features: frozenset[str]
    flags: tuple[str, ...]
    on_trial: bool = False


X86 = ("x86_64", "AMD64")
ARM = ("aarch64", "arm64")
AVX2 = frozenset({"avx2", "fma", "f16c"})
AVX512 = AVX2 | {"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_vnni", "avx512vbmi"}
AVX2_FLAGS = ("-DTQ_ISA_AVX2", "-mavx2", "-mfma", "-mf16c")
AVX512_FLAGS = (
    "-DTQ_ISA_AVX512", "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vnni", "-mavx512vbmi", "-mfma",
    "-mf16c", "-mprefer-vector-width=512",
)  # fmt: skip
AMX_FLAGS = (*AVX512_FLAGS, "-DTQ_ISA_AMX", "-mamx-tile", "-mamx-int8")
# Best first.
LEVELS = (
    Level("amx", X86, AVX512 | {"amx_tile", "amx_int8"}, AMX_FLAGS, on_trial=True),
    Level("avx512", X86, AVX512, AVX512_FLAGS),
    Level("avx2vnni", X86, AVX2 | {"avx_vnni"}, (*AVX2_FLAGS, "-mavxvnni")),
    Level("avx2", X86, AVX2, AVX2_FLAGS),
    Level("neon", ARM, frozenset({"asimd", "asimddp", "asimdhp"}), ("-DTQ_ISA_NEON", "-march=armv8.2-a+dotprod+fp16")),
    Level("generic", (), frozenset(), ("-DTQ_ISA_GENERIC",)),
)
LEVEL = {level.name: level for level in LEVELS}


def chosen() -> list[Level]:
    """The level that TQ_CPU_ISA asks for, else all that this processor has, best first.

    Raises:
        UsageError: TQ_CPU_ISA is no level, or needs what this processor lacks.
    """
    name = os.environ.get("TQ_CPU_ISA")
    if not name:
        return [level for level in LEVELS if not lacking(level)]
    if name not in LEVEL:
        raise UsageError(f"TQ_CPU_ISA is {name!r}: it must be one of {', '.join(LEVEL)}")
    missing = lacking(LEVEL[name])
    if missing:
        usable = ", ".join(level.name for level in LEVELS if not lacking(level))
        raise UsageError(
            f"TQ_CPU_ISA is {name}, but this processor lacks {', '.join(missing)}", hint=f"it has {usable}"
        )
    return [LEVEL[name]]


def lacking(level: Level) -> list[str]:
    """What a level needs and this processor does not have."""
    if level.machines and platform.machine() not in level.machines:
        return [f"the instructions of {level.machines[0]}"]
    return sorted(level.features - features())


@functools.cache
def features() -> frozenset[str]:
    """What every processor of this machine has, by the names of /proc/cpuinfo; empty where that cannot be read."""
    try:
        lines = CPUINFO.read_text().splitlines()
    except OSError:
        return frozenset()
    found = [frozenset(line.partition(":")[2].split()) for line in lines if line.startswith(("flags", "Features"))]
    return frozenset.intersection(*found) if found else frozenset()
