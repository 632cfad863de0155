"""What would make packed keys and values better: ideas tried by replacing tokens with what is left of them.

python benchmarks/kv_experiments.py -m MODEL --data TEXT --group NAME [--windows N] [--seq-len N]

Nothing is packed here: a cache holds decoded numbers, so that an idea is a function of vectors (kv_coders.py) and needs
no format. A window is read as if it went through the model in steps of 64 tokens; an idea that learns from the first
vectors learns from the first 64 that are due. KL is that of the next token from the model with
unpacked keys and values; bits are those of a number, with scales. Groups add to the same JSON file.
"""

import argparse
import json
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import HERE, digest, write

from tq.cpu import blas

os.environ["TQ_CPU_EXACT"] = "1"  # where attention is a kernel, it computes in float32
blas.enable()

import mlx.core as mx  # noqa: E402  (the BLAS bridge must come first)
import mlx.nn as nn  # noqa: E402
import numpy as np  # noqa: E402
from kv_coders import (  # noqa: E402
    TOKENS,
    Balanced,
    Centred,
    CentredBlocks,
    Codec,
    Coder,
    Norm,
    PerChannel,
    Principal,
    Rotated,
    Scaled,
    SubScales,
    Trellis,
    error,
)
from mlx_lm.models.cache import create_attention_mask, make_prompt_cache  # noqa: E402

from tq.engine.cache import hook  # noqa: E402
from tq.engine.cache.settings import KVSettings  # noqa: E402
from tq.engine.model import native_attention  # noqa: E402
from tq.engine.model.load import load  # noqa: E402
from tq.engine.run.evaluate import read_text  # noqa: E402
from tq.engine.run.generate import bos_tokens  # noqa: E402

STEP = 64
DIMS = (64, 128)
Make = Callable[[], Coder]


@dataclass(frozen=True)
class Trial:
    """An idea: how keys and values are coded, and which of them.

    Attributes:
        bias: What is added to keys before their positions (`add_biases`).
    """

    keys: Make
    values: Make
    sink: int = 4
    window: int = 0
    bias: float = 0


def lloyd(bits: float) -> Make:
    return lambda: Codec("lloyd-max", bits)


def both(make: Make, **how: Any) -> Trial:
    return Trial(make, make, **how)


def keys(make: Make, **how: Any) -> Trial:
    """Values as they are."""
    return Trial(make, Coder, **how)


def values(make: Make, **how: Any) -> Trial:
    return Trial(Coder, make, **how)


SINKS = [(0, 0), (4, 0), (32, 0), (128, 0), (0, 32), (4, 32), (32, 32), (128, 32), (0, 128), (4, 128)]

GROUPS: dict[str, dict[str, Trial]] = {
    "widths": {f"{side} {b}": make(lloyd(b))
               for side, make in (("keys", keys), ("values", values)) for b in (2, 3, 4, 8)},
    "sub-scales": {f"{side} {b}, a factor for each 16 numbers": make(lambda b=b: SubScales(b))
                   for side, make in (("keys", keys), ("values", values)) for b in (2, 3, 4)},
    "centring": {
        **{f"{side} {b}, less the mean of the first block": make(lambda b=b: Centred(Codec("lloyd-max", b)))
           for side, make in (("keys", keys), ("values", values)) for b in (2, 3, 4)},
        **{f"{side} {b}, less the mean of each block": make(lambda b=b: CentredBlocks(Codec("lloyd-max", b)))
           for side, make in (("keys", keys), ("values", values)) for b in (3,)},
        **{f"{side} 3{name}, sink 0": make(coder, sink=0)
           for side, make in (("keys", keys), ("values", values))
           for name, coder in (("", lloyd(3)), (", less the mean of the first block",
                                                lambda: Centred(Codec("lloyd-max", 3))))},
        "keys 8, less the mean of the first block": keys(lambda: Centred(Codec("lloyd-max", 8))),
    },
    "scales": {
        **{f"{side} {b}, {name}": make(lambda b=b, exact=exact: Norm(b, exact))
           for side, make in (("keys", keys), ("values", values)) for b in (3,)
           for name, exact in (("root mean square", False), ("length kept", True))},
        **{f"keys {b}, over their size to the power {p}": keys(lambda b=b, p=p: Scaled(Codec("lloyd-max", b), p))
           for b in (3,) for p in (0.25, 0.5)},
        **{f"keys {b}, balanced with queries": keys(lambda b=b: Balanced(Codec("lloyd-max", b))) for b in (3,)},
        **{f"keys {b}, balanced with queries, less the mean":
           keys(lambda b=b: Centred(Balanced(Codec("lloyd-max", b)))) for b in (3,)},
        **{f"keys {b}, less the mean, over size to the power .5":
           keys(lambda b=b: Centred(Scaled(Codec("lloyd-max", b), 0.5))) for b in (3,)},
        **{f"values {b}, over their size to the power .5": values(lambda b=b: Scaled(Codec("lloyd-max", b), 0.5))
           for b in (3,)},
    },
    "sinks": {f"k{b}v{b}, sink {s}, window {w}": Trial(lloyd(b), lloyd(b), s, w)
              for b, pairs in ((3, SINKS), (4, ((0, 0), (32, 32), (128, 32)))) for s, w in pairs},
    # Read in steps of 64, so many tokens before a step are as they are: window, and what no block has taken yet.
    "windows": {f"k4v4, sink {s}, {recent} recent tokens": Trial(lloyd(4), lloyd(4), s, w)
                for s, w, recent in ((128, 0, 0), (160, 32, 32), (64, 32, 64), (128, 32, 64), (64, 96, 128),
                                     (128, 96, 128), (128, 160, 192))},
    "trellis": {f"{side} {b}, trellis of 256 states": make(lambda b=b: Trellis(b))
                for side, make in (("keys", keys), ("values", values)) for b in (2, 3)},
    "channels": {
        **{f"keys {b}, {name}": keys(lambda b=b, rotated=rotated: PerChannel(b, rotated)) for b in (2, 3)
           for name, rotated in (("affine by channel and block", False), ("lloyd-max by channel and block", True))},
        **{f"values {b}, lloyd-max by channel and block": values(lambda b=b: PerChannel(b, True)) for b in (3,)},
        **{f"{side} {b}, affine by token": make(lambda b=b: Codec("affine", b))
           for side, make in (("keys", keys), ("values", values)) for b in (3, 4)},
    },
    "rotations": {f"{side} 3, rotation {how}": make(lambda how=how: Rotated(3, how))
                  for side, make in (("keys", keys), ("values", values)) for how in ("none", "hadamard", "random")},
    "halves": {
        **{f"{side} {b}, outlier channels": make(lloyd(b))
           for side, make in (("keys", keys), ("values", values)) for b in (2.5, 3.5)},
        **{f"{side} {b}, outlier channels, less the mean": make(lambda b=b: Centred(Codec("lloyd-max", b)))
           for side, make in (("keys", keys), ("values", values)) for b in (2.5, 3.5)},
        **{f"{side} {b}, principal axes": make(lambda b=b: Principal(Codec("lloyd-max", b)))
           for side, make in (("keys", keys), ("values", values)) for b in (2.5, 3.5)},
        **{f"keys {b}, principal axes, less the mean": keys(lambda b=b: Centred(Principal(Codec("lloyd-max", b))))
           for b in (2.5, 3.5)},
    },
    "biases": {
        f"{name}, bias {bias}": keys(make, sink=128, window=32, bias=bias)
        for bias in (30, 200)
        for name, make in (
            ("keys 8", lloyd(8)), ("keys 8, less the mean", lambda: Centred(Codec("lloyd-max", 8))),
            ("keys 4", lloyd(4)), ("keys 4, less the mean", lambda: Centred(Codec("lloyd-max", 4))),
            ("keys 3.5, outlier channels", lloyd(3.5)),
            ("keys 3.5, outlier channels, less the mean", lambda: Centred(Codec("lloyd-max", 3.5))),
            ("keys 4, affine by token", lambda: Codec("affine", 4)),
            ("keys 4, affine by channel and block", lambda: PerChannel(4, False)),
        )
    },
}  # fmt: skip


class Tried:
    """The cache of one layer whose attention reads what coders leave of tokens: for one window, read at once.

    Chunks of STEP tokens attend to each other, and to tokens that were not due before them, as they are.
    """

    offset = 0

    def __init__(self, trial: Trial):
        self.coders = trial.keys(), trial.values()
        self.settings = KVSettings(sink=trial.sink, window=trial.window)

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        return keys, values

    def make_mask(self, *args: Any, **kwargs: Any) -> Any:
        return create_attention_mask(*args, offset=0, **kwargs)

    def attend(self, queries: mx.array, keys: mx.array, values: mx.array, scale: float) -> mx.array:
        sink, length, heads = self.settings.sink, queries.shape[2], keys.shape[1]
        packed = [self.settings.packed_after(start, sink) for start in range(0, length, STEP)]
        sides = [keys, values]
        first = next((n for n in packed if n), 0)
        if first:
            seen = packed.index(first) * STEP
            squares = mx.square(queries[:, :, :seen]).reshape(heads, -1, queries.shape[3]).mean(axis=1)
            for side, coder in enumerate(self.coders):
                coder.fit(sides[side][:, :, sink : sink + first], squares)
                sides[side] = coder.code(sides[side][:, :, sink : sink + packed[-1]])
        found = []
        for start, n in zip(range(0, length, STEP), packed, strict=True):
            stop = min(start + STEP, length)
            read = [mx.concatenate([raw[:, :, :sink], coded[:, :, :n], raw[:, :, sink + n : stop]], axis=2)
                    if n else raw[:, :, :stop]
                    for raw, coded in zip((keys, values), sides, strict=True)]  # fmt: skip
            part = queries[:, :, start:stop]
            found.append(native_attention.attention(part, *read, None, scale, "causal"))
        return mx.concatenate(found, axis=2)


def attention(queries: Any, keys: Any, values: Any, cache: Any, scale: float, mask: Any, sinks: Any = None) -> Any:
    if isinstance(cache, Tried):
        return cache.attend(queries, keys, values, scale)
    return native_attention.attention(queries, keys, values, cache, scale, mask, sinks)


class Biased(nn.Module):
    """A key projection with a bias, as Qwen2's have."""

    def __init__(self, linear: nn.Module, bias: mx.array):
        super().__init__()
        self.linear, self.bias = linear, bias

    def __call__(self, x: mx.array) -> mx.array:
        return self.linear(x) + self.bias


def add_biases(model: Any, largest: float) -> None:
    """Give each key head biases: +-`largest` in the two slowest pairs of a rotary embedding, +-`largest`/10 in the next
    four, and normal ones of size 1 in all. Without one: take them out again."""
    for number, layer in enumerate(model.model.layers):
        attn = layer.self_attn
        linear = attn.k_proj.linear if isinstance(attn.k_proj, Biased) else attn.k_proj
        heads = attn.n_kv_heads
        dim = linear.weight.shape[0] // heads
        rng = np.random.default_rng(number)
        pairs = rng.standard_normal((heads, 2, dim // 2))
        pairs[:, :, -2:] = np.sign(pairs[:, :, -2:]) * largest
        pairs[:, :, -6:-2] = np.sign(pairs[:, :, -6:-2]) * largest / 10
        bias = mx.array(pairs.reshape(-1).astype(np.float32))
        attn.k_proj = Biased(linear, bias) if largest else linear


def log_probabilities(model: Any, window: mx.array, caches: list[Any]) -> np.ndarray:
    """Of all tokens at each place but the last, float32 (L - 1, vocabulary)."""
    logits = model(window[:, :-1], cache=caches)[0].astype(mx.float32)
    return np.array(logits - mx.logsumexp(logits, axis=-1, keepdims=True))


def compare(reference: np.ndarray, found: np.ndarray, targets: np.ndarray) -> dict[str, float]:
    """Means over the places of a window."""
    rows = np.arange(len(targets))
    parts = zip(np.array_split(reference, 8), np.array_split(found, 8), strict=True)
    kl = np.concatenate([(np.exp(r) * (r - f)).sum(-1, dtype=np.float64) for r, f in parts])
    return {"nll": -float(found[rows, targets].mean(dtype=np.float64)),
            "kl": float(kl.mean()), "kl_p99": float(np.quantile(kl, 0.99)),
            "same": float((reference.argmax(-1) == found.argmax(-1)).mean())}  # fmt: skip


def measure(model: Any, windows: list[mx.array], trials: dict[str, Trial], dim: int) -> list[dict[str, Any]]:
    """One record for each trial, and one for the model with unpacked keys and values of each bias."""
    found: dict[str, list[dict[str, float]]] = {}
    for window in windows:
        bias, reference = None, None
        targets = np.array(window)[0, 1:]
        for name, trial in trials.items():
            if trial.bias != bias:
                bias = trial.bias
                add_biases(model, bias)
                reference = log_probabilities(model, window, make_prompt_cache(model))
                base = "unpacked" + (f", bias {bias}" if bias else "")
                found.setdefault(base, []).append(compare(reference, reference, targets))
            caches = [Tried(trial) for _ in model.layers]
            assert reference is not None
            found.setdefault(name, []).append(compare(reference, log_probabilities(model, window, caches), targets))
            print(name, found[name][-1], flush=True)
    add_biases(model, 0)
    return [_record(name, rows, trials.get(name), found, dim) for name, rows in found.items()]


def _record(name: str, rows: list[dict], trial: Trial | None, found: dict, dim: int) -> dict[str, Any]:
    bias = trial.bias if trial else 0
    base = found["unpacked" + (f", bias {bias}" if bias else "")] if trial else rows
    nll = np.array([row["nll"] for row in rows])
    more = nll - np.array([row["nll"] for row in base])
    kl = np.array([row["kl"] for row in rows])
    root = math.sqrt(len(rows))
    record: dict[str, Any] = {"kv": name, "perplexity": round(math.exp(nll.mean()), 4)}
    if trial is None:
        return record
    record |= {"key_bits": trial.keys().bits(dim), "value_bits": trial.values().bits(dim),
               "ratio": round(math.exp(more.mean()), 4), "kl": round(float(kl.mean()), 5),
               "kl_p99": round(float(np.mean([row["kl_p99"] for row in rows])), 4),
               "same_first_choice": round(float(np.mean([row["same"] for row in rows])), 4)}  # fmt: skip
    if len(rows) > 1:
        record["ratio_error"] = round(float(more.std(ddof=1)) / root * record["ratio"], 4)
        record["kl_error"] = round(float(kl.std(ddof=1)) / root, 5)
    return record


def distortion() -> list[dict[str, Any]]:
    """Of normal vectors."""
    coders: dict[str, Make] = {}
    for b in (2, 3, 4):
        coders |= {f"lloyd-max {b}": lloyd(b), f"{b}, root mean square": lambda b=b: Norm(b),
                   f"{b}, length kept": lambda b=b: Norm(b, True),
                   f"{b}, a factor for each 16 numbers": lambda b=b: SubScales(b)}  # fmt: skip
        if b < 4:
            coders[f"{b}, trellis of 256 states"] = lambda b=b: Trellis(b)
    return [{"coder": name, "dim": dim, "bits": make().bits(dim), "error": round(error(make(), dim), 5)}
            for dim in DIMS for name, make in coders.items()]  # fmt: skip


HEAD_DIM, ROTARY_BASE = 128, 1e6  # of Qwen2.5
BIASED = {"slowest pairs": (56, 64), "middle pairs": (28, 36), "fastest pairs": (0, 8), "all pairs": (0, 64)}


def biased_heads() -> list[dict[str, Any]]:
    """How far scores of 4096 keys are off that are normal numbers, with a bias of +-100 in some rotary pairs: their
    standard deviation over tokens, so that a constant, which softmax does not see, does not count."""
    rng, tokens, half = np.random.default_rng(3), 4096, HEAD_DIM // 2
    frequencies = ROTARY_BASE ** (-np.arange(half) / half)
    coders: dict[str, Make] = {
        **{f"keys {b}": lloyd(b) for b in (8, 4, 3.5)},
        **{f"keys {b}, less the mean": lambda b=b: Centred(Codec("lloyd-max", b)) for b in (8, 4, 3.5)},
        "keys 4, affine by token": lambda: Codec("affine", 4),
        "keys 4, affine by channel and block": lambda: PerChannel(4, False),
    }
    found = []
    for where, (first, last) in {"none": (0, 0), **BIASED}.items():
        bias = np.zeros((2, half))
        bias[:, first:last] = rng.choice([-100.0, 100.0], (2, last - first))
        content = rng.standard_normal((tokens, 2, half)) + bias
        angle = np.arange(tokens)[:, None] * frequencies
        turned = np.concatenate([content[:, 0] * np.cos(angle) - content[:, 1] * np.sin(angle),
                                 content[:, 1] * np.cos(angle) + content[:, 0] * np.sin(angle)], axis=1)  # fmt: skip
        x = mx.array(turned.astype(np.float32))[None, None]
        q = rng.standard_normal((64, HEAD_DIM)) * 2
        for name, make in coders.items():
            coder = make()
            coder.fit(x[:, :, :TOKENS], mx.ones((1, HEAD_DIM)))
            off = q @ (np.array(coder.code(x), np.float64)[0, 0] - turned).T / math.sqrt(HEAD_DIM)
            found.append({"bias": where, "keys": name, "score_error": round(float(off.std(axis=1).mean()), 4)})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-m", "--model", required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--group", choices=["distortion", "heads", *GROUPS], required=True)
    parser.add_argument("--windows", type=int, default=2)
    parser.add_argument("--seq-len", type=int, default=512)
    options = parser.parse_args()

    if options.group in ("distortion", "heads"):
        results = distortion() if options.group == "distortion" else biased_heads()
    else:
        loaded = load(options.model)
        hook.uninstall()  # of the CPU kernels, if they run
        hook.install(loaded.model, attention)
        bos = bos_tokens(loaded.tokenizer)
        ids = loaded.tokenizer.encode(read_text(options.data), add_special_tokens=False, verbose=False)
        body = options.seq_len - len(bos)
        windows = [mx.array([bos + ids[i * body : (i + 1) * body]]) for i in range(options.windows)]
        dim = loaded.model.layers[0].self_attn.rope.dims
        results = measure(loaded.model, windows, GROUPS[options.group], dim)
    path = HERE / "kv_experiments.json"
    groups = json.loads(path.read_text(encoding="utf-8")).get("groups", {}) if path.exists() else {}
    groups[options.group] = {"windows": options.windows, "seq_len": options.seq_len, "results": results}
    write("kv_experiments", {"text": digest(options.data), "model": Path(options.model).name,
                             "groups": dict(sorted(groups.items()))})  # fmt: skip


if __name__ == "__main__":
    main()
