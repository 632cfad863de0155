"""`tq plan`: will a model fit, how fast can it be at best, and what to do if not. Reads headers, never weights."""

import dataclasses
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tq.commands import groups, options
from tq.output import Output, facts, human_bytes, human_count, render

if TYPE_CHECKING:
    from tq.engine.machine.hardware import Target
    from tq.engine.run.plan.report import Report, Row

EPILOG = options.examples(
    "tq plan -m Qwen/Qwen3-30B-A3B --hardware m4-16gb",
    "tq plan -m MODEL-tq4 --context 32768 --kv-bits k8v3",
    "tq plan -m model.gguf --hardware m1-max-64gb --fit",
)
NOT_FITTING = 1


@groups.flat
def plan(
    *,
    model: options.Model,
    hardware: Annotated[
        str, typer.Option("--hardware", metavar="NAME", help="this, or a Mac such as m4-16gb or m1-max-64gb.")
    ] = "this",
    context: Annotated[
        str | None,
        typer.Option("--context", metavar="N,N", help="Tokens of context; without it, 4096 and some more are shown."),
    ] = None,
    fit: Annotated[bool, typer.Option("--fit", help="Choose the most bits that fit, and say how to convert.")] = False,
    memory: Annotated[
        str | None,
        typer.Option("--memory", metavar="SIZE", help="What the model may take, such as 12GB, whatever the hardware."),
    ] = None,
    reserve: Annotated[
        str | None,
        typer.Option("--reserve", metavar="SIZE", help="Memory for the system and other programs.  [default: 2.5GB]"),
    ] = None,
    weights: groups.Quantizing,
    dtype: options.Dtype = None,
    format: options.CheckpointFormat = "tq",
    caching: groups.Caching,
    profile: options.Profile = None,
    loading: groups.Loading,
    printing: groups.Printing,
) -> None:
    """Tell whether a model fits into memory, from its headers alone.

    A packed checkpoint is judged as it is, any other as tq convert would make it with the same options. Nothing but
    headers and small JSON files is fetched from the Hub. Exit code 0: it fits, 1: it does not.
    """
    out = Output(**vars(printing))
    from tq.cpu import blas

    blas.enable()
    from tq import settings
    from tq.engine.machine import hardware as machines
    from tq.engine.run.plan.fit import RESERVE_BYTES, Memory
    from tq.engine.run.plan.report import Planner, Question

    contexts = () if context is None else options.contexts(context, "4096,32768")
    target = machines.find(hardware)
    configured = options.read_settings(
        out,
        None if target.name == machines.THIS else target.memory_bytes,
        profile=profile,
        recipe=weights.recipe,
        **vars(caching),
    )
    asked = [value for value in (*vars(weights).values(), dtype) if value is not None]
    question = Question(
        model,
        Memory(
            target,
            RESERVE_BYTES if reserve is None else settings.size_bytes(reserve),
            None if memory is None else settings.size_bytes(memory),
        ),
        contexts,
        configured.kv,
        configured.prefill_step,
        vars(weights) | {"recipe": configured.recipe},  # of tq.toml, if nobody gives one
        dtype,
        format,
        converts=bool(asked) or format != "tq",
        fit=fit,
        **vars(loading),
    )
    report = Planner(question).answer()
    for note in report.notes:
        out.say(note)
    out.result(document(report), text(report, printing.verbose))
    if report.verdict != "fits":
        raise typer.Exit(NOT_FITTING)


def document(report: "Report") -> dict[str, Any]:
    """The answer as JSON. Keys stay; sizes are bytes."""
    weights, memory, question = report.weights, report.question.memory, report.question
    return {
        "model": question.model,
        "packed": report.packed,
        "convert": report.convert,
        "verdict": report.verdict,
        "context": report.judged,
        "largest_context": report.largest_context,
        "max_context": report.max_context,
        "hardware": {
            "name": memory.target.name,
            "chip": memory.target.chip,
            "memory_bytes": memory.target.memory_bytes,
            "gpu_bytes": memory.target.gpu_bytes,
            "bandwidth_gb_s": memory.target.bandwidth_gb_s,
            "bandwidth_measured": memory.target.measured,
            "reserve_bytes": memory.reserve,
            "limit_bytes": memory.limit,
        },
        "source_bytes": report.source_bytes,
        "weights": {
            "size_bytes": weights.size_bytes,
            "memory_bytes": report.loaded_bytes,
            "parameters": weights.weights,
            "active_parameters": weights.active_weights,
            "bits_per_weight": 8 * weights.size_bytes / max(weights.weights, 1),
            "experts": weights.experts,
            "active_experts": weights.active if weights.experts else None,
            "experts_bytes": weights.experts_bytes,
            "token_bytes": weights.token_bytes,
            "by_role": weights.by_role(),
        },
        "kv": {
            "packed": question.kv.label() if question.kv else None,
            "prefill_step": question.step,
            "token_bytes": sum(kind.token_bytes for kind in report.kinds),
            "kinds": [dataclasses.asdict(kind) for kind in report.kinds],
        },
        "contexts": [_row_document(row) for row in report.rows],
        "bits": [
            {"bits": row.bits, **_row_document(row), "largest_context": row.largest_context} for row in report.bits
        ],
        "remedies": [dataclasses.asdict(remedy) for remedy in report.remedies],
        "notes": report.notes,
    }


def _row_document(row: "Row") -> dict[str, Any]:
    need = row.need
    return {
        "context": need.context,
        "weights_bytes": need.weights,
        "cache_bytes": need.cache,
        "prompt_bytes": need.prompt,
        "total_bytes": need.total,
        "fits": row.fits,
        "tokens_per_second_at_best": row.tokens_per_second,
    }


def text(report: "Report", verbose: bool) -> str:
    """The answer for people."""
    parts = [_facts(report), render([_shown(row) for row in report.rows], "table"), _answer(report)]
    if report.bits and (verbose or report.question.fit or report.verdict != "fits"):
        parts.insert(2, render([_shown_bits(row) for row in report.bits], "table"))
    if verbose:
        roles = [{**row, "bytes": human_bytes(row["bytes"])} for row in report.weights.by_role()]
        kinds = [
            {
                "caches": kind.caches,
                "of": kind.name,
                "heads": kind.shape,
                "a token": human_bytes(kind.token_bytes),
                f"at {report.judged}": human_bytes(kind.size_bytes),
            }
            for kind in report.kinds
        ]
        parts[1:1] = [render(roles, "table"), render(kinds, "table")]
    return "\n\n".join(parts)


def _facts(report: "Report") -> str:
    weights, memory = report.weights, report.question.memory
    bits = 8 * weights.size_bytes / max(weights.weights, 1)
    size = f"{human_bytes(report.loaded_bytes)}, {human_count(weights.weights)} parameters"
    lines = {
        "model": report.question.model if report.packed else report.convert,
        "machine": _machine(memory.target),
        "limit": f"{human_bytes(memory.limit)} for the model",
        "weights": f"{size} in {bits:.2f} bits each" if report.loaded_bytes == weights.size_bytes else size,
    }
    if weights.experts:
        run = "" if weights.active is None else f", {weights.active} of {weights.experts} run for a token"
        lines["experts"] = f"{human_bytes(weights.experts_bytes)} of them{run}"
    packed = f" as {report.question.kv.label()}" if report.question.kv else ""
    token = human_bytes(sum(kind.token_bytes for kind in report.kinds))
    kinds = ", ".join(f"{kind.caches} x {kind.name}" for kind in report.kinds if kind.size_bytes)
    lines["cache"] = f"{token} a token{packed} ({kinds})"
    return facts(lines)


def _machine(target: "Target") -> str:
    memory = f"{target.memory_bytes / 2**30:.0f} GB"
    gpu = "" if target.gpu_bytes is None else f", {human_bytes(target.gpu_bytes)} for its GPU"
    rate = "" if target.bandwidth_gb_s is None else f", {target.bandwidth_gb_s:.3g} GB/s"
    return f"{target.chip}, {memory}{gpu}{rate}{' measured' if target.measured else ''}"


def _shown(row: "Row") -> dict[str, Any]:
    need = row.need
    return {
        "context": need.context,
        "weights": human_bytes(need.weights),
        "cache": human_bytes(need.cache),
        "prompt": human_bytes(need.prompt),
        "in all": human_bytes(need.total),
        "fits": row.fits,
        "tokens/s": "?" if row.tokens_per_second is None else f"< {_round_up(row.tokens_per_second)}",
    }


def _shown_bits(row: "Row") -> dict[str, Any]:
    shown = _shown(row)
    del shown["context"], shown["cache"], shown["prompt"]
    return {"bits": row.bits, **shown, "longest context": row.largest_context}


def _round_up(rate: float) -> str:
    """Two digits: a bound needs no more, and must not be rounded down."""
    import math

    if rate < 10:
        return f"{math.ceil(rate * 10) / 10:.1f}"
    digits = 10 ** max(len(str(int(rate))) - 2, 0)
    return str(math.ceil(rate / digits) * digits)


def _answer(report: "Report") -> str:
    need = next(row.need for row in report.rows if row.need.context == report.judged)
    limit = report.question.memory.limit
    if report.verdict == "fits":
        whole = report.largest_context == report.max_context
        longest = "all of its context fits" if whole else f"up to {report.largest_context} tokens of context fit"
        lines = [f"It fits: {human_bytes(need.total)} of {human_bytes(limit)}, and {longest}."]
        if report.question.fit:
            lines.append(f"  {report.convert}")
        return "\n".join(lines)
    lines = [
        f"It does not fit: {human_bytes(need.total)} for {report.judged} tokens of context, "
        f"where {human_bytes(limit)} are."
    ]
    if report.remedies:
        lines[0] += " It would"
    for remedy in report.remedies:
        lines.append(f"- {remedy.text}")
        if remedy.command:
            lines.append(f"    {remedy.command}")
    return "\n".join(lines)
