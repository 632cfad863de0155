"""KVSettings: how a model's keys and values are packed. It says what; codecs and caches do it."""

import difflib
import re
from dataclasses import dataclass, replace
from typing import Any

from tq.errors import UsageError

BLOCK = 64  # tokens that are packed together
SINK, WINDOW = 128, 32
MOST_TOKENS = 2**31  # which MLX's shapes end at
VECTOR = 0  # group_size of "one scale per head vector"
GROUP_SIZES = (VECTOR, 32, 64, 128)
WHOLE = tuple(range(1, 9))
# Half bits: a quarter of the channels, those with the largest values, gets two bits more than the others.
HALVES = (2.5, 3.5)
BITS: dict[str, tuple[float, ...]] = {
    "lloyd-max": (*WHOLE, *HALVES),
    "qjl": WHOLE,
    "affine": WHOLE[1:],
    "polar": (3, 4, 5, 6),
}


@dataclass(frozen=True)
class KVSettings:
    """What is packed how. Frozen and comparable.

    Attributes:
        key_bits, value_bits: Per number, without scales. `lloyd-max` takes 1 to 8, 2.5 and 3.5; `qjl` 1 to 8, `affine`
            2 to 8, `polar` 3 to 6.
        key_codec, value_codec: `lloyd-max` (TurboQuant), `qjl` (the same with one bit less and a second stage of one
            bit that makes scores unbiased; keys only), `affine` (minimum and step of a group), `polar` (PolarQuant).
        sink: First tokens, which stay in the activation type.
        window: Latest tokens that stay so at least; blocks of 64 before them are packed as they fill.
        group_size: Numbers that share a scale, 32, 64 or 128; 0: `lloyd-max` and `qjl` have one for a head vector,
            `affine` one for 64. A head dimension that the size does not divide has one for the vector.
        start: Tokens of context from which on a model's caches are packed (run/context.py); shorter ones are as the
            model has them. A packed cache itself packs from its sink on.
        centre: Keys are packed less their mean. None: in models whose key projections have biases (convert.py).

    Raises:
        UsageError: A value is not one of those.
    """

    key_bits: float = 8
    value_bits: float = 3
    key_codec: str = "lloyd-max"
    value_codec: str = "lloyd-max"
    sink: int = SINK
    window: int = WINDOW
    group_size: int = VECTOR
    start: int = 0
    centre: bool | None = None

    def __post_init__(self) -> None:
        for name in (self.key_codec, self.value_codec):
            if name not in BITS:
                near = difflib.get_close_matches(name, BITS, 1)
                hint = f"did you mean {near[0]}?" if near else None
                raise UsageError(f"KV codec {name!r} is not one of {', '.join(BITS)}", hint)
        if self.value_codec == "qjl":
            raise UsageError(
                "the KV codec qjl is for keys: what it makes unbiased are scores", "--kv-codec qjl,lloyd-max"
            )
        for side, codec, bits in (
            ("keys", self.key_codec, self.key_bits),
            ("values", self.value_codec, self.value_bits),
        ):
            if bits not in BITS[codec]:
                raise UsageError(
                    f"{number(bits)} bits of {side} are not one of {_list(BITS[codec])}, which {codec} takes",
                    "for example --kv-bits 8,3: keys, values",
                )
        if self.group_size not in GROUP_SIZES:
            raise UsageError(f"KV group size {self.group_size} is not one of {_list(GROUP_SIZES)} (0: a head vector)")
        for name in ("sink", "window", "start"):
            if getattr(self, name) < 0:
                raise UsageError(f"KV {name} is {getattr(self, name)} tokens: give 0 or more")
            if getattr(self, name) >= MOST_TOKENS:
                raise UsageError(f"KV {name} is {getattr(self, name)} tokens: give less than {MOST_TOKENS}")

    @classmethod
    def parse(cls, text: str) -> "KVSettings":
        """ "8,3" or "k8v3": keys, values; "4": both; or the name of a preset.

        Raises:
            UsageError: It is none of these.
        """
        preset = PRESETS.get(text.strip().lower())
        if preset is not None:
            return preset
        one = r"([0-9]+(?:\.5)?)"
        found = re.fullmatch(rf"k{one}v{one}|{one}(?:\s*,\s*{one})?", text.strip().lower())
        if found is None:
            near = difflib.get_close_matches(text.lower(), PRESETS, 1)
            raise UsageError(
                f"KV bits {text!r} are not one or two of {_list(BITS['lloyd-max'])}, or a preset: {', '.join(PRESETS)}",
                f"did you mean {near[0]}?" if near else "for example 8,3: keys, values",
            )
        given = [float(part) for part in found.groups() if part is not None]
        return cls(key_bits=_plain(given[0]), value_bits=_plain(given[-1]))

    @classmethod
    def from_options(
        cls,
        bits: str | None = None,
        key_bits: float | None = None,
        value_bits: float | None = None,
        sink: int | None = None,
        group_size: int | None = None,
        codec: str | None = None,
        window: int | None = None,
        start: int | None = None,
    ) -> "KVSettings | None":
        """Settings from a person's choices, each None where there is none; None if there is no choice at all.

        Args:
            bits: As in `parse`.
            codec: "affine", or of keys and of values: "qjl,lloyd-max".

        Raises:
            UsageError: A choice is not valid.
        """
        if all(choice is None for choice in (bits, key_bits, value_bits, sink, group_size, codec, window, start)):
            return None
        base = cls() if bits is None else cls.parse(bits)
        changes: dict[str, Any] = {
            "key_bits": key_bits,
            "value_bits": value_bits,
            "sink": sink,
            "group_size": group_size,
            "window": window,
            "start": start,
        }
        if codec is not None:
            parts = [part.strip().lower() for part in codec.split(",")]
            if len(parts) > 2:
                raise UsageError(f"KV codecs {codec!r} are more than two", "for example affine, or qjl,lloyd-max")
            changes |= {"key_codec": parts[0], "value_codec": parts[-1]}
        for name in ("key_bits", "value_bits"):
            if changes[name] is not None:
                changes[name] = _plain(changes[name])
        return replace(base, **{name: value for name, value in changes.items() if value is not None})

    def label(self) -> str:
        """For people: "k8v3", "k4v4 affine"."""
        codecs = dict.fromkeys((self.key_codec, self.value_codec))
        names = "" if list(codecs) == ["lloyd-max"] else " " + "/".join(codecs)
        return f"k{number(self.key_bits)}v{number(self.value_bits)}{names}"

    def packed_after(self, tokens: int, sink: int) -> int:
        """How many of so many tokens may be packed, if the first `sink` of them are not."""
        return max((tokens - sink - self.window) // BLOCK * BLOCK, 0)


def number(bits: float) -> str:
    """2.5 or 4, never 4.0."""
    return f"{bits:g}"


def _plain(bits: float) -> float:
    return int(bits) if float(bits).is_integer() else bits


def _list(values: tuple[float, ...]) -> str:
    return ", ".join(number(value) for value in sorted(values))


PRESETS = {
    "k8v3": KVSettings(8, 3),
    "k8v4": KVSettings(8, 4),
    "k4v4": KVSettings(4, 4),
    "paper-2.5": KVSettings(2.5, 2.5),
    "paper-3.5": KVSettings(3.5, 3.5),
    "polar": KVSettings(4, 4, "polar", "polar"),
}
