"""What is served, as clients ask for it: the names it answers to, its defaults, and facts for lists of models."""

from __future__ import annotations

import datetime
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tq.engine.run.sampling import GenerateOptions
from tq.engine.run.serve.body import NO_LIMIT, RequestError

if TYPE_CHECKING:
    from tq.engine.model.load import LoadedModel
    from tq.engine.run.serve.requests import ModelFacts

ANY_NAME = "*"
NEUTRAL_NAMES = ("default_model", "default")  # the first is mlx-lm's


@dataclass(frozen=True)
class Names:
    """How clients may call the model: `shown`, the last part of a path or Hub id, the whole of it, and aliases."""

    model: str
    aliases: tuple[str, ...] = ()

    @property
    def shown(self) -> str:
        """The name that lists and answers have: the first alias, else the last part of the model's."""
        named = [alias for alias in self.aliases if alias != ANY_NAME]
        return named[0] if named else Path(self.model).name.removesuffix(".gguf") or self.model

    def check(self, asked: str | None) -> None:
        """Accept a name, or none.

        Raises:
            RequestError: It is another model's.
        """
        if not asked or ANY_NAME in self.aliases:
            return
        known = {self.shown, self.model, Path(self.model).name, *self.aliases, *NEUTRAL_NAMES}
        if asked not in known and asked.removesuffix(":latest") not in known:
            raise RequestError(
                f"the model {asked!r} is not served here, but {self.shown!r} is; "
                f"tq serve --alias {asked} would answer to that name too",
                status=404,
                code="model_not_found",
                param="model",
            )


@dataclass(frozen=True)
class Served:
    """The model and what requests leave open.

    Attributes:
        defaults: Options that a request does not give.
        think: Whether a reasoning model may think, where the request does not say. None: what its template does.
        created: When the server started, in seconds since 1970.
        family: The checkpoint's model_type.
        quantization: In a word: "4-bit lloyd-max", "4-bit", "bfloat16", ...
        template: The chat template; "" where it is none or code.
    """

    names: Names
    defaults: GenerateOptions = field(default_factory=lambda: GenerateOptions(max_tokens=NO_LIMIT))
    think: bool | None = None
    created: float = field(default_factory=time.time)
    size_bytes: int = 0
    family: str = ""
    file_format: str = "safetensors"
    quantization: str = ""
    fingerprint: str = ""
    context_length: int | None = None
    has_chat_template: bool = True
    has_tools: bool = False
    has_thinking: bool = False
    template: str = ""

    @property
    def started(self) -> str:
        """`created` as RFC 3339 has it."""
        return timestamp(self.created)

    @classmethod
    def of(
        cls, loaded: LoadedModel, facts: ModelFacts, names: Names, defaults: GenerateOptions, think: bool | None
    ) -> Served:
        """The facts of a loaded model."""
        from tq.engine.cache.fingerprint import checkpoint_fingerprint

        template = getattr(loaded.tokenizer, "chat_template", None)
        return cls(
            names=names,
            defaults=defaults,
            think=think,
            size_bytes=loaded.size_bytes,
            family=str(loaded.config.get("model_type", "")),
            file_format="gguf" if loaded.path.is_file() else "safetensors",
            quantization=_quantization(loaded.config),
            fingerprint=checkpoint_fingerprint(loaded.path),
            context_length=facts.context_length,
            has_chat_template=facts.has_chat_template,
            has_tools=facts.has_tools,
            has_thinking=facts.has_thinking,
            template=template if isinstance(template, str) else "",
        )


def timestamp(seconds: float) -> str:
    """Seconds since 1970 in the form of RFC 3339."""
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).isoformat().replace("+00:00", "Z")


def _quantization(config: dict[str, Any]) -> str:
    """A word for how weights are kept, from config.json."""
    said = config.get("quantization") or config.get("quantization_config") or {}
    said = said.get("default") or said
    kind = said.get("codec") or said.get("mode") or said.get("quant_method") or ""
    if said.get("bits") is not None:
        return f"{said['bits']}-bit {kind}".strip()
    return kind or str(config.get("torch_dtype") or config.get("dtype") or "")
