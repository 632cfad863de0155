"""A mixture of experts from the disk: speed and memory at several budgets, beside the same model in memory.

    python benchmarks/streaming.py --folder /where/6/GB/are/free

The model is the random qwen3_moe of cpu_models.py (64 experts in each of 20 layers, 8 of them active) with a larger
embedding, so that tokens choose different experts: without text, experts are about equally likely, which is the worst
case for any cache. "cold" takes the checkpoint out of the system's page cache before every token. Every run is a
process of its own, and kinds of runs take turns.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

import numpy as np
from common import write
from cpu_engines import converted, other_load, work_folder

from tq.engine.model.safetensors import read_folder_headers
from tq.engine.run import memory

NAME = "qwen3-moe-2b"
LIVELY = 32.0  # times the embedding that cpu_models.py makes
PROMPT, TOKENS = 64, 64
RUNS = {
    "resident": None,
    "all experts fit": {"share": 1.0, "prefetch": "off"},
    "half, warm": {"share": 0.5, "prefetch": "off"},
    "half, cold": {"share": 0.5, "prefetch": "off", "cold": True},
    "half, cold, lru": {"share": 0.5, "prefetch": "off", "cold": True, "policy": "lru"},
    "half, cold, guesses": {"share": 0.5, "prefetch": "on", "cold": True},
    "half, cold, auto": {"share": 0.5, "prefetch": "auto", "cold": True},
    "quarter, cold": {"share": 0.25, "prefetch": "off", "cold": True},
    "quarter, cold, lru": {"share": 0.25, "prefetch": "off", "cold": True, "policy": "lru"},
    "quarter, cold, 1 worker": {"share": 0.25, "prefetch": "off", "cold": True, "workers": 1},
}


def make(folder: Path) -> Path:
    """The converted model, made once."""
    from cpu_models import CONFIGS, write_checkpoint

    made = folder / f"{NAME}-lively"
    if not made.exists():
        source = folder / NAME
        write_checkpoint(source, CONFIGS[NAME])
        plain = converted(source, folder, "4")
        shutil.rmtree(source)
        shutil.copytree(plain, made)
        scales = read_folder_headers(made)["model.embed_tokens.scales"]
        with scales.path.open("r+b") as file:
            file.seek(scales.offset)
            values = np.frombuffer(file.read(scales.size_bytes), np.float16).astype(np.float32) * LIVELY
            file.seek(scales.offset)
            file.write(values.astype(np.float16).tobytes())
    return made


def forget(path: Path) -> None:
    """Take a checkpoint out of the page cache."""
    for part in path.glob("*.safetensors"):
        file = os.open(part, os.O_RDONLY)
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(file)


def one_run(path: Path, how: dict | None) -> dict:
    """In this process: load, read a prompt, and decode tokens that are given."""
    from tq.cpu import blas

    blas.enable()
    import mlx.core as mx
    from mlx_lm.models.cache import make_prompt_cache

    from tq.engine.model.load import load
    from tq.engine.stream.settings import StreamSettings

    how = dict(how) if how is not None else None
    cold = bool(how and how.pop("cold", False))
    before = memory.peak_bytes()
    if how is None:
        loaded = load(str(path))
    else:
        experts = sum(h.size_bytes for h in read_folder_headers(path).values() if ".switch_mlp." in h.name)
        loaded = load(str(path), stream=StreamSettings(budget_bytes=int(experts * how.pop("share")), **how))
    rng = np.random.default_rng(0)
    vocabulary = loaded.config["vocab_size"]
    cache = make_prompt_cache(loaded.model)
    forget(path)
    start = time.perf_counter()
    mx.eval(loaded.model(mx.array(rng.integers(258, vocabulary, PROMPT))[None], cache=cache))
    prefill = time.perf_counter() - start
    seconds = []
    for token in rng.integers(258, vocabulary, TOKENS).tolist():
        if cold:
            forget(path)
        start = time.perf_counter()
        mx.eval(loaded.model(mx.array([[token]]), cache=cache))
        seconds.append(time.perf_counter() - start)
    found = {
        "tokens_per_second": 1 / median(seconds),
        "mean_tokens_per_second": TOKENS / sum(seconds),
        "prefill_seconds": prefill,
        "peak_bytes": memory.peak_bytes(),
        "imports_bytes": before,
        "checkpoint_bytes": loaded.size_bytes,
    }
    if loaded.pager is not None:
        report = loaded.pager.report()
        kept = ("budget_bytes", "hit_rate", "read_bytes_per_token", "read_gb_s", "waited_seconds_per_token")
        found |= {key: getattr(report, key) for key in (*kept, "early", "early_used", "experts_bytes")}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where models are kept; by default in tq's cache")
    parser.add_argument("--rounds", type=int, default=5, help="how often each kind is run")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(one_run(Path(options.one[0]), json.loads(options.one[1]))))
        return
    path = make(work_folder(options.folder))
    rounds: dict[str, list[dict]] = {name: [] for name in RUNS}
    load = [other_load()]
    for _ in range(options.rounds):
        for name, how in RUNS.items():
            command = [sys.executable, __file__, "--one", str(path), json.dumps(how)]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            rounds[name].append(json.loads(done.stdout))
        load.append(other_load())
    found = {name: summary(runs, rounds["resident"]) for name, runs in rounds.items()}
    write("streaming", {"prompt": PROMPT, "tokens": TOKENS, "other_load_percent": load, "runs": found})


def summary(runs: list[dict], resident: list[dict]) -> dict:
    """Medians, the best speed, and the ratio to the resident model of the same round."""
    found = {key: median(run[key] for run in runs) for key in runs[0]}
    found["best_tokens_per_second"] = max(run["tokens_per_second"] for run in runs)
    pairs = zip(runs, resident, strict=True)
    found["of_resident"] = median(run["tokens_per_second"] / beside["tokens_per_second"] for run, beside in pairs)
    if "budget_bytes" in found:
        others = found["checkpoint_bytes"] - found["experts_bytes"]
        found["beside_bytes"] = found["peak_bytes"] - found["budget_bytes"] - others - found["imports_bytes"]
    return found


if __name__ == "__main__":
    main()
