"""The schema of [weights], the table of recipes and profiles that says how tensors are quantized."""

import re
from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from tq.engine.machine.toml_file import Table
from tq.errors import UsageError

WITHOUT_BITS = ("ternary", "none")  # codecs


class Choice(Table):
    """What a recipe says of some tensors; what it leaves out comes from the more general choice."""

    codec: Literal["lloyd-max", "ternary", "affine", "none"] | None = None
    bits: int | None = Field(None, ge=1, le=8)
    group_size: Literal[32, 64, 128, "row"] | None = None
    rotation: Literal["hadamard", "none"] | None = None
    qjl: bool | None = None

    @model_validator(mode="after")
    def _codec_takes_bits(self) -> Self:
        if self.codec in WITHOUT_BITS and self.bits is not None:
            raise ValueError(f"codec {self.codec} takes no bits")
        return self

    def over(self, general: "Choice") -> "Choice":
        """This choice, completed by a more general one as far as that fits."""
        given = self.model_dump(exclude_none=True)
        base = general.model_dump(exclude_none=True)
        if "bits" in given and "codec" not in given and base.get("codec") in WITHOUT_BITS:
            base["codec"] = "lloyd-max"
        if given.get("codec") in WITHOUT_BITS:
            base.pop("bits", None)
        if given.get("codec") == "affine" and base.get("group_size") == "row":
            del base["group_size"]
        return Choice(**(base | given))


NO_CHOICE = Choice()


class Override(Choice):
    """A choice for tensors whose path matches a shell pattern."""

    match: str


class Weights(Choice):
    """The ``[weights]`` table: a general choice, one per role, and patterns. Later patterns win."""

    attention: Choice = Choice()
    value: Choice = Choice()
    mlp: Choice = Choice()
    expert: Choice = Choice()
    expert_down: Choice = Choice()
    shared_expert: Choice = Choice()
    embedding: Choice = Choice()
    head: Choice = Choice()
    protect_layers: str | None = None
    protect_bits: int | None = Field(None, ge=1, le=8)
    override: list[Override] = Field(default_factory=list)

    @field_validator("protect_layers")
    @classmethod
    def _are_layers(cls, text: str | None) -> str | None:
        try:
            parse_layers(text or "")
        except UsageError as error:
            raise ValueError(error.message) from None
        return text


def parse_layers(text: str) -> list[range]:
    """Layers of ``0-1,30``. Raises UsageError for anything else."""
    layers = []
    for part in filter(None, text.replace(" ", "").split(",")):
        found = re.fullmatch(r"([0-9]+)(?:-([0-9]+))?", part)
        first, last = (int(found[1]), int(found[2] or found[1])) if found else (1, 0)
        if last < first:
            raise UsageError(f"layers {text!r} are not a list such as 0-1,30")
        layers.append(range(first, last + 1))
    return layers
