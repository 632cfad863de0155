"""`tq stream`: one prompt, answered by a mixture of experts that stays on the disk. All else is as in `tq run`."""

from pathlib import Path
from typing import Annotated

import typer

from tq.commands import groups, options
from tq.commands.run import answer
from tq.output import Output

EPILOG = options.examples(
    'tq stream -m Qwen3-30B-A3B-tq4 "What is gravity?"',
    "tq stream -m MODEL --budget 4GB --stats 'Why is the sky blue?'",
    "tq stream -m MODEL --budget 20GB --workers 16 < letter.txt",
)


@groups.flat
def stream(
    prompt: options.Prompt = None,
    *,
    model: options.Model,
    budget: options.Budget = None,
    workers: Annotated[
        int | None, typer.Option("--workers", metavar="N", help="Reads from the disk at the same time.  [default: 8]")
    ] = None,
    policy: Annotated[
        str | None,
        typer.Option(
            "--policy",
            metavar="NAME",
            help="Experts that stay: lru, the last; lfu, the most used; lrfu, between.  [default: lrfu]",
        ),
    ] = None,
    prefetch: Annotated[
        str | None,
        typer.Option(
            "--prefetch",
            metavar="WHEN",
            help="Guess and read experts early: on, off, or auto: if it helps.  [default: auto]",
        ),
    ] = None,
    max_active_experts: Annotated[
        int | None,
        typer.Option("--max-active-experts", metavar="N", help="Run only so many experts for a token: a worse answer."),
    ] = None,
    trace: Annotated[
        Path | None,
        typer.Option("--trace", metavar="FILE", help="Write down which experts ran, for tq bench --sweep cache."),
    ] = None,
    asking: groups.Asking,
    sampling: groups.Sampling,
    caching: groups.Caching,
    profile: options.Profile = None,
    loading: groups.Loading,
    printing: groups.Printing,
) -> None:
    """Answer one prompt with a mixture of experts that is larger than memory.

    Experts are read from the disk when a token needs them, and kept as far as they fit. Answers are those of tq run.
    """
    out = Output(**vars(printing))
    configured = options.read_settings(
        out, profile=profile, **vars(caching), budget=budget, workers=workers, policy=policy, prefetch=prefetch
    )
    answer(
        out,
        model,
        prompt,
        asking,
        sampling,
        loading,
        configured,
        stream=options.stream_settings(configured, max_active_experts),
        trace=trace,
    )
