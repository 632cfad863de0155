"""A recipe: which QuantSpec each tensor gets, by role, layer and pattern, from TOML files, profiles and options."""

import difflib
import fnmatch
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tq.engine.model.roles import QUANTIZED_ROLES, Matrix, Role
from tq.engine.quantize.spec import CODEC_BITS, GROUP_SIZES, ROW, QuantSpec
from tq.errors import TQError, UsageError

DEFAULT_BITS = 4
# Embedding and head are a small part of a large model and decide every token: never below this unless asked.
MIN_VOCABULARY_BITS = 6
DEFAULT_GROUP_SIZE = 64


class Choice(BaseModel):
    """What a recipe says of some tensors; what it leaves out comes from the more general choice."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    codec: Literal["lloyd-max", "ternary", "affine", "none"] | None = None
    bits: int | None = Field(None, ge=1, le=8)
    group_size: Literal[32, 64, 128, "row"] | None = None
    rotation: Literal["hadamard", "none"] | None = None
    qjl: bool | None = None

    def over(self, general: "Choice") -> "Choice":
        """This choice, completed by a more general one."""
        given = self.model_dump(exclude_none=True)
        base = general.model_dump(exclude_none=True)
        if "bits" in given and "codec" not in given and base.get("codec") in ("ternary", "none"):
            base["codec"] = "lloyd-max"  # bits asked for a role whose general codec has none
        if "codec" in given and "bits" not in given and given["codec"] != base.get("codec", "lloyd-max"):
            base.pop("bits", None)
        return Choice(**(base | given))


class Override(Choice):
    """A choice for tensors whose path matches a shell pattern."""

    match: str


class Weights(Choice):
    """The ``[weights]`` table: a general choice, one per role, and patterns. Later patterns win."""

    attention: Choice = Choice()
    mlp: Choice = Choice()
    expert: Choice = Choice()
    expert_down: Choice = Choice()
    shared_expert: Choice = Choice()
    embedding: Choice = Choice()
    head: Choice = Choice()
    protect_layers: str | None = None
    protect_bits: int | None = Field(None, ge=1, le=8)
    override: list[Override] = []


class Machine(BaseModel):
    """The ``[machine]`` table of a profile: facts of the hardware it is for."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    memory_gb: float = Field(gt=0)
    wired_limit_mb: int | None = Field(None, gt=0)


class RecipeFile(BaseModel):
    """A recipe file, or a hardware profile, which is a recipe with facts of a machine."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    description: str = ""
    machine: Machine | None = None
    weights: Weights = Weights()


@dataclass(frozen=True)
class Recipe:
    """Roles, layers and patterns to QuantSpecs."""

    weights: Weights = field(default_factory=Weights)
    name: str = "default"

    @classmethod
    def from_options(
        cls,
        *,
        recipe: str | Path | None = None,
        bits: str | int | None = None,
        group_size: str | int | None = None,
        codec: str | None = None,
        rotation: str | None = None,
        attention_bits: str | int | None = None,
        mlp_bits: str | int | None = None,
        expert_bits: str | int | None = None,
        expert_down_bits: str | int | None = None,
        embedding_bits: str | int | None = None,
        head_bits: str | int | None = None,
        protect: str | None = None,
        protect_bits: int | None = None,
    ) -> "Recipe":
        """A recipe from command-line options, over a file or profile. None means not given.

        Bits are 1 to 8, ``ternary``, or ``none`` (also 16) to keep full precision.

        Raises:
            UsageError: A value is outside the valid ones.
            TQError: The file cannot be read.
        """
        base = load_recipe(recipe).weights if recipe is not None else Weights()
        general = _bits_choice("--bits", bits)
        if codec is not None:
            _one_of("--codec", codec, (*CODEC_BITS, "none"))
            general["codec"] = codec
        if group_size is not None:
            general["group_size"] = _group_size(group_size)
        if rotation is not None:
            general["rotation"] = _one_of("--rotation", rotation, ("hadamard", "none"))
        changes = Choice(**general).over(_general(base)).model_dump(exclude_none=True)
        roles = {
            Role.ATTENTION: ("--attention-bits", attention_bits),
            Role.MLP: ("--mlp-bits", mlp_bits),
            Role.EXPERT: ("--expert-bits", expert_bits),
            Role.EXPERT_DOWN: ("--expert-down-bits", expert_down_bits),
            Role.EMBEDDING: ("--embedding-bits", embedding_bits),
            Role.HEAD: ("--head-bits", head_bits),
        }
        for role, (option, value) in roles.items():
            if value is not None:
                changes[role.value] = Choice(**_bits_choice(option, value)).over(getattr(base, role.value))
        if protect is not None:
            parse_layers(protect)
            changes["protect_layers"] = protect
        if protect_bits is not None:
            if not 1 <= protect_bits <= 8:
                raise UsageError(f"--protect-bits {protect_bits} is not one of 1 to 8")
            if protect is None and base.protect_layers is None:
                raise UsageError("--protect-bits needs layers to protect", 'add --protect "0-1,30"')
            changes["protect_bits"] = protect_bits
        weights = base.model_copy(update=changes)
        return cls(weights, name=str(recipe) if recipe is not None else "default")

    def spec_for(self, matrix: Matrix, tied_head: bool = False, vocabulary: Choice = Choice()) -> QuantSpec | None:
        """The spec of one matrix, or None where it keeps full precision.

        Args:
            matrix: The matrix.
            tied_head: The embedding is the output head too: it gets the better of the two choices.
            vocabulary: What embedding and head get where the recipe says nothing of them, over the general choice.

        Raises:
            UsageError: A group size that was asked for does not divide the input features.
        """
        if matrix.role not in QUANTIZED_ROLES:
            return None
        choice = self._choice(matrix, matrix.role, vocabulary)
        spec = _spec(choice, matrix)
        if matrix.role == Role.EMBEDDING and tied_head:
            head = _spec(self._choice(matrix, Role.HEAD, vocabulary), matrix)
            if spec is None or head is None:
                return None
            spec = max(spec, head, key=lambda s: s.bits)
        return spec

    def _choice(self, matrix: Matrix, role: Role, vocabulary: Choice) -> Choice:
        general = _general(self.weights)
        choice: Choice = getattr(self.weights, role.value)
        if role == Role.EXPERT_DOWN:
            choice = choice.over(self.weights.expert)
        if role in (Role.EMBEDDING, Role.HEAD) and choice.bits is None and choice.codec is None:
            if general.codec != "none":
                bits = DEFAULT_BITS if general.bits is None else general.bits
                choice = choice.over(Choice(bits=max(bits, MIN_VOCABULARY_BITS)).over(vocabulary))
        choice = choice.over(general)
        protected = parse_layers(self.weights.protect_layers or "")
        if matrix.layer is not None and matrix.layer in protected:
            choice = Choice(bits=self.weights.protect_bits or 8).over(choice)
        for override in self.weights.override:
            if fnmatch.fnmatchcase(matrix.path, override.match):
                choice = Choice(**override.model_dump(exclude={"match"}, exclude_none=True)).over(choice)
        return choice


def _general(weights: Weights) -> Choice:
    return Choice(**{name: getattr(weights, name) for name in Choice.model_fields})


def _spec(choice: Choice, matrix: Matrix) -> QuantSpec | None:
    codec = choice.codec or "lloyd-max"
    if codec == "none":
        return None
    bits = 0 if codec == "ternary" else (choice.bits or DEFAULT_BITS)
    if bits not in CODEC_BITS[codec]:  # say it before a QuantSpec does: with the tensor's role
        valid = ", ".join(map(str, CODEC_BITS[codec]))
        raise UsageError(f"{bits} bits for {matrix.role} is not valid for {codec}: use one of {valid}")
    group_size = _resolve_group(choice, codec, matrix)
    if group_size == ROW and codec == "affine":
        return None
    spec = QuantSpec(codec, bits, group_size, choice.rotation or "hadamard", bool(choice.qjl))
    try:
        spec.n_groups(matrix.shape[-1])
    except UsageError as error:
        raise UsageError(f"{matrix.path}: {error.message}", error.hint) from None
    return spec


def _resolve_group(choice: Choice, codec: str, matrix: Matrix) -> int:
    """The group size asked for; by default the largest up to 64 that divides, or the whole row."""
    n = matrix.shape[-1]
    fits = [g for g in GROUP_SIZES if n % g == 0]
    if not fits:
        # No group divides these inputs: one scale per row is the only way, whatever was asked for the model.
        return ROW
    if choice.group_size == "row":
        if codec == "affine":
            raise UsageError("the affine codec needs a group size of 32, 64 or 128: MLX has no row scale")
        return ROW
    if choice.group_size is not None:
        return choice.group_size
    return max(g for g in fits if g <= DEFAULT_GROUP_SIZE)


def _bits_choice(option: str, bits: str | int | None) -> dict:
    if bits is None:
        return {}
    text = str(bits).lower()
    if text in ("none", "16"):
        return {"codec": "none"}
    if text in ("ternary", "1.58", "1.6"):
        return {"codec": "ternary"}
    if text.isdigit() and 1 <= int(text) <= 8:
        return {"bits": int(text)}
    raise UsageError(f"{option} {bits} is not one of 1 to 8, ternary, none")


def _group_size(value: str | int) -> int | str:
    text = str(value).lower()
    if text == "row":
        return "row"
    if text.isdigit() and int(text) in GROUP_SIZES:
        return int(text)
    raise UsageError(f"--group-size {value} is not one of 32, 64, 128, row")


def _one_of(option: str, value: str, valid: tuple[str, ...]) -> str:
    if value not in valid:
        near = difflib.get_close_matches(value, valid, 1)
        hint = f"did you mean {near[0]}?" if near else None
        raise UsageError(f"{option} {value!r} is not one of {', '.join(valid)}", hint)
    return value


def parse_layers(text: str) -> frozenset[int]:
    """Layers of ``0-1,30``. Raises UsageError for anything else."""
    layers: set[int] = set()
    for part in filter(None, text.replace(" ", "").split(",")):
        first, dash, last = part.partition("-")
        if not first.isdigit() or (dash and not last.isdigit()) or (dash and int(last) < int(first)):
            raise UsageError(f"layers {text!r} are not a list such as 0-1,30")
        layers |= set(range(int(first), int(last or first) + 1))
    return frozenset(layers)


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
        return RecipeFile(**data)
    except ValidationError as error:
        raise UsageError(*_explain(path, data, error)) from None


def _explain(path: Path, data: dict, error: ValidationError) -> tuple[str, str | None]:
    """The first mistake of a recipe file: where it is, and the nearest valid key."""
    first = error.errors()[0]
    where = ".".join(map(str, first["loc"]))
    if first["type"] != "extra_forbidden":
        return f"{path}: {where}: {first['msg'][0].lower()}{first['msg'][1:]} (it is {first['input']!r})", None
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
