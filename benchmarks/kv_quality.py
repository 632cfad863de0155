"""Perplexity with packed keys and values, beside mlx-lm's own quantized cache, as ratios to unpacked ones.

python benchmarks/kv_quality.py -m MODEL --data TEXT [--windows N] [--seq-len N] [--only NAME ... [--add]]

A window goes through the model in steps of 64 tokens, so that later tokens read packed ones. mlx-lm's cache quantizes
every token at once, in groups of 64; tq's keeps a sink and recent tokens, and rows without them are measured too.
"""

import argparse
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common import HERE, digest, write

from tq.cpu import blas

blas.enable()

import mlx.core as mx  # noqa: E402  (the BLAS bridge must come first)
import numpy as np  # noqa: E402
from mlx_lm.models.cache import KVCache, QuantizedKVCache, make_prompt_cache  # noqa: E402

from tq.engine.cache.convert import convert_cache  # noqa: E402
from tq.engine.cache.settings import KVSettings  # noqa: E402
from tq.engine.model.load import load  # noqa: E402
from tq.engine.run.evaluate import read_text  # noqa: E402
from tq.engine.run.generate import bos_tokens  # noqa: E402

STEP = 64
BARE: dict[str, Any] = {"sink": 0, "window": 0}


def packed(settings: KVSettings) -> Callable[[Any], list[Any]]:
    return lambda model: convert_cache(make_prompt_cache(model), settings, model)


def quantized(bits: int) -> Callable[[Any], list[Any]]:
    """mlx-lm's."""
    return lambda model: [QuantizedKVCache(64, bits) if type(c) is KVCache else c for c in make_prompt_cache(model)]


ROWS: dict[str, Callable[[Any], list[Any]]] = {
    "unpacked": make_prompt_cache,
    "k8v3": packed(KVSettings(8, 3)),
    "k8v4": packed(KVSettings(8, 4)),
    "k4v4": packed(KVSettings(4, 4)),
    "k3v3": packed(KVSettings(3, 3)),
    "k8v3, no sink or window": packed(KVSettings(8, 3, **BARE)),
    "k4v4, no sink or window": packed(KVSettings(4, 4, **BARE)),
    "k3v3, no sink or window": packed(KVSettings(3, 3, **BARE)),
    "k4v4, no sink": packed(KVSettings(4, 4, sink=0)),
    "k4v4, window 64": packed(KVSettings(4, 4, window=64)),
    "k4v4, sink 4": packed(KVSettings(4, 4, sink=4)),
    "k4v4, sink 32": packed(KVSettings(4, 4, sink=32)),
    "k4v4, keys less their mean": packed(KVSettings(4, 4, centre=True)),
    "k3v3, keys less their mean": packed(KVSettings(3, 3, centre=True)),
    "k4v4 affine": packed(KVSettings(4, 4, "affine", "affine")),
    "k4v4 qjl": packed(KVSettings(4, 4, "qjl")),
    "polar": packed(KVSettings.parse("polar")),
    "paper-3.5": packed(KVSettings.parse("paper-3.5")),
    "paper-2.5": packed(KVSettings.parse("paper-2.5")),
    "mlx-lm affine 8": quantized(8),
    "mlx-lm affine 4": quantized(4),
    "mlx-lm affine 3": quantized(3),
}


def negative_log_likelihood(model: Any, window: mx.array, caches: list[Any]) -> np.ndarray:
    """Of each token but the first, float64 (L - 1,)."""
    found = []
    for start in range(0, window.shape[1] - 1, STEP):
        part = window[:, start : min(start + STEP, window.shape[1] - 1)]
        logits = model(part, cache=caches)[0].astype(mx.float32)
        target = window[0, start + 1 : start + 1 + part.shape[1], None]
        losses = mx.logsumexp(logits, axis=-1) - mx.take_along_axis(logits, target, axis=-1)[:, 0]
        mx.eval(losses, [cache.state for cache in caches])
        found.append(np.array(losses, np.float64))
    return np.concatenate(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-m", "--model", required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--only", nargs="*", choices=list(ROWS), help="measure only these")
    parser.add_argument("--add", action="store_true", help="to the rows that the file has, if their base is the same")
    options = parser.parse_args()

    loaded = load(options.model)
    text = read_text(options.data)
    bos = bos_tokens(loaded.tokenizer)
    ids = loaded.tokenizer.encode(text, add_special_tokens=False, verbose=False)
    body = options.seq_len - len(bos)
    windows = [mx.array([bos + ids[i * body : (i + 1) * body]]) for i in range(options.windows)]
    results: list[dict[str, Any]] = []
    for name in ["unpacked", *(n for n in options.only or ROWS if n != "unpacked")]:
        losses = [negative_log_likelihood(loaded.model, window, ROWS[name](loaded.model)) for window in windows]
        row: dict[str, Any] = {"kv": name, "perplexity": round(math.exp(np.mean(losses)), 4)}
        base = results[0] if results else row
        row["ratio"] = round(row["perplexity"] / base["perplexity"], 4)
        if not results:
            unpacked = np.array(losses)
        elif len(windows) > 1:  # of the paired windows: what they differ in themselves cancels
            means = np.mean(np.array(losses) - unpacked, axis=1)
            row["ratio_error"] = round(row["ratio"] * float(means.std(ddof=1)) / math.sqrt(len(means)), 4)
        results.append(row)
        print(row, flush=True)
    if options.add:
        before = json.loads((HERE / "kv_quality.json").read_text(encoding="utf-8"))["results"]
        if before[0] != results[0]:
            raise SystemExit(f"unpacked keys and values gave {before[0]} before, and {results[0]} now")
        rows = {row["kv"]: row for row in (*before, *results)}
        results = [rows[name] for name in ROWS if name in rows]
    write("kv_quality", {"text": digest(options.data), "windows": options.windows, "seq_len": options.seq_len,
                         "model": Path(options.model).name, "results": results})  # fmt: skip


if __name__ == "__main__":
    main()
