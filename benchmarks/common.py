"""What every benchmark needs: the machine and versions in the result, and where the result is written."""

import hashlib
import json
import os
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


def in_two_processes(arguments: list[str]) -> list[dict]:
    """Run this script twice with ``--part 0/2`` and ``1/2``; their JSON lines, sorted and freed of ``order``.

    MLX's CPU backend runs most operations on one thread: two processes use two cores.
    """
    workers = [
        subprocess.Popen(
            [sys.executable, sys.argv[0], *arguments, "--part", f"{part}/2"],
            stdout=subprocess.PIPE,
            env={**os.environ, "TQ_THREADS": "1"},
        )
        for part in range(2)
    ]
    records = [json.loads(line) for worker in workers for line in worker.communicate()[0].splitlines()]
    if any(worker.returncode for worker in workers):
        raise SystemExit("a worker failed")
    return sorted(records, key=lambda record: record.pop("order"))


def digest(path: Path) -> dict:
    """A text by name and content."""
    return {"name": path.name, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
