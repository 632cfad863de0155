"""`tq bench --sweep cache`: what memory for experts and ways to use it would bring, without running each."""

from pathlib import Path
from typing import Any

import typer

from tq.commands import groups
from tq.errors import TQError, UsageError
from tq.output import Output, human_bytes, render

# What else a person may say; other options of tq bench are for what is measured there.
OPTIONS = {"model", "revision", "trust_remote_code", "sweep", "context", "text", "trace", "disk_gb_s", "memory_gb_s"}
OPTIONS |= {"format", "json", "quiet", "verbose"}
TOKENS = "512"
SHARES = [0.05, 0.1, 0.25, 0.5, 0.75]


def refuse_others(context: typer.Context) -> None:
    """Raises UsageError if an option is given that does nothing here."""
    for parameter in context.command.params:
        name = parameter.name or ""
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE" and name not in OPTIONS:
            raise UsageError(
                f"{parameter.opts[0]} is not for --sweep cache", "it takes --text, --context and bandwidths"
            )


def sweep_cache(
    out: Output,
    style: str,
    model: list[str],
    text: Path | None,
    trace: Path | None,
    context: str | None,
    disk_gb_s: float | None,
    memory_gb_s: float | None,
    loading: groups.Loading,
) -> None:
    """Record what a model's layers choose for a text, replay it, and print a table.

    Raises:
        UsageError: A value is not valid.
    """
    tokens = context or TOKENS
    if len(model) > 1:
        raise UsageError(f"--sweep cache is for one model, not {len(model)}")
    if not tokens.isdecimal() or int(tokens) < 8:
        raise UsageError(f"--context {tokens}: for --sweep cache it is one number of tokens, 8 or more")
    if trace and (text or context):
        raise UsageError("--trace takes the place of a text: leave --text and --context out")
    for name, value in (("--disk-gb-s", disk_gb_s), ("--memory-gb-s", memory_gb_s)):
        if value is not None and value <= 0:
            raise UsageError(f"{name} must be more than 0")
    from tq.cpu import blas

    out.detail(f"BLAS: {blas.enable().reason}")
    from tq.engine.model.load import load
    from tq.engine.ops.selftest import read_bandwidth
    from tq.engine.run.cache_sweep import CacheRow, compare, disk_bandwidth, record
    from tq.engine.run.evaluate import default_text, read_text
    from tq.engine.stream.settings import StreamSettings
    from tq.engine.stream.trace import Trace

    recorded = Trace.load(trace) if trace else None
    name, words = (str(trace or text), read_text(text) if text else "") if trace or text else default_text()
    loaded = load(model[0], **vars(loading), stream=StreamSettings())
    pager = loaded.pager
    assert pager is not None
    for note in loaded.notes:
        out.say(note)
    disk = disk_gb_s or disk_bandwidth(pager)
    memory = memory_gb_s or read_bandwidth()
    if memory is None:
        raise UsageError("nothing here can tell the bandwidth of memory", "give it with --memory-gb-s")
    if recorded is None:
        events = out.follow(record(loaded, pager, words, int(tokens)), "Recording")
        recorded = next(event for event in events if isinstance(event, Trace))
    elif not recorded.fits(pager.record().trace()):
        raise TQError(f"{trace} is a trace of another model than {model[0]}")
    other = loaded.size_bytes - recorded.experts_bytes
    found = out.follow(compare(recorded, SHARES, other, disk, memory), "Replaying")
    rows = [event.to_dict() for event in found if isinstance(event, CacheRow)]
    document = {
        "model": model[0],
        "text": name,
        "tokens": recorded.n_tokens,
        "layers": len(recorded.chosen),
        "experts_bytes": recorded.experts_bytes,
        "active_bytes": recorded.active_bytes,
        "disk_gb_s": disk,
        "memory_gb_s": memory,
        "rows": rows,
    }
    if style == "json":
        out.result(document, "")
    elif style == "csv":
        out.result(None, render(rows, "csv"))
    else:
        table = render([_shown(row) for row in rows], style)
        out.result(None, table if style == "markdown" else f"{_heading(document)}\n\n{table}")


def _heading(document: dict[str, Any]) -> str:
    return (
        f"{document['layers']} layers with experts of {human_bytes(document['experts_bytes'])}, of which a token runs "
        f"{human_bytes(document['active_bytes'])}; {document['tokens']} tokens of {document['text']}; "
        f"the disk reads {document['disk_gb_s']:.1f} GB/s, memory {document['memory_gb_s']:.1f} GB/s"
    )


def _shown(row: dict[str, Any]) -> dict[str, Any]:
    return {
        "budget": human_bytes(row["budget_bytes"]),
        "of experts": f"{row['share']:.0%}",
        "policy": row["policy"],
        "hit rate": f"{row['hit_rate']:.1%}",
        "read per token": human_bytes(int(row["read_bytes_per_token"])),
        "predicted tokens/s": round(row["tokens_per_second"], 2),
    }
