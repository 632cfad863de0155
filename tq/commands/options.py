"""Options that several commands share, each declared once."""

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from tq.engine.cache.settings import KVSettings

Model = Annotated[
    str,
    typer.Option("--model", "-m", metavar="MODEL", help="A model folder, a GGUF file or a Hugging Face Hub id."),
]
Revision = Annotated[
    str | None, typer.Option("--revision", metavar="REV", help="Branch, tag or commit of a Hub model.")
]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run Python code that comes with the model's tokenizer.")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Say nothing but results, warnings and errors.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Also say why each choice was made.")]

# The packed key-value cache. None means: what --kv-bits says or its defaults; without any of them nothing is packed.
KVBits = Annotated[
    str | None,
    typer.Option(
        "--kv-bits",
        metavar="K,V",
        help="Pack keys, values to so many bits: 8,3; 4: both. Or k8v3, k8v4, k4v4, paper-2.5, paper-3.5, polar.",
    ),
]
KVKeyBits = Annotated[float | None, typer.Option("--kv-k-bits", metavar="N", help="Bits of keys.")]
KVValueBits = Annotated[float | None, typer.Option("--kv-v-bits", metavar="N", help="Bits of values.")]
KVSink = Annotated[int | None, typer.Option("--kv-sink", metavar="N", help="First tokens that are not packed.")]
KVGroupSize = Annotated[
    int | None, typer.Option("--kv-group-size", metavar="N", help="Numbers that share a scale; 0: a head's vector.")
]
KVCodec = Annotated[
    str | None,
    typer.Option("--kv-codec", metavar="K,V", help="lloyd-max, affine, polar, or qjl,lloyd-max: of keys, of values."),
]

# Sampling. None means: what the model's generation_config.json says, else greedy. Ranges are checked by the engine.
MaxTokens = Annotated[
    int, typer.Option("--max-tokens", "-n", metavar="N", help="Most tokens to generate.", show_default=True)
]
Temp = Annotated[
    float | None,
    typer.Option("--temp", "--temperature", metavar="T", help="Randomness; 0 takes the likeliest token."),
]
TopP = Annotated[
    float | None,
    typer.Option("--top-p", metavar="P", help="Draw from the likeliest tokens that sum to this; 1: all."),
]
TopK = Annotated[int | None, typer.Option("--top-k", metavar="K", help="Draw from this many tokens; 0: all.")]
MinP = Annotated[
    float | None,
    typer.Option("--min-p", metavar="P", help="Drop tokens below this share of the likeliest one's probability."),
]
RepetitionPenalty = Annotated[
    float | None, typer.Option("--repetition-penalty", metavar="X", help="Above 1: repeat less.")
]
RepetitionContext = Annotated[
    int, typer.Option("--repetition-context", metavar="N", help="How many recent tokens count as repeated.")
]
MinTokens = Annotated[int, typer.Option("--min-tokens", metavar="N", help="Fewest tokens to generate.")]
Seed = Annotated[int | None, typer.Option("--seed", metavar="N", help="Makes random choices repeatable.")]
Stop = Annotated[
    list[str] | None,
    typer.Option("--stop", metavar="TEXT", help="End before this text; may be given several times."),
]
System = Annotated[str | None, typer.Option("--system", "--system-prompt", metavar="TEXT", help="The system message.")]
NoThink = Annotated[bool, typer.Option("--no-think", help="Ask a reasoning model to answer at once.")]
PromptCache = Annotated[
    str | None,
    typer.Option("--prompt-cache", metavar="SIZE", help="Disk space for prompts read before; 0: none.  [default: 2GB]"),
]


def kv_settings(
    bits: str | None,
    key_bits: float | None,
    value_bits: float | None,
    sink: int | None,
    group_size: int | None,
    codec: str | None,
) -> "KVSettings | None":
    """What the options above say together; None if there is none of them."""
    from tq.engine.cache.settings import KVSettings

    return KVSettings.from_options(bits, key_bits, value_bits, sink, group_size, codec)


def examples(*lines: str) -> str:
    """An epilog of commands to copy."""
    # A paragraph that starts with \b keeps its line breaks.
    return "\n".join(["\b", "Examples:", *(f"  {line}" for line in lines)])
