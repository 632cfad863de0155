"""Groups of options: what several commands take together is declared once, as the fields of a dataclass.

Typer knows parameters only. ``flat`` hands it a command whose groups are spelled out, and hands the command its groups.
"""

import functools
import inspect
import typing
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

from tq.commands import options


@dataclass(frozen=True)
class Loading:
    """Where a model comes from, beside its name. Fields are arguments of `load`."""

    revision: options.Revision = None
    trust_remote_code: options.TrustRemoteCode = False


@dataclass(frozen=True)
class Printing:
    """How results are shown. Fields are arguments of `Output`."""

    json: options.Json = False
    quiet: options.Quiet = False
    verbose: options.Verbose = False


@dataclass(frozen=True)
class Quantizing:
    """How weights are quantized. Fields are arguments of `Recipe.from_options`."""

    bits: options.Bits = None
    group_size: options.GroupSize = None
    codec: options.Codec = None
    rotation: options.Rotation = None
    attention_bits: options.AttentionBits = None
    mlp_bits: options.MlpBits = None
    expert_bits: options.ExpertBits = None
    expert_down_bits: options.ExpertDownBits = None
    embedding_bits: options.EmbeddingBits = None
    head_bits: options.HeadBits = None
    protect: options.Protect = None
    protect_bits: options.ProtectBits = None
    recipe: options.Recipe = None


@dataclass(frozen=True)
class Packing:
    """How keys and values are packed. Fields are arguments of `options.read_settings`."""

    kv_bits: options.KVBits = None
    kv_k_bits: options.KVKeyBits = None
    kv_v_bits: options.KVValueBits = None
    kv_sink: options.KVSink = None
    kv_group_size: options.KVGroupSize = None
    kv_codec: options.KVCodec = None


@dataclass(frozen=True)
class Caching(Packing):
    """The same, and how caches are filled."""

    kv_start: options.KVStart = None
    prefill_step: options.PrefillStep = None


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen, and what ends an answer."""

    min_tokens: options.MinTokens = 0
    temp: options.Temp = None
    top_p: options.TopP = None
    top_k: options.TopK = None
    min_p: options.MinP = None
    repetition_penalty: options.RepetitionPenalty = None
    repetition_context: options.RepetitionContext = 64
    stop: options.Stop = None

    @property
    def asked(self) -> dict[str, Any]:
        """Fields of GenerateOptions."""
        return {**vars(self), "stop": tuple(self.stop or ())}


@dataclass(frozen=True)
class Asking:
    """What is asked of a model once, and how much of an answer is wanted."""

    prompt_option: options.PromptOption = None
    system: options.System = None
    raw: options.Raw = False
    no_think: options.NoThink = False
    max_tokens: options.MaxTokens = 512
    seed: options.Seed = None
    stats: options.Stats = False


def flat(command: Callable[..., None]) -> Callable[..., None]:
    """The command with the fields of its groups as parameters of their own, in their places."""
    signature = inspect.signature(command, eval_str=True)
    groups: dict[str, Any] = {
        name: p.annotation for name, p in signature.parameters.items() if is_dataclass(p.annotation)
    }

    def parameters() -> Iterator[inspect.Parameter]:
        for name, parameter in signature.parameters.items():
            if name not in groups:
                yield parameter
                continue
            hints = typing.get_type_hints(groups[name], include_extras=True)
            for field in fields(groups[name]):
                yield inspect.Parameter(
                    field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=hints[field.name]
                )

    @functools.wraps(command)
    def called(**given: Any) -> None:
        for name, group in groups.items():
            given[name] = group(**{field.name: given.pop(field.name) for field in fields(group)})
        command(**given)

    spelled_out = list(parameters())
    called.__signature__ = signature.replace(parameters=spelled_out)  # type: ignore[attr-defined]
    called.__annotations__ = {parameter.name: parameter.annotation for parameter in spelled_out}
    return called
