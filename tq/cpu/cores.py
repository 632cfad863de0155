"""How many threads native code gets: TQ_THREADS, else the cores that the system lets this process have."""

import os
import re
from pathlib import Path

from tq import settings

SYSTEM, PROCESS = Path("/sys"), Path("/proc/self")


def threads() -> int:
    """TQ_THREADS, or one for each core that affinity and the cgroup allow.

    Raises:
        UsageError: TQ_THREADS is not a positive number.
    """
    return settings.threads() or available()


def available() -> int:
    """Physical cores that this process may use: hyperthreads of one core gain nothing here, and count once."""
    cores = _cores(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _quota()
    # Half a processor more is worth a thread: all of them wait together when the quota is used up.
    return cores if quota is None else max(1, min(cores, int(quota + 0.5)))


def _cores(processors: set[int]) -> int:
    """How many cores these processors are."""
    folder = SYSTEM / "devices/system/cpu"
    return len({_read(folder / f"cpu{n}/topology/thread_siblings_list") or str(n) for n in processors})


def _quota() -> float | None:
    """Processors' worth of time that the cgroups of this process allow, the least of all levels, or None."""
    quotas = []
    for line in (_read(PROCESS / "cgroup") or "").splitlines():
        number, controllers, group = line.split(":", 2)
        if number == "0" or "cpu" in controllers.split(","):
            quotas += [_quota_of(folder) for folder in _folders("cgroup2" if number == "0" else "cgroup", group)]
    return min((quota for quota in quotas if quota is not None), default=None)


def _folders(kind: str, group: str) -> list[Path]:
    """Where a group and all groups around it are mounted.

    A line of mountinfo: 36 35 98:0 /root /mount/point options - kind source options. In a container the group may be
    given as the host sees it, of which only /root and what is below is mounted.
    """
    for line in (_read(PROCESS / "mountinfo") or "").splitlines():
        mount, _, rest = line.partition(" - ")
        words, (found, _, options) = mount.split(), rest.split()
        if found == kind and (kind == "cgroup2" or "cpu" in options.split(",")):
            root, point = words[3].rstrip("/"), Path(words[4])
            below = group[len(root) :] if f"{group}/".startswith(f"{root}/") else ""
            inside = point.joinpath(*(part for part in below.split("/") if part not in ("", "..")))
            return [inside, *(parent for parent in inside.parents if parent.is_relative_to(point))]
    return []


def _quota_of(folder: Path) -> float | None:
    """cpu.max holds "max 100000" or microseconds per period; version 1 has two files, with -1 for no limit."""
    text = _read(folder / "cpu.max") or " ".join(
        _read(folder / f"cpu.cfs_{name}_us") or "" for name in ("quota", "period")
    )
    limits = re.fullmatch(r"(\d+) (\d+)", text)
    return int(limits[1]) / int(limits[2]) if limits and int(limits[2]) else None


def _read(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except OSError:
        return None
