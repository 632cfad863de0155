"""tq or mlx-lm in a process of its own: what cpu_engines.Engine starts with this project's Python.

Reads requests and writes answers, one JSON object a line. "stream" is what `tq run` does, or mlx-lm's stream_generate,
with text and sampling; "bare" is the model alone: given tokens, one after another, and argmax after each.

python cpu_mlx.py '{"engine": "tq", "model": "FOLDER", "kv_bits": "8,4"}'
python cpu_mlx.py '{"engine": "mlx-lm", "model": "FILE.gguf", "bits": 4}'
"""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import tq
from tq.engine.cache.settings import KVSettings
from tq.engine.run.evaluate import EvalResult, default_text, evaluate
from tq.engine.run.generate import Finished, GenerateOptions, generate, prompt_cache

AFFINE_GROUP = 64
PREFILL_STEP = 2048  # as mlx-lm has it


class Session:
    """A model, and one prompt that its cache holds."""

    def __init__(self, config: dict):
        self.engine = config["engine"]
        self.loaded = tq.load(config["model"])
        self.model, self.tokenizer = self.loaded.model, self.loaded.tokenizer
        self.kv = KVSettings.parse(config["kv_bits"]) if config.get("kv_bits") else None
        self.prompt: list[int] = []
        self.cache: list[Any] = []
        if self.engine == "mlx-lm":
            import mlx.core as mx
            import mlx.nn as nn

            nn.quantize(self.model, AFFINE_GROUP, config["bits"])
            mx.eval(self.model.parameters())

    def answer(self, op: str, request: dict) -> dict:
        return getattr(self, op)(**request)

    def stream(self, prompt: list[int], tokens: int, temp: float, top_p: float, top_k: int) -> dict:
        times, pieces = [], []
        started = time.perf_counter()
        if self.engine == "tq":
            options = GenerateOptions(max_tokens=tokens, temp=temp, top_p=top_p, top_k=top_k, seed=1)
            answer = generate(self.loaded, prompt, options, self.kv)
            events: Any = (event for event in answer if not isinstance(event, Finished))
        else:
            from mlx_lm import stream_generate
            from mlx_lm.sample_utils import make_sampler

            sampler = make_sampler(temp=temp, top_p=top_p if temp else 0.0, top_k=top_k if temp else 0)
            events = stream_generate(self.model, self.tokenizer, prompt, max_tokens=tokens, sampler=sampler)
        for event in events:
            times.append(time.perf_counter())
            pieces.append(event.text)
        return {
            "prefill_seconds": times[0] - started,
            "decode_seconds": times[-1] - times[0],
            "decoded": len(times) - 1,
            "text": "".join(pieces),
        }

    def bare(self, prompt: list[int], feed: list[int], fresh: bool = False) -> dict:
        """Decode ``feed``, one by one. The prompt is computed if ``fresh`` or if it is another one than before."""
        import mlx.core as mx
        from mlx_lm.models.cache import trim_prompt_cache

        def step(ids: mx.array) -> None:
            mx.eval(mx.argmax(self.model(ids, cache=self.cache)[:, -1], axis=-1))

        prefill = None
        if fresh or prompt != self.prompt:
            self.prompt, self.cache = prompt, prompt_cache(self.model, self.kv)
            ids = mx.array(prompt)[None]
            started = time.perf_counter()
            for at in range(0, len(prompt) - 1, PREFILL_STEP):
                self.model(ids[:, at : min(at + PREFILL_STEP, len(prompt) - 1)], cache=self.cache)
                mx.eval([c.state for c in self.cache])
            step(ids[:, -1:])
            prefill = time.perf_counter() - started
        started = time.perf_counter()
        for token in feed:
            step(mx.array([[token]]))
        seconds = time.perf_counter() - started
        kv_bytes = sum(c.nbytes for c in self.cache)
        trim_prompt_cache(self.cache, len(feed))
        return {"prefill_seconds": prefill, "decode_seconds": seconds, "decoded": len(feed), "kv_bytes": kv_bytes}

    def tokens(self) -> dict:
        """The text that ships with tq."""
        return {"tokens": self.tokenizer.encode(default_text()[1])}

    def describe(self) -> dict:
        """What a stored model takes, and the most memory that this process has taken."""
        lines = Path("/proc/self/status").read_text().splitlines()
        (peak,) = [int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")]
        if self.engine == "tq":
            size = self.loaded.size_bytes
        else:
            from mlx.utils import tree_flatten

            size = sum(array.nbytes for _, array in tree_flatten(self.model.parameters()))
        return {"size_bytes": size, "peak_rss_bytes": peak, "notes": self.loaded.notes}


def quality(config: dict) -> dict:
    """KL of 8-bit activations from float32 activations, the same packed weights."""
    os.environ["TQ_CPU_EXACT"] = "1"  # models look when they are loaded
    exact = tq.load(config["model"])
    os.environ["TQ_CPU_EXACT"] = "0"
    loaded = tq.load(config["model"])
    name, text = default_text()
    events = evaluate(loaded, text, seq_len=config["seq_len"], samples=config["samples"], reference=exact, data=name)
    (result,) = [event for event in events if isinstance(event, EvalResult)]
    keys = ("data", "seq_len", "windows", "tokens", "perplexity", "reference_perplexity", "kl_mean", "kl_mean_error",
            "kl_p99", "kl_max", "top1_agreement")  # fmt: skip
    return {key: result.to_dict()[key] for key in keys}


def main() -> None:
    config = json.loads(sys.argv[1])
    if config["engine"] == "quality":
        print(json.dumps(quality(config)))
        return
    session = None
    for line in sys.stdin:
        request = json.loads(line)
        session = session or Session(config)
        print(json.dumps(session.answer(request.pop("op"), request)), flush=True)


if __name__ == "__main__":
    main()
