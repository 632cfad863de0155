"""What every benchmark needs: the machine and versions in the result, and where the result is written."""

import json
import platform
import shlex
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import psutil

import tq

HERE = Path(__file__).parent


def machine() -> dict:
    """The machine that a number was measured on."""
    model = platform.processor()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.split(":")[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    return {
        "cpu": model,
        "cores": psutil.cpu_count(logical=False),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "tq": tq.__version__,
        **{name: version(name) for name in ("mlx", "mlx-lm", "numpy")},
    }


def commit() -> str:
    """The commit that was measured, with a mark where files differ from it."""
    done = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=HERE, capture_output=True, text=True)
    return done.stdout.strip()


def write(name: str, results: dict) -> None:
    """Write ``benchmarks/<name>.json``: the command, the machine, the results."""
    # Files by name: where they lie on this machine tells nobody anything.
    arguments = [Path(argument).name if "/" in argument else argument for argument in sys.argv[1:]]
    command = shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *arguments])
    document = {"command": command, "commit": commit(), "machine": machine(), **results}
    path = HERE / f"{name}.json"
    path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {path}", file=sys.stderr)
