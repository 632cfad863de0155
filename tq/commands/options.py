"""Options that several commands share, each declared once."""

from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from tq import settings
from tq.errors import UsageError
from tq.output import Output, human_bytes

if TYPE_CHECKING:
    from tq.engine.cache import prompts
    from tq.engine.machine.settings import Settings
    from tq.engine.model.load import LoadedModel
    from tq.engine.stream.settings import StreamSettings

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

# Options that tq.toml, profiles and TQ_* variables may set too: None means what these say. `read_settings` reads all.
Profile = Annotated[
    str | None,
    typer.Option(
        "--profile", metavar="NAME", help="Settings for a machine: auto, a name such as 16gb, a TOML file, or none."
    ),
]
PrefillStep = Annotated[
    int | None,
    typer.Option("--prefill-step", metavar="N", help="Tokens of a prompt that are read at once.  [default: 2048]"),
]
# The packed key-value cache: without any of these options, nothing is packed.
KVBits = Annotated[
    str | None,
    typer.Option(
        "--kv-bits",
        metavar="K,V",
        help="Pack keys, values to so many bits: 8,3; 4: both; none. Or k8v3, k8v4, k4v4, paper-2.5, paper-3.5, polar.",
    ),
]
KVKeyBits = Annotated[float | None, typer.Option("--kv-k-bits", metavar="N", help="Bits of keys.")]
KVValueBits = Annotated[float | None, typer.Option("--kv-v-bits", metavar="N", help="Bits of values.")]
KVSink = Annotated[int | None, typer.Option("--kv-sink", metavar="N", help="First tokens that are not packed.")]
KVStart = Annotated[
    int | None, typer.Option("--kv-start", metavar="N", help="Pack once the context has so many tokens.  [default: 0]")
]
KVGroupSize = Annotated[
    int | None, typer.Option("--kv-group-size", metavar="N", help="Numbers that share a scale; 0: a head's vector.")
]
KVCodec = Annotated[
    str | None,
    typer.Option("--kv-codec", metavar="K,V", help="lloyd-max, affine, polar, or qjl,lloyd-max: of keys, of values."),
]


# What tq convert makes of a model, and tq plan counts.
def _bits_for(flag: str, what: str) -> Any:
    return typer.Option(flag, metavar="BITS", help=f"Bits for {what}.")


Bits = Annotated[
    str | None,
    typer.Option("--bits", "-b", metavar="BITS", help="1 to 8, ternary, or none; 4 if nothing else says so."),
]
GroupSize = Annotated[
    str | None, typer.Option("--group-size", metavar="N", help="Weights per scale: 32, 64, 128 or row.")
]
Codec = Annotated[str | None, typer.Option("--codec", metavar="NAME", help="lloyd-max, ternary, affine or none.")]
Rotation = Annotated[str | None, typer.Option("--rotation", metavar="NAME", help="hadamard or none.")]
AttentionBits = Annotated[str | None, _bits_for("--attention-bits", "attention")]
MlpBits = Annotated[str | None, _bits_for("--mlp-bits", "the feed-forward layers")]
ExpertBits = Annotated[str | None, _bits_for("--expert-bits", "experts")]
ExpertDownBits = Annotated[str | None, _bits_for("--expert-down-bits", "the last matrix of experts")]
EmbeddingBits = Annotated[str | None, _bits_for("--embedding-bits", "the token embedding")]
HeadBits = Annotated[str | None, _bits_for("--head-bits", "the output head")]
Protect = Annotated[
    str | None, typer.Option("--protect", metavar="LAYERS", help="Layers that get more bits, such as 0-1,30.")
]
ProtectBits = Annotated[
    int | None, typer.Option("--protect-bits", metavar="BITS", help="How many they get; 8 if not given.")
]
Recipe = Annotated[
    str | None,
    typer.Option("--recipe", metavar="FILE", help="A TOML file or the name of a profile; options go over it."),
]
Dtype = Annotated[
    Literal["float32", "float16", "bfloat16"] | None,
    typer.Option("--dtype", help="Type of what stays unquantized; by default the source's, bfloat16 for float32."),
]
CheckpointFormat = Annotated[
    Literal["tq", "turboquant"], typer.Option("--format", help="turboquant: for the project of that name.")
]

# Experts that stay on the disk.
Budget = Annotated[
    str | None,
    typer.Option(
        "--budget", metavar="SIZE", help="Memory for experts, such as 4GB; auto: most of what is free.  [default: auto]"
    ),
]
Stream = Annotated[
    str | None,
    typer.Option(
        "--stream",
        metavar="SIZE",
        help="Leave experts on the disk, as tq stream does, with so much memory for them: 4GB, or auto.",
    ),
]

# What is asked, and how the answer is shown.
Prompt = Annotated[
    str | None,
    typer.Argument(metavar="PROMPT", show_default=False, help="The question; - or none reads it from stdin."),
]
PromptOption = Annotated[str | None, typer.Option("--prompt", "-p", metavar="TEXT", help="The same as PROMPT.")]
Raw = Annotated[bool, typer.Option("--raw", help="Continue the text; no chat template.")]
Stats = Annotated[bool, typer.Option("--stats", help="Say how fast it was and what memory it took.")]

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


def read_settings(out: Output, memory_bytes: int | None = None, **flags: Any) -> "Settings":
    """The settings of a run: these flags by the names of their parameters, then all weaker sources.

    Says what a profile counts on and this machine does not have, and with --verbose what is not as usual and why.

    Args:
        memory_bytes: Of the machine that it is about, if that is not this one.

    Raises:
        UsageError: There are mistakes in flags, variables or files.
    """
    from tq.engine.machine.limits import shortfalls
    from tq.engine.machine.settings import SETTINGS, resolve

    names = {setting.flag.strip("-").replace("-", "_"): setting.name for setting in SETTINGS if setting.flag}
    found = resolve({names[parameter]: value for parameter, value in flags.items()}, memory_bytes=memory_bytes)
    found.check()
    if found.profile_reason:
        out.detail(f"profile: {found.profile_reason}")
    for name, value in found.found.items():
        if value.source != "default":
            out.detail(f"{name}: {value.value} ({value.where})")
    machine = found.profile.values.machine if found.profile and memory_bytes is None else None
    for short in shortfalls(machine) if machine else []:
        out.say(f"{short.fact}: {short.fix}")
    return found


def stream_settings(configured: "Settings", max_active_experts: int | None = None) -> "StreamSettings":
    """How experts are streamed, of a run that streams them."""
    from tq.engine.stream.settings import StreamSettings

    chosen = {name: configured[f"stream.{name}"] for name in ("budget", "workers", "policy", "prefetch")}
    return StreamSettings.from_options(**chosen, max_active_experts=max_active_experts)


def contexts(text: str, example: str) -> tuple[int, ...]:
    """The numbers of tokens of ``--context``. Raises UsageError, with an example, if they are none."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() for part in parts):
        raise UsageError(f"--context {text} is not a list of numbers", f"for example --context {example}")
    return tuple(int(part) for part in parts)


def prompt_cache(out: Output, configured: "Settings", loaded: "LoadedModel") -> "prompts.PromptCache | None":
    """Where prompts that a model has read are kept on disk; None: nowhere."""
    budget = configured.prompt_cache_bytes
    if not budget:
        return None
    from tq.engine.cache import prompts

    folder = settings.cache_dir() / "prompts"
    out.detail(f"prompts read before: up to {human_bytes(budget)} in {folder}")
    return prompts.PromptCache.of_model(folder, budget, loaded.path, loaded.model, configured.kv)


def say_if_tight(out: Output, weights_bytes: int) -> None:
    """Says what to do about a model that is nearly as large as the memory that its GPU may use, or larger."""
    from tq.engine.machine.limits import tight

    short = tight(weights_bytes)
    if short is not None:
        out.say(f"{short.fact}: {short.fix}")


def examples(*lines: str) -> str:
    """An epilog of commands to copy."""
    # A paragraph that starts with \b keeps its line breaks.
    return "\n".join(["\b", "Examples:", *(f"  {line}" for line in lines)])
