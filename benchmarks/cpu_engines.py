"""What the CPU benchmarks share: the baselines' environment, a process per engine, runs in turn, best and median.

Engines take turns in every round, so that a machine that is slow for a while is slow for all of them.
"""

import contextlib
import json
import os
import statistics
import subprocess
import sys
import venv
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from tq import settings
from tq.cpu import cores

HERE = Path(__file__).parent
XLLAMACPP = "2026.10.11549"  # cpu_llama.py knows the structures of this version
REQUIREMENTS = (f"xllamacpp=={XLLAMACPP}", "gguf==0.19.0", "numpy==2.4.6")
BUSY_PERCENT = 5  # llama.cpp waits in loops: a little foreign work slows it down a lot
GREEDY = {"temp": 0.0, "top_p": 1.0, "top_k": 0}
SAMPLED = {"temp": 0.7, "top_p": 0.95, "top_k": 40}


def work_folder(given: Path | None) -> Path:
    """Where models and the baselines' environment are kept for the next run."""
    folder = given or settings.cache_dir() / "benchmarks"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def baselines_python(folder: Path) -> Path:
    """The interpreter of an environment with llama.cpp's wheel, made if it is not there."""
    home = folder / "baselines"
    python, stamp = home / "bin" / "python", home / "installed"
    wanted = "\n".join(REQUIREMENTS)
    if not stamp.exists() or stamp.read_text() != wanted:
        print(f"installing {', '.join(REQUIREMENTS)} in {home}", file=sys.stderr)
        venv.create(home, clear=True, with_pip=True)
        install = ["-m", "pip", "install", "--quiet", "--only-binary", ":all:", "--disable-pip-version-check"]
        subprocess.run([python, *install, *REQUIREMENTS], check=True)
        stamp.write_text(wanted)
    return python


def once(path: Path, make: Callable[[Path], None]) -> Path:
    """``path``, made under another name first if it is not there."""
    if not path.exists():
        print(f"making {path}", file=sys.stderr)
        unfinished = path.with_name(f"unfinished-{path.name}")
        make(unfinished)
        unfinished.rename(path)
    return path


def converted(source: Path, folder: Path, bits: str, *options: str) -> Path:
    """A folder that `tq convert` makes of ``source``."""

    def make(out: Path) -> None:
        command = [sys.executable, "-m", "tq", "convert", "-m", str(source), "-o", str(out), "--bits", bits, *options]
        subprocess.run([*command, "--quiet"], stdout=sys.stderr, check=True)

    return once(folder / f"{source.stem}-tq{bits}", make)


class Engine:
    """Child processes that answer one request at a time, and sleep between them.

    Args:
        apart: Streams get a process of their own. llama.cpp's server and its C functions are called from two threads,
            each with a team of OpenMP's; together they outnumber the cores, and OpenMP then lets threads sleep at
            every barrier, which halves the speed of whatever comes second.
    """

    def __init__(self, label: str, command: list[str], env: dict[str, str] | None = None, apart: bool = False):
        self.label, self.command, self.env, self.apart = label, command, {**os.environ, **(env or {})}, apart
        self.processes: dict[bool, subprocess.Popen[str]] = {}

    @classmethod
    def llama(cls, label: str, python: Path, model: Path, context: int, flash: bool = True) -> "Engine":
        config = {"model": str(model), "threads": cores.threads(), "context": context, "flash": flash}
        return cls(label, [str(python), str(HERE / "cpu_llama.py"), json.dumps(config)], apart=True)

    @classmethod
    def tq(cls, label: str, model: Path, kv_bits: str | None = None) -> "Engine":
        config = {"engine": "tq", "model": str(model), "kv_bits": kv_bits}
        return cls(label, [sys.executable, str(HERE / "cpu_mlx.py"), json.dumps(config)])

    @classmethod
    def mlx_lm(cls, label: str, model: Path, bits: int) -> "Engine":
        """mlx-lm with what MLX's wheel brings: without tq's kernels and its BLAS."""
        config = {"engine": "mlx-lm", "model": str(model), "bits": bits}
        env = {"TQ_BLAS": "off", "TQ_BACKEND": "reference"}
        return cls(label, [sys.executable, str(HERE / "cpu_mlx.py"), json.dumps(config)], env)

    def ask(self, op: str, **request: Any) -> dict:
        process = self.process(self.apart and op == "stream")
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(json.dumps({"op": op, **request}) + "\n")
        process.stdin.flush()
        line = process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.label}: the process ended with {process.wait()}")
        return json.loads(line)

    def process(self, streams: bool) -> "subprocess.Popen[str]":
        if streams not in self.processes:
            self.processes[streams] = subprocess.Popen(
                self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=self.env
            )
        return self.processes[streams]

    def close(self) -> None:
        for process in self.processes.values():
            assert process.stdin is not None
            process.stdin.close()
            process.wait()


@contextlib.contextmanager
def running(*engines: Engine) -> Iterator[tuple[Engine, ...]]:
    try:
        yield engines
    finally:
        for engine in engines:
            engine.close()


@dataclass
class Series:
    """One number, measured again and again: tokens per second."""

    measure: Callable[[], float]
    values: list[float] = field(default_factory=list)

    def to_dict(self) -> dict:
        best, median = max(self.values), statistics.median(self.values)
        return {"best": round(best, 2), "median": round(median, 2), "runs": len(self.values)}


def in_turn(series: dict[str, Series], rounds: int) -> dict[str, dict]:
    """Measure all of them ``rounds`` times, one after another, after one run each that does not count."""
    for one in series.values():
        one.measure()
    for n in range(rounds):
        for label, one in series.items():
            one.values.append(one.measure())
            print(f"round {n + 1}/{rounds}  {label:55s} {one.values[-1]:9.1f}", file=sys.stderr)
    return {label: one.to_dict() for label, one in series.items()}


def stream_rate(engine: Engine, prompt: list[int], tokens: int, sampling: dict) -> Callable[[], float]:
    """Tokens per second after the first one, with text and sampling."""

    def measure() -> float:
        answer = engine.ask("stream", prompt=prompt, tokens=tokens, **sampling)
        if answer["decoded"] < tokens // 2:
            raise SystemExit(f"{engine.label}: ended after {answer['decoded']} of {tokens} tokens")
        return answer["decoded"] / answer["decode_seconds"]

    return measure


def bare_rate(engine: Engine, prompt: list[int], feed: list[int]) -> Callable[[], float]:
    """Tokens per second of the model's steps alone, with the prompt computed once."""

    def measure() -> float:
        answer = engine.ask("bare", prompt=prompt, feed=feed)
        return answer["decoded"] / answer["decode_seconds"]

    return measure


def prefill_rate(engine: Engine, prompt: list[int]) -> Callable[[], float]:
    """Tokens of a prompt per second, until the first new token is known."""

    def measure() -> float:
        return len(prompt) / engine.ask("bare", prompt=prompt, feed=[], fresh=True)["prefill_seconds"]

    return measure


def under_foreign_load(measure: Callable[[], float]) -> Callable[[], float]:
    """The same with one busy process per core."""

    def with_load() -> float:
        busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in os.sched_getaffinity(0)]
        try:
            return measure()
        finally:
            for process in busy:
                process.kill()
                process.wait()

    return with_load


def other_load() -> float:
    """Percent of the processors' time that others take now, while engines sleep."""
    percent = psutil.cpu_percent(interval=2)
    if percent > BUSY_PERCENT:
        print(f"others take {percent} % of the processors: these numbers will say little", file=sys.stderr)
    return percent


def ratios(found: dict[str, dict], ours: str, theirs: list[str]) -> dict[str, Any]:
    """Our speed by that of the fastest of theirs."""
    present = [label for label in theirs if label in found]
    fastest = {key: max(present, key=lambda label: found[label][key]) for key in ("best", "median")}
    return {
        key: {"ratio": round(found[ours][key] / found[label][key], 2), "against": label}
        for key, label in fastest.items()
    }
