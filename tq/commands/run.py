"""`tq run`: one prompt, from an argument or a pipe, answered on stdout. Conversations are another command's."""

import dataclasses
import sys
from typing import Annotated

import typer

from tq.commands import options
from tq.errors import TQError, UsageError
from tq.output import Output, human_bytes

EPILOG = options.examples(
    'tq run -m SmolLM2-135M-Instruct-tq4 "What is gravity?"',
    'tq run -m MODEL "Summarise this text:" < letter.txt',
    "tq run -m MODEL --raw --temp 0.7 --seed 1 -n 100 'Once upon a time'",
)


def run(
    prompt: Annotated[
        str | None,
        typer.Argument(metavar="PROMPT", show_default=False, help="The question; - or none reads it from stdin."),
    ] = None,
    *,
    model: options.Model,
    prompt_option: Annotated[
        str | None, typer.Option("--prompt", "-p", metavar="TEXT", help="The same as PROMPT.")
    ] = None,
    system: options.System = None,
    raw: Annotated[bool, typer.Option("--raw", help="Continue the text; no chat template.")] = False,
    no_think: options.NoThink = False,
    max_tokens: options.MaxTokens = 512,
    min_tokens: options.MinTokens = 0,
    temp: options.Temp = None,
    top_p: options.TopP = None,
    top_k: options.TopK = None,
    min_p: options.MinP = None,
    repetition_penalty: options.RepetitionPenalty = None,
    repetition_context: options.RepetitionContext = 64,
    seed: options.Seed = None,
    stop: options.Stop = None,
    kv_bits: options.KVBits = None,
    kv_k_bits: options.KVKeyBits = None,
    kv_v_bits: options.KVValueBits = None,
    kv_sink: options.KVSink = None,
    kv_group_size: options.KVGroupSize = None,
    kv_codec: options.KVCodec = None,
    stats: Annotated[bool, typer.Option("--stats", help="Say how fast it was and what memory it took.")] = False,
    revision: options.Revision = None,
    trust_remote_code: options.TrustRemoteCode = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Answer one prompt.

    The answer goes to stdout as it is made. Text piped in is added below the prompt.
    """
    out = Output(json=json, quiet=quiet, verbose=verbose)
    question = _question(prompt, prompt_option)

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
        max_tokens=max_tokens,
        min_tokens=min_tokens,
        temp=temp,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        repetition_context=repetition_context,
        seed=seed,
        stop=tuple(stop or ()),
    )
    kv = options.kv_settings(kv_bits, kv_k_bits, kv_v_bits, kv_sink, kv_group_size, kv_codec)
    loaded = load(model, revision=revision, trust_remote_code=trust_remote_code)
    asked = prompt_notes(loaded.tokenizer, raw=raw, think=not no_think) + packing_notes(loaded.model, kv)
    for message in [*loaded.notes, *(note.message for note in asked)]:
        out.say(message)
    tokens = encode_prompt(loaded.tokenizer, question, system=system, raw=raw, think=not no_think)

    answer = ""
    try:
        for event in generate(loaded, tokens, chosen, kv):
            if isinstance(event, Finished):
                finished = event
                continue
            answer += event.text
            if not json:
                out.stream(event.text)
    finally:
        if not json and not answer.endswith("\n"):
            out.stream("\n")
    if json:
        out.result({"model": model, "text": answer, **dataclasses.asdict(finished)}, "")
    if stats:
        out.say(
            f"prompt {finished.prompt_tokens} tokens at {finished.prefill_tokens_per_second:.1f}/s, "
            f"answer {finished.tokens} tokens at {finished.decode_tokens_per_second:.1f}/s, "
            f"peak memory {human_bytes(finished.peak_memory_bytes)}"
        )


def _question(argument: str | None, option: str | None) -> str:
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
