"""`tq convert`: a checkpoint in, a quantized checkpoint out. The plan comes first; the work can be interrupted."""

import dataclasses
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tq.commands import groups, options
from tq.commands.calibrate import conversion_encoder
from tq.errors import UsageError
from tq.output import Output, facts, human_bytes, human_count, human_seconds, render

if TYPE_CHECKING:
    from tq.engine.model.plan import Plan

EPILOG = options.examples(
    "tq convert -m HuggingFaceTB/SmolLM2-135M-Instruct --bits 4",
    "tq convert -m ./model -o ./model-3bit --bits 3 --calibrate --protect 0-1",
    "tq convert -m model.gguf --recipe 16gb --dry-run",
)


@groups.flat
def convert(
    *,
    model: Annotated[
        str | None,
        typer.Option(
            "--model", "-m", metavar="MODEL", help="A model folder, a GGUF file or a Hugging Face Hub id.  [required]"
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", metavar="FOLDER", help="Where to write; by default a name made of model and bits."),
    ] = None,
    weights: groups.Quantizing,
    calibrate: Annotated[
        bool, typer.Option("--calibrate", help="Let a text go through the model first: better, above all below 5 bits.")
    ] = False,
    calibration_text: Annotated[
        Path | None,
        typer.Option("--calibration-text", metavar="FILE", help="Which text; by default one that ships with tq."),
    ] = None,
    calibration_tokens: Annotated[
        int | None, typer.Option("--calibration-tokens", metavar="N", help="How much of it.  [default: 16384]")
    ] = None,
    calibration: Annotated[
        Path | None, typer.Option("--calibration", metavar="FOLDER", help="Use what tq calibrate has measured.")
    ] = None,
    dtype: options.Dtype = None,
    format: options.CheckpointFormat = "tq",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the plan, with exact sizes, and stop.")] = False,
    restart: Annotated[
        bool, typer.Option("--restart", help="Throw away what an interrupted run left, and start over.")
    ] = False,
    loading: groups.Loading,
    printing: groups.Printing,
    hf_path: Annotated[str | None, typer.Option("--hf-path", hidden=True)] = None,
    mlx_path: Annotated[Path | None, typer.Option("--mlx-path", hidden=True)] = None,
) -> None:
    """Quantize a model.

    Needs the memory of one tensor and one output file, whatever the size of the model; with --calibrate also that of
    the text's activations. An interrupted conversion goes on where it stopped when the same command is given again.
    """
    say = Output(**vars(printing))
    model = model or hf_path
    if model is None:
        raise UsageError("convert needs a model", hint="tq convert -m MODEL; tq convert --help lists the options")
    recipe = options.read_settings(say, recipe=weights.recipe).recipe
    out = out or mlx_path or default_out(model, format, bits=weights.bits, codec=weights.codec, recipe=recipe)

    from tq.cpu import blas

    say.detail(f"BLAS: {blas.enable().reason}")
    from tq.engine.machine.facts import free_disk_bytes
    from tq.engine.model.convert import convert as carry_out
    from tq.engine.model.plan import make_plan
    from tq.engine.model.recipe import Recipe
    from tq.engine.model.sources import open_source

    chosen = Recipe.from_options(**{**vars(weights), "recipe": recipe})
    source = open_source(model, **vars(loading))
    plan = make_plan(source, chosen, dtype=dtype, format=format, trust_remote_code=loading.trust_remote_code)
    free = free_disk_bytes(out)
    for note in plan.notes:
        say.say(note)
    encoder, more, lines = conversion_encoder(
        plan,
        say,
        calibrate=calibrate,
        calibration=calibration,
        text=calibration_text,
        tokens=calibration_tokens,
        trust_remote_code=loading.trust_remote_code,
    )
    document = {"model": model, "out": str(out), "free_disk_bytes": free, **describe(plan), **more}
    shown = summary(model, out, plan, free, lines)
    if dry_run:
        table = render(by_tensor(plan) if printing.verbose else plan.by_role(), "table")
        say.result(document, f"{table}\n\n{shown}")
        return

    say.say(shown)
    try:
        (done,) = say.follow(carry_out(plan, out, restart=restart, encoder=encoder), "Converting")
    except KeyboardInterrupt:
        say.warn("stopped; the same command goes on from here, with --restart it starts over")
        raise
    rate = done.weights / done.seconds
    text = f"{out}: {human_bytes(done.size_bytes)} in {human_seconds(done.seconds)} ({human_count(rate)} weights/s)"
    report = {"seconds": done.seconds, "encode_seconds": done.encode_seconds, "weights_per_second": rate}
    say.result({**document, **report}, text)
    say.say(f'Try it: tq run -m {shlex.quote(str(out))} "What is gravity?"')


def default_out(model: str, format: str, *, bits: str | None, codec: str | None, recipe: str | None) -> Path:
    """A folder here, named for the model and what makes it different: `SmolLM2-135M-Instruct-tq4`."""
    name = Path(model).name.removesuffix(".gguf")
    what = bits or (Path(recipe).stem if recipe else codec) or "4"
    return Path(f"{name}-{format}{what}" if what.isdigit() else f"{name}-{format}-{what}")


def describe(plan: "Plan") -> dict[str, Any]:
    """The plan as JSON, tensor by tensor."""
    return {
        "source_bytes": plan.source_bytes,
        "size_bytes": plan.size_bytes,
        "weights": plan.weights,
        "bits_per_weight": plan.bits_per_weight,
        "quantized_bits_per_weight": plan.quantized_bits_per_weight,
        "peak_memory_bytes": plan.peak_memory_bytes,
        "dtype": plan.dtype,
        "tensors": [
            {
                "name": tensor.name,
                "role": tensor.role.value,
                "spec": dataclasses.asdict(tensor.spec) if tensor.spec else None,
                "shape": list(tensor.shape),
                "size_bytes": tensor.size_bytes,
            }
            for tensor in plan.tensors
        ],
    }


def by_tensor(plan: "Plan") -> list[dict[str, Any]]:
    return [
        {
            "tensor": tensor.name,
            "role": tensor.role.value,
            "shape": "x".join(map(str, tensor.shape)),
            "codes": tensor.spec.label() if tensor.spec else f"kept ({plan.dtype})",
            "bytes": tensor.size_bytes,
        }
        for tensor in plan.tensors
    ]


def summary(model: str, out: Path, plan: "Plan", free: int, more: dict[str, str]) -> str:
    quantized = plan.quantized_bits_per_weight
    return facts(
        {
            "model": model,
            "output": out,
            "size": f"{human_bytes(plan.source_bytes)} -> {human_bytes(plan.size_bytes)}",
            "bits per weight": f"{plan.bits_per_weight:.2f}"
            + (f" ({quantized:.2f} in quantized matrices)" if quantized is not None else ""),
            "peak memory": f"about {human_bytes(plan.peak_memory_bytes)}",
            "free disk": human_bytes(free),
            **more,
        }
    )
