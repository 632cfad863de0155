"""The schema of settings: the tables of a profile, and of tq.toml, which has those that are not about one machine."""

from collections.abc import Callable
from typing import Annotated, Any, ClassVar

from pydantic import BeforeValidator, Field, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from tq import settings
from tq.engine.cache.settings import KVSettings
from tq.engine.machine.toml_file import SENTENCE, Table
from tq.engine.model.recipe_file import Weights
from tq.errors import UsageError

NONE = "none"  # the value that takes back what a weaker source says


def _text(value: Any) -> Any:
    """People write 4 or 0 where a text such as "8,3" or "2GB" may be."""
    return str(value) if type(value) in (int, float) else value


Text = Annotated[str, BeforeValidator(_text)]


class KVTable(Table):
    """[kv]: how keys and values are packed. What fits together is checked when all sources are known."""

    bits: Text | None = None
    key_bits: float | None = None
    value_bits: float | None = None
    codec: str | None = None
    group_size: int | None = None
    sink: int | None = None
    window: int | None = None
    start: int | None = None

    @field_validator("bits")
    @classmethod
    def _are_bits(cls, text: str | None) -> str | None:
        return _checked(text, lambda value: value.strip().lower() == NONE or KVSettings.parse(value))

    @field_validator("key_bits", "value_bits")
    @classmethod
    def _are_a_width(cls, bits: float | None) -> float | None:
        return _checked(bits, lambda value: KVSettings(value, value))

    @field_validator("codec")
    @classmethod
    def _is_a_codec(cls, codec: str | None) -> str | None:
        return _checked(codec, lambda value: KVSettings.from_options("4", codec=value))

    @field_validator("group_size", "sink", "window", "start")
    @classmethod
    def _is_a_count(cls, value: int | None, info: ValidationInfo) -> int | None:
        return _checked(value, lambda value: KVSettings(**{str(info.field_name): value}))


class PrefillTable(Table):
    """[prefill]: how a prompt is read."""

    step: int | None = Field(None, ge=1)


class ServeTable(Table):
    """[serve]: how many requests the server takes, and what it keeps.

    Not who may reach it: a file that came with somebody's project must not open a machine to the network.
    """

    elsewhere: ClassVar[dict[str, str]] = {
        "host": "only --host says who may reach the server",
        "api_key": "TQ_API_KEY keeps it out of files",
    }

    port: int | None = Field(None, ge=0, le=65535)
    parallel: int | None = Field(None, ge=1)
    queue: int | None = Field(None, ge=0)
    prefix_cache: Text | None = None

    @field_validator("prefix_cache")
    @classmethod
    def _is_a_size(cls, text: str | None) -> str | None:
        return _checked(text, settings.size_bytes)


class StreamTable(Table):
    """[stream]: how experts on the disk are read, and how much memory they get."""

    budget: Text | None = None
    workers: int | None = None
    policy: str | None = None
    prefetch: str | None = None

    @field_validator("budget", "workers", "policy", "prefetch")
    @classmethod
    def _fits_the_engine(cls, value: Any, info: ValidationInfo) -> Any:
        from tq.engine.stream.settings import StreamSettings

        plain = {"budget": "auto", "workers": 1, "policy": "lru", "prefetch": "auto", "max_active_experts": None}
        return _checked(value, lambda value: StreamSettings.from_options(**{**plain, str(info.field_name): value}))


class MachineTable(Table):
    """[machine]: facts of the hardware that a profile is for."""

    memory_gb: float = Field(gt=0)
    wired_limit_mb: int | None = Field(None, gt=0)


class Shared(Table):
    """What profiles and tq.toml have in common."""

    prompt_cache: Text | None = None
    kv: KVTable = KVTable()
    prefill: PrefillTable = PrefillTable()
    serve: ServeTable = ServeTable()
    stream: StreamTable = StreamTable()

    @field_validator("prompt_cache")
    @classmethod
    def _is_a_size(cls, text: str | None) -> str | None:
        return _checked(text, settings.size_bytes)


class Profile(Shared):
    """A profile; a recipe is one that has nothing but [weights]."""

    elsewhere: ClassVar[dict[str, str]] = dict.fromkeys(("profile", "recipe"), "this belongs into tq.toml")

    description: str = ""
    machine: MachineTable | None = None
    weights: Weights = Weights()


class Config(Shared):
    """tq.toml, and variables: `profile` and `recipe` are names or files."""

    elsewhere: ClassVar[dict[str, str]] = {
        "machine": 'this belongs into a profile: write a file, and profile = "FILE" here',
        "weights": 'this belongs into a recipe: write a file, and recipe = "FILE" here',
    }

    profile: str | None = None
    recipe: str | None = None


def _checked(value: Any, check: Callable[[Any], Any]) -> Any:
    """The value, if `check` takes it; what it says against it is what pydantic says then."""
    if value is not None:
        try:
            check(value)
        except UsageError as error:
            raise PydanticCustomError(SENTENCE, "{message}", {"message": error.message, "hint": error.hint}) from None
    return value
