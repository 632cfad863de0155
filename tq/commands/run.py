"""`tq run`: one prompt, from an argument or a pipe, answered on stdout. Conversations are another command's."""

import dataclasses
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from tq.commands import groups, options
from tq.errors import TQError, UsageError
from tq.output import Output, human_bytes

if TYPE_CHECKING:
    from tq.engine.machine.settings import Settings
    from tq.engine.stream.settings import StreamSettings

EPILOG = options.examples(
    'tq run -m SmolLM2-135M-Instruct-tq4 "What is gravity?"',
    'tq run -m MODEL "Summarise this text:" < letter.txt',
    "tq run -m MODEL --raw --temp 0.7 --seed 1 -n 100 'Once upon a time'",
)


@groups.flat
def run(
    prompt: options.Prompt = None,
    *,
    model: options.Model,
    asking: groups.Asking,
    sampling: groups.Sampling,
    caching: groups.Caching,
    profile: options.Profile = None,
    loading: groups.Loading,
    printing: groups.Printing,
) -> None:
    """Answer one prompt.

    The answer goes to stdout as it is made. Text piped in is added below the prompt.
    """
    out = Output(**vars(printing))
    configured = options.read_settings(out, profile=profile, **vars(caching))
    answer(out, model, prompt, asking, sampling, loading, configured)


def answer(
    out: Output,
    model: str,
    prompt: str | None,
    asking: groups.Asking,
    sampling: groups.Sampling,
    loading: groups.Loading,
    configured: "Settings",
    *,
    stream: "StreamSettings | None" = None,
    trace: Path | None = None,
) -> None:
    """Load a model, let it answer and show that: what `tq run` and `tq stream` have in common.

    Args:
        prompt: As an argument; None: in another way.
        stream: Leave the experts of the model on the disk.
        trace: Where to write which of them ran.
    """
    question, think = read_question(prompt, asking.prompt_option), not asking.no_think

    from tq.cpu import blas

    out.detail(f"BLAS: {blas.enable().reason}")
    from tq.engine.model.load import load
    from tq.engine.run.generate import (
        Finished,
        GenerateOptions,
        encode_prompt,
        generate,
        packing_notes,
        prompt_notes,
    )

    chosen = GenerateOptions(
        max_tokens=asking.max_tokens, **sampling.asked, seed=asking.seed, prefill_step=configured.prefill_step
    )
    kv = configured.kv
    loaded = load(model, **vars(loading), stream=stream)
    asked = prompt_notes(loaded.tokenizer, raw=asking.raw, think=think) + packing_notes(loaded.model, kv)
    for message in [*loaded.notes, *(note.message for note in asked)]:
        out.say(message)
    if stream is None:
        options.say_if_tight(out, loaded.size_bytes)
    tokens = encode_prompt(loaded.tokenizer, question, system=asking.system, raw=asking.raw, think=think)
    continues = asking.raw or not loaded.tokenizer.has_chat_template
    recorder = loaded.pager.record() if loaded.pager and trace else None

    text = ""
    try:
        for event in generate(loaded, tokens, chosen, kv, continues=continues):
            if isinstance(event, Finished):
                finished = event
                continue
            text += event.text
            if not out.json:
                out.stream(event.text)
    finally:
        if not out.json and not text.endswith("\n"):
            out.stream("\n")
    report = loaded.pager.report() if loaded.pager else None
    if recorder is not None and trace is not None:
        recorder.trace().save(trace)
    if out.json:
        document = {"model": model, "text": text, **dataclasses.asdict(finished)}
        out.result(document if report is None else {**document, "stream": dataclasses.asdict(report)}, "")
    if asking.stats:
        out.say(
            f"prompt {finished.prompt_tokens} tokens at {finished.prefill_tokens_per_second:.1f}/s, "
            f"answer {finished.tokens} tokens at {finished.decode_tokens_per_second:.1f}/s, "
            f"peak memory {human_bytes(finished.peak_memory_bytes)}"
        )
        if report is not None:
            out.say(
                f"experts in {human_bytes(report.budget_bytes)}: {report.hit_rate:.1%} of those wanted were there, "
                f"{human_bytes(int(report.read_bytes_per_token))} read for a token at {report.read_gb_s:.1f} GB/s, "
                f"{human_bytes(report.prompt_read_bytes)} for the prompt"
            )
            if report.early:
                right = f"{report.early_used / report.early:.0%}"
                pays = {None: "", True: ": faster here", False: ": not faster here"}[report.early_pays]
                out.say(f"{report.early} experts were guessed, {right} rightly{pays}")


def read_question(argument: str | None, option: str | None) -> str:
    """The prompt given, with what is piped in below it."""
    if argument is not None and option is not None:
        raise UsageError("the prompt is given twice, as an argument and with --prompt: use one of them")
    given = option if argument is None else argument
    piped = "" if sys.stdin is None or sys.stdin.isatty() else _read_stdin()
    question = "\n\n".join(part for part in (given, piped) if part and part != "-")
    if not question:
        raise UsageError("there is no prompt", hint='tq run -m MODEL "What is gravity?", or pipe a text in')
    return question


def _read_stdin() -> str:
    try:
        return sys.stdin.read().strip()
    except UnicodeDecodeError as error:
        raise TQError("what was piped in is not text in UTF-8") from error
