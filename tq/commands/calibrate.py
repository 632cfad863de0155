"""`tq calibrate`: what the matrices of a model read, kept for conversions to several bit widths."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tq.commands import groups, options
from tq.output import Output, facts, human_bytes, human_seconds

if TYPE_CHECKING:
    from tq.engine.model.plan import Plan
    from tq.engine.run.calibrate.estimate import Estimate
    from tq.engine.run.calibrate.text import Sample

EPILOG = options.examples(
    "tq calibrate -m HuggingFaceTB/SmolLM2-135M-Instruct -o calibration",
    "tq convert -m ./model --bits 3 --calibration calibration",
    "tq calibrate -m ./model -o calibration --text my.txt --dry-run",
)

LOW_BITS = 4  # on SmolLM2 at 3 bits, the divergence is a quarter with calibration


@groups.flat
def calibrate(
    *,
    model: options.Model,
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FOLDER", help="Where to write.")],
    text: Annotated[
        Path | None, typer.Option("--text", metavar="FILE", help="What to read; by default a text that ships with tq.")
    ] = None,
    tokens: Annotated[int | None, typer.Option("--tokens", metavar="N", help="How much.  [default: 16384]")] = None,
    seq_len: Annotated[
        int | None, typer.Option("--seq-len", metavar="N", help="In windows of so many tokens.  [default: 512]")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what it would take, and stop.")] = False,
    restart: Annotated[
        bool, typer.Option("--restart", help="Throw away what an interrupted run left, and start over.")
    ] = False,
    loading: groups.Loading,
    printing: groups.Printing,
) -> None:
    """Measure what the matrices of a model read.

    Only for several conversions of one model: tq convert --calibrate does both at once, better, and keeps no files.
    """
    say = Output(**vars(printing))

    from tq.cpu import blas

    say.detail(f"BLAS: {blas.enable().reason}")
    from tq.engine.machine.facts import free_disk_bytes
    from tq.engine.model.plan import make_plan
    from tq.engine.model.recipe import Recipe
    from tq.engine.model.sources import open_source
    from tq.engine.run.calibrate.collect import collect, collected_bytes
    from tq.engine.run.calibrate.estimate import estimate
    from tq.engine.run.calibrate.text import sample_windows

    source = open_source(model, **vars(loading))
    plan = make_plan(source, Recipe(), trust_remote_code=loading.trust_remote_code)
    windows, sample = sample_windows(
        source, text, tokens=tokens, seq_len=seq_len, trust_remote_code=loading.trust_remote_code
    )
    needed = estimate(plan, sample.tokens, sample.seq_len, encodes=False)
    size, free = collected_bytes(plan), free_disk_bytes(out)
    document = {"model": model, "out": str(out), "free_disk_bytes": free, "size_bytes_at_most": size}
    document |= describe(sample, needed)
    shown = {"model": model, "output": out, "size": f"at most {human_bytes(size)}", **lines(sample, needed)}
    if dry_run:
        say.result(document, facts({**shown, "free disk": human_bytes(free)}))
        return
    say.say(facts({**shown, "free disk": human_bytes(free)}))
    work = collect(plan, windows, sample, out, restart=restart, trust_remote_code=loading.trust_remote_code)
    try:
        (done,) = say.follow(work, "Calibrating")
    except KeyboardInterrupt:
        say.warn("stopped; the same command goes on from here, with --restart it starts over")
        raise
    report = {"size_bytes": done.size_bytes, "matrices": done.matrices, "seconds": done.seconds}
    taken = f"{human_bytes(done.size_bytes)} for {done.matrices} matrices in {human_seconds(done.seconds)}"
    say.result({**document, **report}, f"{out}: {taken}")
    say.say(f"Use it: tq convert -m {model} --bits 3 --calibration {out}")


def describe(sample: "Sample", needed: "Estimate") -> dict[str, Any]:
    """Text and needs of a calibration, as JSON."""
    return {
        "calibration_text": sample.to_json(),
        "calibration_memory_bytes": needed.peak_memory_bytes,
        "calibration_seconds": round(needed.seconds, 1),
    }


def lines(sample: "Sample", needed: "Estimate") -> dict[str, str]:
    """The same for a person."""
    windows = sample.tokens // sample.seq_len
    return {
        "calibration text": f"{sample.text}, {windows} windows of {sample.seq_len} tokens",
        "calibration memory": f"about {human_bytes(needed.peak_memory_bytes)}",
        "calibration time": f"{human_seconds(needed.seconds)} or more",
    }


def conversion_encoder(
    plan: "Plan",
    say: Output,
    *,
    calibrate: bool,
    calibration: Path | None,
    text: Path | None,
    tokens: int | None,
    trust_remote_code: bool,
) -> tuple[Any, dict[str, Any], dict[str, str]]:
    """What the calibration options of `tq convert` ask for.

    Returns:
        The encoder, and what it reads and needs: as JSON, and for a person.

    Raises:
        UsageError: They contradict each other.
    """
    from tq.engine.model.encoding import Encoder
    from tq.errors import UsageError

    if calibration is not None:
        if calibrate or text is not None or tokens is not None:
            raise UsageError(
                "--calibration takes a finished calibration, --calibrate makes a new one", "leave one of them out"
            )
        from tq.engine.model.calibration import CalibratedEncoder

        finished = CalibratedEncoder(calibration)
        for note in finished.check(plan):
            say.say(note)
        return finished, {"calibration": str(calibration)}, {"calibration": str(calibration)}
    if not calibrate:
        if text is not None or tokens is not None:
            raise UsageError("--calibration-text and --calibration-tokens need --calibrate", "add --calibrate")
        if any(tensor.spec is not None and tensor.spec.bits < LOW_BITS for tensor in plan.tensors):
            say.say(f"below {LOW_BITS} bits, --calibrate makes a much better model of the same size, in more time")
        return Encoder(), {}, {}
    from tq.engine.run.calibrate.estimate import estimate
    from tq.engine.run.calibrate.one_pass import OnePassEncoder
    from tq.engine.run.calibrate.text import sample_windows

    windows, sample = sample_windows(plan.source, text, tokens=tokens, trust_remote_code=trust_remote_code)
    needed = estimate(plan, sample.tokens, sample.seq_len, encodes=True)
    encoder = OnePassEncoder(windows, sample, trust_remote_code=trust_remote_code)
    disk = encoder.disk_bytes(plan)
    document = {**describe(sample, needed), "calibration_disk_bytes": disk}
    return encoder, document, {**lines(sample, needed), "calibration disk": f"{human_bytes(disk)} until it is done"}
