"""Settings and where each comes from: flags, TQ_* variables, the project's and the user's tq.toml, a profile, defaults.

The strongest source that says something about a setting decides. [kv] has two rules more, because its values belong
together: `bits` names a whole format, so that the format of weaker sources does not count; and the strongest source
that says anything of [kv] decides whether keys and values are packed at all.
"""

import contextlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from tq import settings
from tq.engine.cache.settings import PRESETS, KVSettings
from tq.engine.machine import limits
from tq.engine.machine.profiles import beside, pick_profile, profile_path
from tq.engine.machine.tables import NONE, Config, Profile
from tq.engine.machine.toml_file import Mistake, TomlFile, explain, read, refuse
from tq.errors import TQError, UsageError

AUTO = "auto"
FILE = "tq.toml"
KV_FORMAT = ("bits", "key_bits", "value_bits", "codec", "group_size")
Source = Literal["flag", "variable", "project", "user", "profile", "default"]


@dataclass(frozen=True)
class Setting:
    """Something that a person may set.

    Attributes:
        name: Its path in TOML: "kv.bits" is `bits` of the table [kv].
        flag: The option of commands that have it.
        default: What counts if nobody says anything.
    """

    name: str
    flag: str | None = None
    default: Any = None

    @property
    def variable(self) -> str:
        return "TQ_" + self.name.upper().replace(".", "_")


PLAIN = KVSettings()
SETTINGS = (
    Setting("profile", "--profile", NONE),
    Setting("recipe", "--recipe", NONE),
    Setting("prompt_cache", "--prompt-cache", "2GB"),
    Setting("kv.bits", "--kv-bits", NONE),
    Setting("kv.key_bits", "--kv-k-bits"),
    Setting("kv.value_bits", "--kv-v-bits"),
    Setting("kv.codec", "--kv-codec"),
    Setting("kv.group_size", "--kv-group-size", PLAIN.group_size),
    Setting("kv.sink", "--kv-sink", PLAIN.sink),
    Setting("kv.window", None, PLAIN.window),
    Setting("kv.start", "--kv-start", PLAIN.start),
    Setting("prefill.step", "--prefill-step", 2048),
    Setting("serve.port", "--port", 8080),
    Setting("serve.parallel", "--parallel", 8),
    Setting("serve.queue", "--queue", 64),
    Setting("serve.prefix_cache", "--prefix-cache"),
    Setting("stream.budget", "--budget", AUTO),
    Setting("stream.workers", "--workers", 8),
    Setting("stream.policy", "--policy", "lrfu"),
    Setting("stream.prefetch", "--prefetch", AUTO),
)
BY_NAME = {setting.name: setting for setting in SETTINGS}


@dataclass(frozen=True)
class Found:
    """The value of a setting, and where it is from: what kind of source, and the flag, the variable or file:line."""

    value: Any
    source: Source
    where: str


@dataclass(frozen=True)
class Layer:
    """What one source says: values by the names of settings."""

    source: Source
    values: Mapping[str, Found]


@dataclass(frozen=True)
class Settings:
    """The settings of one run.

    Attributes:
        found: Every setting, by its name.
        profile: The profile that counts, and why it was picked if it was.
        files: Each tq.toml that was read.
        mistakes: Of files and variables, which then count as if they said nothing.
    """

    found: Mapping[str, Found]
    profile: TomlFile[Profile] | None = None
    profile_reason: str | None = None
    files: tuple[Path, ...] = ()
    mistakes: tuple[Mistake, ...] = ()

    def __getitem__(self, name: str) -> Any:
        return self.found[name].value

    def check(self) -> None:
        """Raises UsageError if there are mistakes, or what different sources say does not go together."""
        refuse(self.mistakes)
        _ = self.kv

    @property
    def prompt_cache_bytes(self) -> int:
        """Raises UsageError if the flag has no size."""
        return self._size_bytes("prompt_cache")

    @property
    def prefix_cache_bytes(self) -> int | None:
        """None: as the server chooses. Raises UsageError if the flag has no size."""
        return None if self["serve.prefix_cache"] is None else self._size_bytes("serve.prefix_cache")

    def _size_bytes(self, name: str) -> int:
        try:
            return settings.size_bytes(self[name])
        except UsageError as error:
            raise UsageError(f"{self.found[name].where}: {error.message}", error.hint) from None

    @property
    def prefill_step(self) -> int:
        """Raises UsageError if the flag is out of range."""
        if self["prefill.step"] < 1:
            raise UsageError(f"{self.found['prefill.step'].where} must be 1 or more, not {self['prefill.step']}")
        return self["prefill.step"]

    @property
    def recipe(self) -> str | None:
        """The name or the path of a recipe for `tq convert`; None if there is none."""
        return None if self["recipe"] == NONE else self["recipe"]

    @cached_property
    def kv(self) -> KVSettings | None:
        """How keys and values are packed; None if they are not.

        Raises:
            UsageError: What several sources say does not go together.
        """
        if self["kv.bits"] == NONE:
            return None
        given = {
            name.removeprefix("kv."): found.value
            for name, found in self.found.items()
            if name.startswith("kv.") and found.source != "default"
        }
        try:
            return KVSettings.from_options(**given) or PLAIN
        except UsageError as error:
            places = {
                f"{name} from {found.where}"
                for name, found in self.found.items()
                if name.startswith("kv.") and found.source not in ("default", "flag")
            }
            raise UsageError(error.message, ", ".join(sorted(places)) or error.hint) from None


def resolve(
    flags: Mapping[str, Any] | None = None,
    *,
    environment: Mapping[str, str] | None = None,
    folder: Path | None = None,
    memory_bytes: int | None = None,
) -> Settings:
    """All settings as they are for somebody who gives these flags in this folder.

    Args:
        flags: By the names of settings; None is not given.
        environment: Of the process, if None.
        folder: Where to look for the project's tq.toml; the current one, if None.
        memory_bytes: Of the machine, for the profile "auto"; this machine's, if None.
    """
    mistakes: list[Mistake] = []
    layers = [_flags(flags or {}), _variables(os.environ if environment is None else environment, mistakes)]
    files = []
    for source, path in config_files(folder):
        config = read(path, Config)
        if isinstance(config, TomlFile):
            files.append(path)
            layers.append(_file_layer(config, source))
        else:
            mistakes += config
    profile, reason = _profile(layers, memory_bytes, mistakes)
    if profile is not None:
        layers.append(_file_layer(profile, "profile"))
    return Settings(_merged(layers), profile, reason, tuple(files), tuple(mistakes))


def config_files(folder: Path | None = None) -> list[tuple[Source, Path]]:
    """The files tq.toml that count in a folder, the current one if None, the strongest first.

    The project's is in the folder or in the nearest one above that has it, up to the root of a repository or the home
    of this user; where there is neither, only in the folder itself.
    """
    found: list[tuple[Source, Path]] = []
    above: list[Path] = []
    with contextlib.suppress(FileNotFoundError):  # somebody has deleted the current folder
        here = (folder or Path.cwd()).absolute()
        above = [here, *here.parents]
    home: Path | None = None  # a user without one has no file there
    user: Path | None = None
    with contextlib.suppress(RuntimeError, TQError):
        home = Path.home().resolve()
        user = settings.config_file()
    # os.path's: a folder that this user may not look into has nothing for him, and Path.exists would raise.
    ends = [n for n, path in enumerate(above) if path.resolve() == home or os.path.exists(path / ".git")]
    for path in above[: ends[0] + 1 if ends else 1]:
        if os.path.exists(path / FILE):
            found.append(("project", path / FILE))
            break
    if user is not None and os.path.exists(user) and not any(path.samefile(user) for _, path in found):
        found.append(("user", user))
    return found


def _flags(flags: Mapping[str, Any]) -> Layer:
    """Values as they are: whoever uses them checks them, as those of all other flags."""
    return Layer(
        "flag",
        {
            name: Found(_normal(name, value), "flag", str(BY_NAME[name].flag))
            for name, value in flags.items()
            if value is not None
        },
    )


def _variables(environment: Mapping[str, str], mistakes: list[Mistake]) -> Layer:
    values = {}
    for setting in SETTINGS:
        text = environment.get(setting.variable)
        if not text:
            continue
        table, _, key = setting.name.rpartition(".")
        try:  # as a file that says nothing else, by somebody who writes 8 as "8"
            valid = Config.model_validate({table: {key: text}} if table else {key: text}, strict=False)
        except ValidationError as error:
            message, hint = explain(Config, error.errors()[0])
            where = f"{setting.variable}={text}"
            mistakes.append(Mistake(where, message.removeprefix(f"{setting.name}: "), hint))
            continue
        values[setting.name] = Found(_normal(setting.name, _at(valid, setting.name)), "variable", setting.variable)
    return Layer("variable", values)


def _file_layer(file: TomlFile[Config] | TomlFile[Profile], source: Source) -> Layer:
    values = {}
    for setting in SETTINGS:
        value = _at(file.values, setting.name)
        if value is None:
            continue
        where = file.where(*setting.name.split("."))
        if setting.name in ("profile", "recipe") and value not in (AUTO, NONE):
            value = beside(value, file.path.parent)
        values[setting.name] = Found(_normal(setting.name, value), source, where)
    return Layer(source, values)


def _at(values: Config | Profile, name: str) -> Any:
    """A value by the name of its setting; None if the schema has no such key."""
    found: Any = values
    for key in name.split("."):
        found = getattr(found, key, None)
    return found


def _normal(name: str, value: Any) -> Any:
    return value.strip().lower() if name == "kv.bits" else value


def _profile(
    layers: list[Layer], memory_bytes: int | None, mistakes: list[Mistake]
) -> tuple[TomlFile[Profile] | None, str | None]:
    """The profile that the strongest source asks for, and why it was picked if nobody named it."""
    asked = next((layer.values["profile"] for layer in layers if "profile" in layer.values), None)
    if asked is None or asked.value == NONE:
        return None, None
    name, reason = asked.value, None
    if name == AUTO:
        name, reason = pick_profile(limits.memory_bytes() if memory_bytes is None else memory_bytes)
        if name is None:
            return None, reason
    try:
        found = read(profile_path(name), Profile)
    except UsageError as error:
        mistakes.append(Mistake(asked.where, error.message, error.hint))
        return None, None
    if isinstance(found, TomlFile):
        return found, reason
    mistakes += found
    return None, None


def _merged(layers: list[Layer]) -> dict[str, Found]:
    found = {setting.name: Found(setting.default, "default", "default") for setting in SETTINGS}
    about_kv = [layer for layer in layers if any(name.startswith("kv.") for name in layer.values)]
    packed = bool(about_kv) and not _says_none(about_kv[0])
    hidden: set[str] = set()
    for layer in layers:
        for name, value in layer.values.items():
            taken_back = packed and name == "kv.bits" and value.value == NONE
            if found[name].source == "default" and name not in hidden and not taken_back:
                found[name] = value
        if "kv.bits" in layer.values and not (packed and _says_none(layer)):
            hidden.update(f"kv.{name}" for name in KV_FORMAT)
    if packed and found["kv.bits"].value == NONE:
        found["kv.bits"] = replace(found["kv.bits"], value=next(k for k, v in PRESETS.items() if v == PLAIN))
    return found


def _says_none(layer: Layer) -> bool:
    return "kv.bits" in layer.values and layer.values["kv.bits"].value == NONE
