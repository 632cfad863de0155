"""What more bits are worth where: KL of a model whose layers are quantized without data, with some matrices wider.

python benchmarks/sensitivity.py -m MODEL --data TEXT
"""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

from common import digest, in_two_processes, write

from tq.cpu import blas

blas.enable()

import mlx.core as mx  # noqa: E402  (the BLAS bridge must come first)

from tq.engine.model.load import load  # noqa: E402
from tq.engine.model.roles import Role, matrices  # noqa: E402
from tq.engine.quantize import QuantSpec, decode, encode  # noqa: E402
from tq.engine.run.evaluate import EvalResult, evaluate, read_text  # noqa: E402

LAYERS = (Role.ATTENTION, Role.VALUE, Role.MLP)


def wider(bits: int, **names: int) -> Callable[[str], int]:
    """``bits`` for all matrices, others for those with a name."""
    return lambda path: names.get(path.rpartition(".")[2], bits)


ROWS: list[tuple[str, Callable[[str], int]]] = [
    ("4", wider(4)),
    *((f"4, {name} 8", wider(4, **{name: 8})) for name in ("q_proj", "k_proj", "v_proj", "o_proj")),
    *((f"4, {name} 8", wider(4, **{name: 8})) for name in ("gate_proj", "up_proj", "down_proj")),
    ("4, v_proj 5", wider(4, v_proj=5)),
    ("4, v_proj 6", wider(4, v_proj=6)),
    ("4, v_proj 6, down_proj 5", wider(4, v_proj=6, down_proj=5)),
    ("3", wider(3)),
    ("3, v_proj 5", wider(3, v_proj=5)),
    ("3, v_proj 5, down_proj 4", wider(3, v_proj=5, down_proj=4)),
]


def measure(options: argparse.Namespace, part: int, of: int) -> None:
    """Every ``of``-th row from ``part``, as JSON lines on stdout."""
    reference, loaded = load(options.model), load(options.model)
    modules = dict(loaded.model.named_modules())
    weights = {path: modules[path].weight for path, m in matrices(loaded.model).items() if m.role in LAYERS}
    count = sum(weight.size for weight in weights.values())
    text = read_text(options.data)[options.skip :]
    for order, (label, bits) in list(enumerate(ROWS))[part::of]:
        stored = 0
        for path, weight in weights.items():
            spec = QuantSpec(bits=bits(path))
            stored += spec.size_bytes(weight.shape)
            modules[path].weight = decode(encode(weight, spec))
            mx.eval(modules[path].weight)
        events = evaluate(loaded, text, seq_len=options.seq_len, samples=options.windows, reference=reference)
        (result,) = [event for event in events if isinstance(event, EvalResult)]
        record = {
            "order": order,
            "bits": label,
            "bits_per_weight": round(8 * stored / count, 4),
            "ratio": result.perplexity / (result.reference_perplexity or 1),
            "kl_mean": result.kl_mean,
            "kl_mean_error": result.kl_mean_error,
        }
        print(json.dumps(record), flush=True)
        print(
            f"{label:28s} {record['bits_per_weight']:.3f} {record['ratio']:.3f} {record['kl_mean']:.4f}",
            file=sys.stderr,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-m", "--model", required=True)
    parser.add_argument("--data", required=True, type=Path)
    parser.add_argument("--skip", type=int, default=200_000, help="characters of the text to leave out")
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--windows", type=int, default=3)
    parser.add_argument("--part", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part:
        return measure(options, *map(int, options.part.split("/")))
    records = in_two_processes(sys.argv[1:])
    write(
        "sensitivity",
        {
            "model": Path(options.model).name,
            "data": digest(options.data),
            "skipped_characters": options.skip,
            "seq_len": options.seq_len,
            "windows": options.windows,
            "codes": "lloyd-max g64, without data",
            "rows": records,
        },
    )


if __name__ == "__main__":
    main()
