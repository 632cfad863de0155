"""Decoding behind long contexts on the CPU: packed keys and values beside the float16 ones that native layers keep.

    python benchmarks/kv_decode.py MODEL --folder /where/1/GB/is/free

MODEL is a folder that `tq convert` made (SmolLM2-135M-Instruct at 4 bits in the committed run). A second model, of
random weights, has six layers with heads of 128 numbers. Caches are filled with random keys and values, which cost
what real ones do, and take turns in one process, token by token. Ratios are those of the medians, and of the best
tokens. Then a batch of sequences in one call of the kernels and one by one; then, each in a process of its own, the
memory that a long prompt takes at its peak. Without --rounds a run takes under 8 minutes on an idle machine.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from common import write
from cpu_engines import converted, once, other_load, work_folder
from cpu_models import CONFIGS, write_checkpoint
from mlx_lm.models.cache import KVCache, make_prompt_cache

from tq.cpu import library
from tq.engine.cache.batch import BatchPackedKVCache
from tq.engine.cache.convert import convert_cache
from tq.engine.cache.packed import PackedKVCache
from tq.engine.cache.settings import KVSettings
from tq.engine.model.load import load
from tq.engine.run import memory
from tq.engine.run.decode import PREFILL_STEP

CONTEXTS = (512, 2048, 8192, 32768)
KINDS = ("k8v3", "k8v4", "k4v4")
OTHERS = ("paper-2.5", "paper-3.5", "4,4 affine", "8,3 g32")  # settings that fewer choose, behind 2048 and 8192 tokens
OTHER_CONTEXTS = (2048, 8192)
PLAIN = "float16"
WIDE = CONFIGS["llama-1b"] | {"num_hidden_layers": 6, "num_attention_heads": 16, "head_dim": 128}
CHUNK = 2048  # tokens that a cache is filled with at once
PROMPT = 16384
TURNS = 8  # tokens of each cache in a round
SEQUENCES, BATCH_CONTEXT = 8, 1024


def settings_of(kind: str) -> KVSettings:
    bits, *rest = kind.split()
    found = KVSettings.parse(bits)
    if "affine" in rest:
        return KVSettings(found.key_bits, found.value_bits, "affine", "affine")
    return KVSettings(found.key_bits, found.value_bits, group_size=32) if "g32" in rest else found


class Series:
    """A model's caches of one kind with so many tokens, and how fast the next ones come."""

    def __init__(self, model: Any, kind: str, tokens: int, form: tuple[int, int]):
        self.model, self.seconds = model, []
        heads, dim = form
        keys, values = (mx.random.normal((1, heads, CHUNK, dim), key=mx.random.key(i)) for i in (0, 1))
        self.caches = make_prompt_cache(model)
        if kind != PLAIN:
            self.caches = convert_cache(self.caches, settings_of(kind))
        for cache in self.caches:
            for first in range(0, tokens, CHUNK):
                n = min(CHUNK, tokens - first)
                if kind == PLAIN:
                    cache.update_and_fetch(*(side[:, :, :n].astype(mx.float16) for side in (keys, values)))
                    continue
                cache.append(keys[:, :, :n], values[:, :, :n])
                mx.eval(cache.state)
            mx.eval(cache.state)
        assert kind == PLAIN or {c.storage.name for c in self.caches if type(c) is PackedKVCache} == {"cpu"}

    def step(self) -> None:
        began = time.perf_counter()
        mx.eval(self.model(mx.array([[7]]), cache=self.caches)[:, -1].argmax(axis=-1))
        self.seconds.append(time.perf_counter() - began)

    @property
    def size_bytes(self) -> int:
        return sum(cache.nbytes for cache in self.caches)


def form_of(model: Any) -> tuple[int, int]:
    """Key heads, and numbers of a head."""
    cache = make_prompt_cache(model)
    mx.eval(model(mx.array([[7, 8]]), cache=cache))
    assert all(type(c) is KVCache for c in cache), "a model with full attention in all layers"
    return cache[0].keys.shape[1], cache[0].keys.shape[3]


def decode(name: str, model: Any, tokens: int, kinds: tuple[str, ...], rounds: int) -> list[dict]:
    form = form_of(model)
    made = {kind: Series(model, kind, tokens, form) for kind in (PLAIN, *kinds)}
    for turn in range(2 + TURNS * rounds):
        for series in made.values():
            series.step()
            if turn == 1:  # the first steps bind calls and make room
                series.seconds.clear()
    rows = []
    for kind, series in made.items():
        plain = made[PLAIN].seconds
        rows.append(
            {
                "model": name,
                "context": tokens,
                "cache": kind,
                "bytes": series.size_bytes,
                "tokens_per_second": {
                    "best": round(1 / min(series.seconds), 1),
                    "median": round(1 / statistics.median(series.seconds), 1),
                },
                "speed_against_float16": {
                    "best": round(min(plain) / min(series.seconds), 3),
                    "median": round(statistics.median(plain) / statistics.median(series.seconds), 3),
                },
            }
        )
        print(json.dumps(rows[-1]), flush=True)
    return rows


def batch(model: Any, rounds: int) -> dict:
    """One layer's cache and attention for a token of each sequence: in one call, and one by one."""
    heads, dim = form_of(model)
    random = np.random.default_rng(0)

    def normal(*shape: int) -> mx.array:
        return mx.array(random.standard_normal(shape, np.float32))

    single = []
    for b in range(SEQUENCES):
        n = BATCH_CONTEXT - 40 * b
        single.append(PackedKVCache(KVSettings(8, 3)))
        single[-1].append(normal(1, heads, n, dim), normal(1, heads, n, dim))
        mx.eval(single[-1].state)
    query, key, value = normal(SEQUENCES, 3 * heads, 1, dim), *(normal(SEQUENCES, heads, 1, dim) for _ in "kv")

    class OneByOne(BatchPackedKVCache):
        def _native(self, *_: Any) -> None:
            return None

    seconds: dict[str, list[float]] = {"one call": [], "one by one": []}
    made = {"one call": BatchPackedKVCache.merge(single), "one by one": OneByOne.merge(single)}
    for _ in range(10 * rounds):
        for name, cache in made.items():
            began = time.perf_counter()
            mask = cache.make_mask(1)
            keys, values = cache.update_and_fetch(key, value)
            mx.eval(cache.attend(query, keys, values, scale=dim**-0.5, mask=mask))
            seconds[name].append(time.perf_counter() - began)
    found = {name: round(1e3 * statistics.median(times), 3) for name, times in seconds.items()}
    return {"sequences": SEQUENCES, "context": BATCH_CONTEXT, "ms_per_layer": found}


def prompt_peak(folder: Path, kind: str, tokens: int) -> dict:
    """What a process takes at its peak that reads a long prompt."""
    command = [sys.executable, __file__, str(folder), "--prompt-kind", kind, "--prompt-tokens", str(tokens)]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1])


def read_prompt(folder: Path, kind: str, tokens: int) -> None:
    model = load(str(folder)).model
    caches = make_prompt_cache(model)
    caches = caches if kind == PLAIN else convert_cache(caches, settings_of(kind), model)
    ids = mx.array(np.random.default_rng(0).integers(100, 20000, (1, tokens)))
    mx.eval(model(ids[:, :2], cache=make_prompt_cache(model)))
    memory.settle()
    memory.start_peak()
    before, began = memory.held_bytes(), time.perf_counter()
    for first in range(0, tokens, PREFILL_STEP):
        model(ids[:, first : first + PREFILL_STEP], cache=caches)
        mx.eval([cache.state for cache in caches])
        mx.clear_cache()
    peak = memory.peak_bytes()
    found = {"tokens": tokens, "cache": kind, "cache_bytes": sum(c.nbytes for c in caches), "peak_bytes": peak}
    found |= {"more_than_before_bytes": peak - before, "seconds": round(time.perf_counter() - began, 1)}
    print(json.dumps(found))


def wide_model(folder: Path) -> Path:
    def make(out: Path) -> None:
        write_checkpoint(out, WIDE)

    return converted(once(folder / "llama-d128", make), folder, "4")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a folder that tq convert made")
    parser.add_argument("--folder", type=Path, help="where the random model is kept; by default in tq's cache")
    parser.add_argument("--rounds", type=int, default=7, help="how often each number is measured")
    parser.add_argument("--quick", action="store_true", help="one round behind 512 tokens; nothing is written")
    parser.add_argument("--prompt-tokens", type=int, default=PROMPT)
    parser.add_argument("--prompt-kind", help=argparse.SUPPRESS)  # the process of one prompt
    options = parser.parse_args()
    if options.prompt_kind:
        return read_prompt(options.model, options.prompt_kind, options.prompt_tokens)
    rounds, contexts = (1, (512,)) if options.quick else (options.rounds, CONTEXTS)
    busy, rows = [other_load()], []
    models = {
        options.model.name: options.model,
        "llama, heads of 128, 6 layers": wide_model(work_folder(options.folder)),
    }
    for name, folder in models.items():
        model = load(str(folder)).model
        for tokens in contexts:
            rows += decode(name, model, tokens, KINDS, rounds)
            mx.clear_cache()
        if not options.quick and folder == options.model:
            for tokens in OTHER_CONTEXTS:
                rows += decode(name, model, tokens, OTHERS, rounds)
                mx.clear_cache()
        del model
    together = batch(load(str(options.model)).model, rounds)
    busy.append(other_load())
    prompts = [
        prompt_peak(options.model, kind, 512 if options.quick else options.prompt_tokens) for kind in (PLAIN, "k8v3")
    ]
    for row in (together, *prompts):
        print(json.dumps(row), flush=True)
    if not options.quick:
        found = {"batch": together, "prompts": prompts, "rows": rows}
        write("kv_decode", {"kernels": library.state().reason, "other_load_percent": busy, **found})


if __name__ == "__main__":
    main()
