"""A recipe: which QuantSpec each tensor gets, by role, layer and pattern, from TOML files, profiles and options."""

import difflib
import fnmatch
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from tq.engine.machine.profiles import load_profile
from tq.engine.model.recipe_file import NO_CHOICE, WITHOUT_BITS, Choice, Weights, parse_layers
from tq.engine.model.roles import Matrix, Role
from tq.engine.quantize.spec import CODEC_BITS, GROUP_SIZES, ROW, QuantSpec
from tq.errors import UsageError

DEFAULT_BITS = 4
# Embedding and head are a small part of a large model and decide every token: never below this unless asked.
MIN_VOCABULARY_BITS = 6
# More bits for value projections unless asked: on SmolLM2-135M at 4 bits a quarter of the KL divergence goes with 1.5 %
# more bytes (benchmarks/sensitivity.json). llama.cpp's Q4_K_M does the same.
VALUE_EXTRA_BITS = 2
DEFAULT_GROUP_SIZE = 64


@dataclass(frozen=True)
class FormatDefaults:
    """What a checkpoint format asks for where a recipe says nothing.

    Attributes:
        vocabulary: For embedding and head, over the general choice.
        value_extra_bits: How many more bits value projections get than the rest of attention.
    """

    vocabulary: Choice = NO_CHOICE
    value_extra_bits: int = VALUE_EXTRA_BITS


ANY_FORMAT = FormatDefaults()


@dataclass(frozen=True)
class Recipe:
    """Roles, layers and patterns to QuantSpecs.

    Attributes:
        weights: What it says.
        name: The file or profile that it comes from, for people.
    """

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
        base = load_profile(recipe).weights if recipe is not None else Weights()
        general = _bits_choice("--bits", bits)
        if codec is not None:
            _one_of("--codec", codec, (*CODEC_BITS, "none"))
            if general.get("codec", codec) != codec or (codec in WITHOUT_BITS and "bits" in general):
                raise UsageError(f"--codec {codec} and --bits {bits} contradict each other", "leave one of them out")
            general["codec"] = codec
        if group_size is not None:
            general["group_size"] = _group_size(group_size)
        if rotation is not None:
            general["rotation"] = _one_of("--rotation", rotation, ("hadamard", "none"))
        changes = Choice(**general).over(_general(base)).model_dump()
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
        return cls(weights, name=Path(recipe).name if recipe is not None else "default")

    def spec_for(
        self, matrix: Matrix, tied_head: bool = False, defaults: FormatDefaults = ANY_FORMAT
    ) -> QuantSpec | None:
        """The spec of one matrix, or None where it keeps full precision.

        Args:
            matrix: The matrix.
            tied_head: The embedding is the output head too: it gets the better of what was asked for the two.
            defaults: What the format of the result asks for where the recipe does not say otherwise.

        Raises:
            UsageError: The codec has no such bits, or a group size that was asked for does not divide the inputs.
        """
        if not matrix.quantizable:
            return None
        roles = [matrix.role]
        if matrix.role == Role.EMBEDDING and tied_head:
            both = (Role.EMBEDDING, Role.HEAD)
            roles = [role for role in both if getattr(self.weights, role.value) != NO_CHOICE] or roles
        specs = [_spec(self.choice(matrix, role, defaults), matrix) for role in roles]
        if None in specs:
            return None
        return max(filter(None, specs), key=lambda spec: spec.bits)

    def choice(self, matrix: Matrix, role: Role, defaults: FormatDefaults = ANY_FORMAT) -> Choice:
        """What the recipe says of a matrix in a role: override over protected layer over role over general."""
        general = _general(self.weights)
        choice: Choice = getattr(self.weights, role.value)
        if role == Role.EXPERT_DOWN:
            choice = choice.over(self.weights.expert)
        if role == Role.VALUE:
            choice = choice.over(self.weights.attention)
            if choice.bits is None and choice.over(general).codec in (None, "lloyd-max", "affine"):
                choice = Choice(bits=_more_bits(choice.over(general), defaults.value_extra_bits)).over(choice)
        if role in (Role.EMBEDDING, Role.HEAD) and choice.over(general).codec != "none":
            if choice.bits is None and choice.codec != "ternary":
                bits = max(general.bits or DEFAULT_BITS, MIN_VOCABULARY_BITS)
                choice = Choice(bits=bits).over(choice)
            choice = choice.over(defaults.vocabulary)
        choice = choice.over(general)
        if matrix.layer is not None and _contains(self.weights.protect_layers, matrix.layer) and choice.codec != "none":
            # Never fewer than the matrix would get anyway; a ternary one becomes lloyd-max.
            own = 0 if choice.codec == "ternary" else choice.bits or DEFAULT_BITS
            choice = Choice(bits=max(self.weights.protect_bits or 8, own)).over(choice)
        for override in self.weights.override:
            if fnmatch.fnmatchcase(matrix.path, override.match):
                choice = Choice(**override.model_dump(exclude={"match"}, exclude_none=True)).over(choice)
        return choice

    def unused(self, matrices: Iterable[Matrix]) -> list[str]:
        """What the recipe says of tensors that a model does not have, one sentence each."""
        known = [m for m in matrices if m.quantizable]
        notes = [
            f"nothing that can be quantized matches the override {override.match!r}"
            for override in self.weights.override
            if not any(fnmatch.fnmatchcase(m.path, override.match) for m in known)
        ]
        if self.weights.protect_layers and not any(
            m.layer is not None and _contains(self.weights.protect_layers, m.layer) for m in known
        ):
            notes.append(f"the model has none of the protected layers {self.weights.protect_layers}")
        return notes


def _more_bits(choice: Choice, extra: int) -> int:
    """The bits of ``choice`` and ``extra`` more: the next that its codec has, or its most."""
    wanted = (choice.bits or DEFAULT_BITS) + extra
    valid = CODEC_BITS[choice.codec or "lloyd-max"]
    return next((bits for bits in valid if bits >= wanted), valid[-1])


def _general(weights: Weights) -> Choice:
    return Choice(**{name: getattr(weights, name) for name in Choice.model_fields})


def _spec(choice: Choice, matrix: Matrix) -> QuantSpec | None:
    codec = choice.codec or "lloyd-max"
    if codec == "none":
        return None
    try:
        bits = 0 if codec == "ternary" else choice.bits or DEFAULT_BITS
        group_size = _group_size_for(choice, codec, matrix.shape[-1])
        if group_size is None:
            return None
        spec = QuantSpec(codec, bits, group_size, choice.rotation or "hadamard", bool(choice.qjl))
        spec.n_groups(matrix.shape[-1])
    except UsageError as error:
        raise UsageError(f"{matrix.path} ({matrix.role}): {error.message}", error.hint) from None
    return spec


def _group_size_for(choice: Choice, codec: str, in_features: int) -> int | None:
    """The group size asked for; by default the largest up to 64 that divides, or the whole row. None: there is none."""
    fits = [g for g in GROUP_SIZES if in_features % g == 0]
    if not fits and codec == "affine":
        return None
    if choice.group_size == "row" or not fits:
        # Where no group divides, one scale per row is the only way, whatever was asked for the whole model.
        return ROW
    return choice.group_size or max(g for g in fits if g <= DEFAULT_GROUP_SIZE)


def _bits_choice(option: str, bits: str | int | None) -> dict:
    if bits is None:
        return {}
    text = str(bits).lower()
    if text in ("none", "16"):
        return {"codec": "none"}
    if text in ("ternary", "1.58", "1.6"):
        return {"codec": "ternary"}
    if text in map(str, range(1, 9)):
        return {"bits": int(text)}
    raise UsageError(f"{option} {bits} is not one of 1 to 8, ternary, none")


def _group_size(value: str | int) -> int | str:
    text = str(value).lower()
    if text == "row":
        return "row"
    if text in map(str, GROUP_SIZES):
        return int(text)
    raise UsageError(f"--group-size {value} is not one of 32, 64, 128, row")


def _one_of(option: str, value: str, valid: tuple[str, ...]) -> str:
    if value not in valid:
        near = difflib.get_close_matches(value, valid, 1)
        hint = f"did you mean {near[0]}?" if near else None
        raise UsageError(f"{option} {value!r} is not one of {', '.join(valid)}", hint)
    return value


def _contains(layers: str | None, layer: int) -> bool:
    return any(layer in part for part in parse_layers(layers or ""))
