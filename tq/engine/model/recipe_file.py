"""A recipe as a TOML file: the schema of recipes and profiles, and what is said of a file that does not fit it."""

import difflib
import re
import tomllib
from pathlib import Path
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from tq.errors import TQError, UsageError

WITHOUT_BITS = ("ternary", "none")  # codecs


class Choice(BaseModel):
    """What a recipe says of some tensors; what it leaves out comes from the more general choice."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

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
    override: list[Override] = []

    @field_validator("protect_layers")
    @classmethod
    def _are_layers(cls, text: str | None) -> str | None:
        try:
            parse_layers(text or "")
        except UsageError as error:
            raise ValueError(error.message) from None
        return text


class Machine(BaseModel):
    """The ``[machine]`` table of a profile: facts of the hardware it is for."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    memory_gb: float = Field(gt=0)
    wired_limit_mb: int | None = Field(None, gt=0)


class RecipeFile(BaseModel):
    """A recipe file, or a hardware profile, which is a recipe with facts of a machine."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    description: str = ""
    machine: Machine | None = None
    weights: Weights = Weights()


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


def load_recipe(name: str | Path) -> RecipeFile:
    """A recipe from a TOML file, or a profile by name (``16gb``).

    Raises:
        TQError: No such file or profile, or it is no TOML.
        UsageError: A key or value is not valid: names the file, the dotted path and the nearest valid key.
    """
    from tq.engine.machine.profiles import profile_path

    path = profile_path(str(name)) or Path(name)
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        from tq.engine.machine.profiles import profile_names

        raise TQError(f"no recipe file or profile {str(name)!r}", f"profiles: {', '.join(profile_names())}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError) as error:
        raise TQError(f"{path} is not a readable TOML file: {error}") from None
    try:
        return RecipeFile.model_validate(data)
    except ValidationError as error:
        raise UsageError(*_explain(path, error)) from None


def _explain(path: Path, error: ValidationError) -> tuple[str, str | None]:
    """The first mistake of a recipe file: where it is, and the nearest valid key."""
    first = error.errors()[0]
    where = ".".join(map(str, first["loc"]))
    if first["type"] == "missing":
        return f"{path}: {where} is missing", None
    if first["type"] in ("model_type", "list_type"):
        table = f"[{where}]" if first["type"] == "model_type" else f"[[{where}]]"
        return f"{path}: {where} must be a table, which begins with a line {table}", None
    if first["type"] != "extra_forbidden":
        message = first["msg"].removeprefix("Value error, ")
        # The input of a contradiction is the whole table.
        value = "" if isinstance(first["input"], dict) else f" (it is {first['input']!r})"
        return f"{path}: {where}: {message[0].lower()}{message[1:]}{value}", None
    model: type[BaseModel] = RecipeFile
    for key in first["loc"][:-1]:
        if isinstance(key, str):
            annotation = model.model_fields[key].annotation
            options = [annotation, *getattr(annotation, "__args__", ())]
            model = next(o for o in options if isinstance(o, type) and issubclass(o, BaseModel))
    valid = sorted(model.model_fields)
    near = difflib.get_close_matches(str(first["loc"][-1]), valid, 1)
    hint = f"did you mean {near[0]}?" if near else f"valid keys: {', '.join(valid)}"
    return f"{path}: unknown key {where}", hint
