"""Perplexity and KL of weight codes on a real model, beside mlx-lm's own affine quantization, in one table.

    python benchmarks/weights.py -m MODEL --data TEXT --calibration OTHER_TEXT

Only the layers are quantized; the embedding, which is the head too in small models, stays as it is in every row. The
model runs with the decoded weights, which compute what the packed ones do (tests/test_architectures.py).
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from common import digest, in_two_processes, write

from tq.cpu import blas

blas.enable()

import mlx.core as mx  # noqa: E402  (the BLAS bridge must come first)
import mlx.nn as nn  # noqa: E402
import numpy as np  # noqa: E402

from tq.engine.model.load import LoadedModel, load  # noqa: E402
from tq.engine.model.roles import Role, matrices  # noqa: E402
from tq.engine.quantize import QuantSpec, decode, encode  # noqa: E402
from tq.engine.run.evaluate import EvalResult, evaluate, read_text  # noqa: E402

LAYERS = (Role.ATTENTION, Role.VALUE, Role.MLP)
Moments = dict[str, np.ndarray]


def second_moments(loaded: LoadedModel, text: str, paths: list[str], seq_len: int, windows: int) -> Moments:
    """E[x x^T] of the inputs of the linear modules at ``paths``, over windows of ``text``."""
    names = {id(module): path for path, module in loaded.model.named_modules() if path in set(paths)}
    sums: Moments = {}
    last: list = [None, None]  # q, k and v are called with one array: its moments are computed once
    plain = nn.Linear.__call__

    def call(self: nn.Linear, x: mx.array) -> mx.array:
        if path := names.get(id(self)):
            if last[0] is not x:
                rows = np.array(x).reshape(-1, x.shape[-1])
                last[:] = [x, rows.T @ rows]
            sums[path] = sums.get(path, 0) + last[1]
        return plain(self, x)

    ids = loaded.tokenizer.encode(text[: 8 * seq_len * windows])
    nn.Linear.__call__ = call
    try:
        for i in range(windows):
            mx.eval(loaded.model(mx.array(ids[i * seq_len : (i + 1) * seq_len])[None]))
    finally:
        nn.Linear.__call__ = plain
    return {path: total / (windows * seq_len) for path, total in sums.items()}


def mlx_affine(bits: int) -> Callable[[str, mx.array], mx.array]:
    def apply(path: str, weight: mx.array) -> mx.array:
        return mx.dequantize(*mx.quantize(weight, 64, bits), 64, bits)

    return apply


def tq_codes(spec: QuantSpec, moments: Moments | None = None) -> Callable[[str, mx.array], mx.array]:
    def apply(path: str, weight: mx.array) -> mx.array:
        return decode(encode(weight, spec, None if moments is None else moments[path]))

    return apply


def rows_of(moments: Moments) -> list[tuple[str, QuantSpec | None, Callable[[str, mx.array], mx.array]]]:
    """Label, spec (None: mlx-lm's) and function of every row of the table."""
    rows: list = []
    for bits in (4, 3):
        rows.append((f"mlx-lm affine {bits}-bit g64", None, mlx_affine(bits)))
        for spec in (
            QuantSpec("affine", bits, 64, "none"),
            QuantSpec("affine", bits, 64),
            QuantSpec("lloyd-max", bits, 64, "none"),
            QuantSpec("lloyd-max", bits, 64),
            QuantSpec("lloyd-max", bits, 0),
        ):
            rows.append((f"tq {spec.label()}", spec, tq_codes(spec)))
            if spec.codec == "lloyd-max" and spec.rotation == "hadamard":
                rows.append((f"tq {spec.label()} + error feedback", spec, tq_codes(spec, moments)))
    return rows


def measure(options: argparse.Namespace, part: int, of: int) -> None:
    """Every ``of``-th row from ``part``, as JSON lines on stdout."""
    moments = dict(np.load(options.moments))
    reference, loaded = load(options.model), load(options.model)
    modules = dict(loaded.model.named_modules())
    weights = {path: modules[path].weight for path in moments}
    count = sum(weight.size for weight in weights.values())
    text = read_text(options.data)
    for order, (label, spec, apply) in list(enumerate(rows_of(moments)))[part::of]:
        started = time.perf_counter()
        for path, weight in weights.items():
            modules[path].weight = apply(path, weight)
            mx.eval(modules[path].weight)
        seconds = time.perf_counter() - started
        events = evaluate(loaded, text, seq_len=options.seq_len, samples=options.windows, reference=reference)
        (result,) = [event for event in events if isinstance(event, EvalResult)]
        found = result.to_dict()
        bits = int(label.split("-bit")[0][-1]) + 0.5  # mlx: a float16 scale and bias per 64
        if spec is not None:
            bits = sum(spec.size_bytes(weight.shape) for weight in weights.values()) * 8 / count
        keys = ("perplexity", "perplexity_error", "reference_perplexity", "kl_mean", "kl_p99", "top1_agreement")
        record = {"order": order, "codes": label, "bits_per_weight": round(bits, 4), **{k: found[k] for k in keys}}
        record["ratio"] = found["perplexity"] / found["reference_perplexity"]
        print(json.dumps(record), flush=True)
        print(f"{label:45s} {bits:.3f} {record['ratio']:.4f} {record['kl_mean']:.4f} {seconds:.0f} s", file=sys.stderr)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-m", "--model", required=True)
    parser.add_argument("--data", required=True, type=Path)
    parser.add_argument("--calibration", required=True, type=Path)
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--windows", type=int, default=6)
    parser.add_argument("--calibration-windows", type=int, default=16)
    parser.add_argument("--moments", type=Path, help="a file of second moments to reuse")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part:
        return measure(options, *map(int, options.part.split("/")))

    with tempfile.TemporaryDirectory() as folder:
        arguments = list(sys.argv[1:])
        if options.moments is None:
            loaded = load(options.model)
            paths = [p for p, m in matrices(loaded.model).items() if m.role in LAYERS]
            text = read_text(options.calibration)
            moments = second_moments(loaded, text, paths, options.seq_len, options.calibration_windows)
            np.savez(f"{folder}/moments.npz", **moments)
            arguments += ["--moments", f"{folder}/moments.npz"]
            del loaded, moments
        records = in_two_processes(arguments)

    write(
        "weights",
        {
            "model": Path(options.model).name,
            "data": digest(options.data),
            "calibration": digest(options.calibration),
            "seq_len": options.seq_len,
            "windows": options.windows,
            "calibration_tokens": options.seq_len * options.calibration_windows,
            "rows": records,
        },
    )


if __name__ == "__main__":
    main()
