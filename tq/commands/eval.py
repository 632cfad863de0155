"""`tq eval`: perplexity of a model on a text, and how far it is from a reference model."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tq.commands import groups, options
from tq.output import Output, facts

if TYPE_CHECKING:
    from tq.engine.run.evaluate import EvalResult

EPILOG = options.examples(
    "tq eval -m MODEL-tq4 --reference MODEL",
    "tq eval -m MODEL --data text.txt --seq-len 1024 --json",
)


@groups.flat
def eval(
    *,
    model: options.Model,
    reference: Annotated[
        str | None, typer.Option("--reference", metavar="MODEL", help="Also measure how far MODEL is from this one.")
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option("--data", metavar="FILE", help="A text file; without it, a text that ships with tq."),
    ] = None,
    seq_len: Annotated[int, typer.Option("--seq-len", metavar="N", help="Tokens in a window.")] = 512,
    samples: Annotated[
        int | None, typer.Option("--samples", metavar="N", help="Use only the first N windows of the text.")
    ] = None,
    packing: groups.Packing,
    profile: options.Profile = None,
    loading: groups.Loading,
    printing: groups.Printing,
) -> None:
    """Measure how well a model predicts a text.

    Perplexities are comparable only for the same text, tokenizer and --seq-len.
    """
    out = Output(**vars(printing))
    configured = options.read_settings(out, profile=profile, **vars(packing))

    from tq.cpu import blas

    out.detail(f"BLAS: {blas.enable().reason}")
    from tq.engine.model.load import load
    from tq.engine.run.evaluate import EvalResult, default_text, evaluate, read_text
    from tq.engine.run.generate import packing_notes

    name, text = (str(data), read_text(data)) if data else default_text()
    kv = configured.kv
    loaded = load(model, **vars(loading))
    other = load(reference, trust_remote_code=loading.trust_remote_code) if reference else None
    packed = [note.message for note in packing_notes(loaded.model, kv)]
    for note in dict.fromkeys(loaded.notes + (other.notes if other else []) + packed):
        out.say(note)
    events = evaluate(loaded, text, seq_len=seq_len, samples=samples, reference=other, kv=kv, data=name)
    (result,) = [event for event in out.follow(events, "Evaluating") if isinstance(event, EvalResult)]
    document = {**result.to_dict(), "model": model, "reference": reference}
    out.result(document, facts({"model": model, "text": window(result), **quality(result)}))


def window(result: "EvalResult") -> str:
    """Over what the numbers of `quality` were measured."""
    return f"{result.data}, {result.windows} windows of {result.seq_len} tokens"


def quality(result: "EvalResult") -> dict[str, str]:
    """The numbers of an evaluation as lines for a person, by their names."""
    lines = {"perplexity": with_error(result.perplexity, result.perplexity_error)}
    if result.reference is not None:
        lines |= {
            "perplexity of reference": with_error(result.reference_perplexity, result.reference_perplexity_error),
            "KL mean": with_error(result.kl_mean, result.kl_mean_error),
            "KL median, p99, max": ", ".join(
                f"{value:.4g}" for value in (result.kl_median, result.kl_p99, result.kl_max) if value is not None
            ),
            "same first choice": with_error(result.top1_agreement, result.top1_agreement_error, " %", 100),
        }
    return lines


def with_error(value: float | None, error: float | None, unit: str = "", factor: float = 1) -> str:
    """`16.72 ± 0.31`; a single window has no error to show."""
    if value is None:
        return ""
    spread = "" if error is None else f" ± {error * factor:.2g}"
    return f"{value * factor:.4g}{spread}{unit}"
