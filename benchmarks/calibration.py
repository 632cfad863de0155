"""What calibration is worth through the commands that people give: `tq convert`, with and without, and `tq eval`.

    python benchmarks/calibration.py -m MODEL --data TEXT --samples 6

Every row is a conversion with the default recipe but for its bits and group size (value projections get two bits more,
the embedding, which is the head too, at least 6), measured on the text that ships with tq and on --data. A row that is
there already is not measured again, so that a run can be interrupted; --again begins anew.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import HERE, digest, write

GRID = [(3, "64"), (4, "64"), (2, "64"), (3, "row"), (4, "row"), (2, "row")]
KEYS = ("perplexity", "reference_perplexity", "kl_mean", "kl_mean_error", "kl_p99", "top1_agreement")


def tq(*arguments: str) -> dict:
    """The JSON document of a command."""
    command = [sys.executable, "-m", "tq", *arguments, "--json", "--quiet"]
    done = subprocess.run(
        command, stdout=subprocess.PIPE, check=True, env={**os.environ, "PYTHONPATH": str(HERE.parent)}
    )
    return json.loads(done.stdout)


def quality(model: str, options: argparse.Namespace) -> dict:
    """On the two texts."""
    reference = ["--reference", options.model]
    found = {"eval.txt": tq("eval", "-m", model, *reference)}
    data = ["--data", str(options.data), "--samples", str(options.samples)]
    found[options.data.name] = tq("eval", "-m", model, *reference, *data)
    return {name: {key: result[key] for key in KEYS} for name, result in found.items()}


def tq_row(bits: int, group: str, extra: list[str], options: argparse.Namespace) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        out = f"{folder}/out"
        started = time.perf_counter()
        plan = tq("convert", "-m", options.model, "-o", out, "--bits", str(bits), "--group-size", group, *extra)
        seconds = time.perf_counter() - started
        found = {"bits_per_weight": plan["quantized_bits_per_weight"], "seconds": round(seconds, 1)}
        return found | {"encode_seconds": round(plan["encode_seconds"], 1), **quality(out, options)}


def affine_row(bits: int, options: argparse.Namespace) -> dict:
    """mlx-lm's own quantization of every matrix, embedding included, in groups of 64: a folder that mlx-lm reads."""
    from tq.cpu import blas

    blas.enable()
    import mlx.core as mx
    import mlx.nn as nn
    from mlx.utils import tree_flatten

    from tq.engine.model.load import load

    loaded = load(options.model)
    nn.quantize(loaded.model, 64, bits)
    with tempfile.TemporaryDirectory() as folder:
        weights = dict(tree_flatten(loaded.model.parameters()))
        mx.save_safetensors(f"{folder}/model.safetensors", weights, {"format": "mlx"})
        config = loaded.config | {"quantization": {"group_size": 64, "bits": bits}}
        Path(folder, "config.json").write_text(json.dumps(config))
        loaded.tokenizer.save_pretrained(folder)
        return {"bits_per_weight": bits + 0.5, **quality(folder, options)}


def rows(options: argparse.Namespace) -> list[tuple[str, object]]:
    """Label and function of each row, those that say most first."""
    found: list = []
    for bits, group in GRID:
        name = f"{bits}-bit {'row' if group == 'row' else 'g64'}"
        calibrate = ["--calibrate", *(["--calibration-tokens", str(options.tokens)] if options.tokens else [])]
        found.append((f"tq {name} --calibrate", lambda b=bits, g=group, c=calibrate: tq_row(b, g, c, options)))
        found.append((f"tq {name}", lambda b=bits, g=group: tq_row(b, g, [], options)))
        if group == "64":
            found.append((f"mlx-lm affine {bits}-bit g64", lambda b=bits: affine_row(b, options)))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-m", "--model", required=True)
    parser.add_argument("--data", required=True, type=Path)
    parser.add_argument("--samples", type=int, default=6, help="windows of --data")
    parser.add_argument("--tokens", type=int, help="of the calibration")
    parser.add_argument("--again", action="store_true")
    options = parser.parse_args()
    path = HERE / "calibration.json"
    there = {} if options.again or not path.exists() else {r["codes"]: r for r in json.loads(path.read_text())["rows"]}
    for label, measure in rows(options):
        if label not in there:
            there[label] = {"codes": label, **measure()}
            print(label, json.dumps(there[label]), file=sys.stderr)
        settings = {"seq_len": 512, "samples": options.samples, "calibration_tokens": options.tokens or 16384}
        texts = {"data": digest(options.data), "calibration": "the text that ships with tq"}
        write("calibration", {"model": Path(options.model).name, **texts, **settings, "rows": list(there.values())})


if __name__ == "__main__":
    main()
