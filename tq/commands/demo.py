"""`tq demo`: everything in two minutes, on a small model: convert it, measure it, let it answer."""

import tempfile
from pathlib import Path
from typing import Annotated

import typer

from tq import settings
from tq.commands import options
from tq.commands.convert import describe
from tq.commands.eval import quality, window
from tq.output import Output, facts, human_bytes

EPILOG = options.examples("tq demo", "tq demo --bits 3 --keep ./demo-model")
# Two models pass over these windows: half a minute on two cores.
SEQ_LEN = 256
WINDOWS = 8


def demo(
    *,
    bits: Annotated[str, typer.Option("--bits", "-b", metavar="BITS", help="1 to 8, ternary, or none.")] = "4",
    keep: Annotated[
        Path | None, typer.Option("--keep", metavar="FOLDER", help="Keep the converted model in this new folder.")
    ] = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Convert a small model, compare it with its source and let it answer."""
    out = Output(json=json, quiet=quiet, verbose=verbose)

    from tq.cpu import blas

    out.detail(f"BLAS: {blas.enable().reason}")
    from tq.engine.model.convert import convert
    from tq.engine.model.load import load
    from tq.engine.model.plan import make_plan
    from tq.engine.model.recipe import Recipe
    from tq.engine.model.sources import open_source
    from tq.engine.run.demo import QUESTION, find_model
    from tq.engine.run.evaluate import EvalResult, default_text, evaluate
    from tq.engine.run.generate import GenerateOptions, Token, encode_prompt, generate

    (model,) = out.follow(find_model(settings.cache_dir()), "Fetching")
    plan = make_plan(open_source(model), Recipe.from_options(bits=bits))
    # Before the conversion, which uses the plan up.
    document = {key: value for key, value in describe(plan).items() if key != "tensors"}
    with tempfile.TemporaryDirectory(prefix="tq-demo-") as folder:
        path = keep or Path(folder) / "model"
        for _ in out.follow(convert(plan, path), "Converting"):
            pass
        converted, source = load(str(path)), load(model)
        name, text = default_text()
        events = evaluate(converted, text, seq_len=SEQ_LEN, samples=WINDOWS, reference=source, data=name)
        (result,) = [event for event in out.follow(events, "Evaluating") if isinstance(event, EvalResult)]
        pairs = {
            "model": model,
            "size": f"{human_bytes(plan.source_bytes)} -> {human_bytes(plan.size_bytes)}",
            "bits per weight": f"{plan.bits_per_weight:.2f}",
            "text": window(result),
            **quality(result),
        }
        if not json:
            out.stream(f"{facts(pairs)}\n\n> {QUESTION}\n")
        answer = ""
        tokens = encode_prompt(converted.tokenizer, QUESTION)
        for event in generate(converted, tokens, GenerateOptions(max_tokens=80)):
            if isinstance(event, Token):
                answer += event.text
                if not json:
                    out.stream(event.text)
    if json:
        out.result({"model": model, **document, "eval": result.to_dict(), "answer": answer}, "")
        return
    out.stream("\n")
    if keep:
        out.say(f'\nTry it: tq run -m {keep} "Write a short poem about the sea"')
