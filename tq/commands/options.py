"""Options that several commands share, each declared once."""

from typing import Annotated

import typer

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

KVBits = Annotated[
    str | None,
    typer.Option("--kv-bits", metavar="K,V", help="Keep keys and values in so many bits: 8,4, or one number for both."),
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


def examples(*lines: str) -> str:
    """An epilog of commands to copy."""
    # A paragraph that starts with \b keeps its line breaks.
    return "\n".join(["\b", "Examples:", *(f"  {line}" for line in lines)])
