"""Facts of this machine, read from the operating system. Not what to do with them: that is for profiles and doctor."""

import platform
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from tq.cpu import cores


@dataclass(frozen=True)
class Hardware:
    """One machine. Sizes in bytes; `memory_free_bytes` is what programs can have without swapping.

    `cores` are those that this process may use.
    """

    system: str
    chip: str
    cores: int
    memory_bytes: int
    memory_free_bytes: int


def this_machine() -> Hardware:
    import psutil

    memory = psutil.virtual_memory()
    return Hardware(
        system=_system(),
        chip=_chip(),
        cores=cores.available(),
        memory_bytes=memory.total,
        memory_free_bytes=memory.available,
    )


def free_disk_bytes(path: Path) -> int:
    """What a user may still write in the file system of `path`, which need not exist yet."""
    existing = next(parent for parent in [path.absolute(), *path.absolute().parents] if parent.exists())
    return shutil.disk_usage(existing).free


def _system() -> str:
    if sys.platform == "darwin":
        return f"macOS {platform.mac_ver()[0]} {platform.machine()}"
    try:
        name = platform.freedesktop_os_release()["PRETTY_NAME"]
    except (OSError, KeyError):
        name = f"{platform.system()} {platform.release()}"
    return f"{name} {platform.machine()}"


def _chip() -> str:
    if sys.platform == "darwin":
        command = ["sysctl", "-n", "machdep.cpu.brand_string"]
        return subprocess.run(command, capture_output=True, text=True).stdout.strip() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
