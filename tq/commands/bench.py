"""`tq bench`: how fast models are on this machine, and what ways to keep keys and values cost and bring."""

from __future__ import annotations

from collections.abc import Iterable
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import tq
from tq.commands import bench_cache, groups, options, plots
from tq.errors import UsageError
from tq.output import Output, human_bytes, human_count, human_seconds, render

if TYPE_CHECKING:
    from tq.engine.cache.settings import KVSettings
    from tq.engine.run.contenders import Contender

EPILOG = options.examples(
    "tq bench -m MODEL-tq4",
    "tq bench -m MODEL-tq4 -m MODEL-tq3 --context 0,2048,8192",
    "tq bench -m MODEL-tq4 --sweep kv --context 2048,8192 --plot kv.png",
    "tq bench -m MODEL-tq4 --sweep cache --disk-gb-s 6 --memory-gb-s 400",
)
CONTEXTS, SWEEP_CONTEXTS = "0", "512,2048"
SAMPLES = 4
SWEEP_KV = "none,k8v4,k8v3,k4v4"
LOAD_PERCENT = 10  # of the processors in the hands of others, from which on it is said
MEGABYTES = 1e-6
PLOTTED = {
    "prefill_tokens_per_second": ("prefill, tokens/s", 1.0),
    "decode_tokens_per_second": ("decode, tokens/s", 1.0),
    "kv_bytes": ("keys and values, MB", MEGABYTES),
}
SPEED_PLOTTED = {**PLOTTED, "peak_memory_bytes": ("peak memory, MB", MEGABYTES)}
SWEEP_PLOTTED = {**PLOTTED, "kl_mean": ("KL divergence from unpacked", 1.0)}


class Sweep(StrEnum):
    KV = "kv"
    CACHE = "cache"


class Format(StrEnum):
    TABLE = "table"
    JSON = "json"
    CSV = "csv"
    MARKDOWN = "markdown"


@groups.flat
def bench(
    asked: typer.Context,
    *,
    model: Annotated[
        list[str],
        typer.Option(
            "--model", "-m", metavar="MODEL", help="A folder, GGUF file or Hub id; several are compared with the first."
        ),
    ],
    prompt: Annotated[int, typer.Option("--prompt", metavar="N", help="Tokens of the prompt; 0: no prefill.")] = 512,
    generate: Annotated[int, typer.Option("--generate", metavar="N", help="Tokens generated; 0: no decode.")] = 128,
    context: Annotated[
        str | None,
        typer.Option("--context", metavar="N,N", help="Tokens that come before: 0, or 512,2048 in a sweep."),
    ] = None,
    rounds: Annotated[int, typer.Option("--rounds", metavar="N", help="How often each number is measured.")] = 5,
    sweep: Annotated[
        Sweep | None,
        typer.Option("--sweep", help="kv: ways to keep keys and values, also in quality; cache: memory for experts."),
    ] = None,
    kv: Annotated[
        str | None,
        typer.Option("--kv", metavar="K,K", help=f"What --sweep kv compares: {SWEEP_KV}, k4v4/affine ..."),
    ] = None,
    text: Annotated[
        Path | None,
        typer.Option("--text", metavar="FILE", help="What a sweep predicts; without it, a text that ships with tq."),
    ] = None,
    samples: Annotated[
        int | None, typer.Option("--samples", metavar="N", help="At most so many windows of the text, else 4.")
    ] = None,
    trace: Annotated[
        Path | None,
        typer.Option("--trace", metavar="FILE", help="Of --sweep cache: what tq stream --trace wrote, not a text."),
    ] = None,
    disk_gb_s: Annotated[
        float | None, typer.Option("--disk-gb-s", metavar="X", help="Of --sweep cache; without it, measured here.")
    ] = None,
    memory_gb_s: Annotated[
        float | None, typer.Option("--memory-gb-s", metavar="X", help="Of --sweep cache; without it, measured here.")
    ] = None,
    caching: groups.Caching,
    profile: options.Profile = None,
    format: Annotated[Format | None, typer.Option("--format", help="How the result is printed.")] = None,
    plot: Annotated[
        str | None, typer.Option("--plot", metavar="FILE", help="Also draw it: a .png, .svg or .pdf, or - for here.")
    ] = None,
    loading: groups.Loading,
    printing: groups.Printing,
) -> None:
    """Measure how fast models are on this machine.

    Models, or settings of a sweep, take turns in every round; ratios are medians of ratios within a round. Ctrl-C
    prints what is known by then.
    """
    if sweep is Sweep.CACHE:
        bench_cache.refuse_others(asked)
    else:
        speeds = {"--disk-gb-s": disk_gb_s, "--memory-gb-s": memory_gb_s}
        _refuse({**speeds, "--trace": trace}, "is for --sweep cache", "leave it out")
    if sweep is None:
        _refuse(
            {"--kv": kv, "--text": text, "--samples": samples}, "is for --sweep kv", "--kv-bits packs without a sweep"
        )
    elif sweep is Sweep.KV:
        hint = "for example --kv none,k8v4,k4v4/affine"
        packing = {f"--{n.replace('_', '-')}": v for n, v in vars(caching).items() if n.startswith("kv_")}
        _refuse(packing, "is not for --sweep kv, which takes --kv", hint)
        if len(model) > 1:
            raise UsageError(f"--sweep kv is for one model, not {len(model)}")
    if printing.json and format not in (None, Format.JSON):
        raise UsageError(f"--json and --format {format} are two forms of one result: use one of them")
    style = Format.JSON if printing.json else format or Format.TABLE
    out = Output(json=style == Format.JSON, quiet=printing.quiet, verbose=printing.verbose)
    if sweep is Sweep.CACHE:
        read = (text, trace, context, disk_gb_s, memory_gb_s)
        return bench_cache.sweep_cache(out, style, model, *read, loading)
    if plot == plots.TERMINAL and style != Format.TABLE:
        raise UsageError(f"--plot - goes with --format table, not with {style}", "--plot FILE.png goes with all")
    contexts = options.contexts(context or (SWEEP_CONTEXTS if sweep else CONTEXTS), "0,2048,8192")
    configured = options.read_settings(out, profile=profile, **vars(caching))
    if plot is not None:
        plots.check(plot)

    from tq.cpu import blas

    out.detail(f"BLAS: {blas.enable().reason}")
    from tq.engine.ops.selftest import read_bandwidth
    from tq.engine.run.bench import BenchOptions, check_context, measure
    from tq.engine.run.contenders import Contender, load_contenders
    from tq.engine.run.evaluate import default_text, read_text
    from tq.engine.run.kv_sweep import PLAIN, measure_quality, parse_settings
    from tq.engine.run.other_load import OtherLoad

    chosen = BenchOptions(prompt, generate, contexts, rounds, configured.prefill_step)
    settings: list[tuple[str, KVSettings | None]]
    if sweep:
        if min(contexts) < 2:
            raise UsageError(f"the contexts of a sweep must be 2 or more, not {min(contexts)}")
        settings = parse_settings(kv or SWEEP_KV)
        text_name, words = (str(text), read_text(text)) if text else default_text()
    else:
        one = configured.kv
        settings = [(PLAIN if one is None else one.label(), one)]
    contenders = [
        e for e in out.follow(load_contenders(model, settings, **vars(loading)), "Loading") if isinstance(e, Contender)
    ]
    check_context(contenders, chosen)

    if sweep:
        windows = SAMPLES if samples is None else samples
        quality = measure_quality(contenders[0].loaded, settings, contexts, words, windows)
    load = OtherLoad()
    rows: list[dict[str, Any]] = []
    complete = False
    try:
        _gather(rows, out.follow(measure(contenders, chosen, read_bandwidth), "Measuring"))
        if sweep:
            _gather(rows, out.follow(quality, "Judging"))
        complete = True
    finally:
        # Also for Ctrl-C, which goes on to the exit code.
        if rows:
            busy = load.percent()
            document = {
                "complete": complete,
                "machine": machine(busy),
                "prompt": prompt,
                "generate": generate,
                "text": text_name if sweep else None,
                "models": [_model(name, c) for name, c in zip(model, contenders[:: len(settings)], strict=True)],
                "rows": rows,
            }
            _print(out, style, document, bool(sweep), plot)
            if busy > LOAD_PERCENT:
                out.warn(f"other programs took {busy:.0f} % of the processors: best is nearer the truth than median")
        if not complete:
            out.say("not complete: " + ("these are the numbers so far" if rows else "nothing is measured yet"))


def _refuse(given: dict[str, Any], why: str, hint: str) -> None:
    """Raises UsageError if one of these options is given."""
    for name, value in given.items():
        if value is not None:
            raise UsageError(f"{name} {why}", hint)


def _gather(rows: list[dict[str, Any]], events: Iterable[Any]) -> None:
    """Put what is measured into the row of its model or setting and context."""
    for event in events:
        found = event.to_dict()
        same = [row for row in rows if all(row[key] == found.get(key, row[key]) for key in ("label", "kv", "context"))]
        if same:
            same[0].update(found)
        else:
            rows.append(found)


def machine(other_load_percent: float) -> dict[str, Any]:
    """What a reader of the numbers must know about where they come from."""
    from importlib.metadata import version

    import mlx.core as mx

    from tq.cpu import cores
    from tq.engine.machine.facts import this_machine

    facts = this_machine()
    return {
        "chip": facts.chip,
        "system": facts.system,
        "memory_bytes": facts.memory_bytes,
        "device": str(mx.default_device()).split("(")[-1].split(",")[0],
        "threads": cores.threads(),
        "other_load_percent": round(other_load_percent, 1),
        "tq": tq.__version__,
        "mlx": version("mlx"),
        "mlx-lm": version("mlx-lm"),
    }


def _model(name: str, contender: Contender) -> dict[str, Any]:
    weights, size = contender.weights, contender.loaded.size_bytes
    return {
        "label": contender.label,
        "model": name,
        "parameters": weights.parameters,
        "size_bytes": size,
        "bits_per_weight": 8 * size / max(weights.parameters, 1),
        "token_bytes": weights.token_bytes,
        "load_seconds": contender.load_seconds,
        "memory_bytes": weights.size_bytes,
    }


def _print(out: Output, style: Format, document: dict[str, Any], sweep: bool, plot: str | None) -> None:
    rows = document["rows"]
    if style == Format.JSON:
        out.result(document, "")
    elif style == Format.CSV:
        out.result(None, render(rows, "csv"))
    else:
        table = render([(_sweep_row if sweep else _speed_row)(row, document) for row in rows], style)
        out.result(None, table if style == Format.MARKDOWN else f"{_heading(document)}\n\n{table}")
    if plot is not None:
        drawn = plots.panels(rows, SWEEP_PLOTTED if sweep else SPEED_PLOTTED)
        if plot == plots.TERMINAL:
            out.result(None, "\n" + plots.draw_terminal(drawn))
        else:
            plots.draw_file(drawn, ", ".join(model["label"] for model in document["models"]), Path(plot))
            out.say(f"drawn in {plot}")


def _heading(document: dict[str, Any]) -> str:
    """The machine, and a line for each model."""
    at = document["machine"]
    bandwidth = max((row["read_gb_s"] or 0 for row in document["rows"]), default=0)
    reads = f", reads memory at {bandwidth:.1f} GB/s" if bandwidth else ""
    lines = [f"{at['chip']}, {at['device']}, {at['threads']} threads{reads}; tq {at['tq']}, mlx {at['mlx']}"]
    for model in document["models"]:
        lines.append(
            f"{model['model']}: {human_count(model['parameters'])} parameters in {human_bytes(model['size_bytes'])} "
            f"({model['bits_per_weight']:.2f} bits each), loaded in {human_seconds(model['load_seconds'])}"
        )
    return "\n".join(lines)


def _speed_row(row: dict[str, Any], document: dict[str, Any]) -> dict[str, Any]:
    """For people: tokens per second are medians, `×` compares with the first model."""
    several = len(document["models"]) > 1
    shown: dict[str, Any] = {"model": row["label"], "context": row["context"]}
    if any(other["kv"] != "none" for other in document["rows"]):
        shown["KV as"] = row["kv"]
    shown |= _speed(row, document, several)
    share = row["bandwidth_share"]
    shown["of memory"] = None if share is None else f"{share:.0%}"
    return {**shown, "KV": human_bytes(row["kv_bytes"]), "peak": human_bytes(row["peak_memory_bytes"])}


def _speed(row: dict[str, Any], document: dict[str, Any], several: bool) -> dict[str, Any]:
    shown: dict[str, Any] = {}
    for kind, count in (("prefill", document["prompt"]), ("decode", document["generate"])):
        if count:
            shown[f"{kind} {count}"] = row.get(f"{kind}_tokens_per_second")
            shown[f"best {kind}"] = row.get(f"{kind}_best")
            if several:
                shown[f"{kind} ×"] = _fixed(row.get(f"{kind}_ratio"), 2)
    return shown


def _sweep_row(row: dict[str, Any], document: dict[str, Any]) -> dict[str, Any]:
    plain = next((r for r in document["rows"] if r["kv"] == "none" and r["context"] == row["context"]), None)
    speed = {name: value for name, value in _speed(row, document, True).items() if not name.startswith("best")}
    top1, kl = row.get("top1_agreement"), row.get("kl_mean")
    found = row.get("needles_found")
    return {
        "KV": row["kv"],
        "context": row["context"],
        "bytes": human_bytes(row["kv_bytes"]),
        "of plain": None if plain is None else f"{row['kv_bytes'] / plain['kv_bytes']:.2f}",
        "peak": human_bytes(row["peak_memory_bytes"]),
        **speed,
        "perplexity": _fixed(row.get("perplexity"), 2),
        "KL": kl if kl is None else f"{kl:.2g}",
        "KL p99": None if row.get("kl_p99") is None else f"{row['kl_p99']:.2g}",
        "top-1": None if top1 is None else f"{top1:.1%}",
        "needles": None if found is None else f"{found}/{row['needles']}",
    }


def _fixed(value: float | None, digits: int) -> str | None:
    return None if value is None else f"{value:.{digits}f}"
