"""What a model's caches hold, as JSON and arrays, and back: for marks in memory and for prompts on disk.

Whatever mlx-lm or tq has as a cache goes through its `state`; a layer with several caches counts as these.
"""

from dataclasses import dataclass
from typing import Any

import mlx.core as mx


@dataclass(frozen=True)
class CacheState:
    """What caches held. Later changes of the caches do not reach it.

    Attributes:
        kinds: The class of each cache, by its name.
        outline: The state of each as JSON, with {"array": n} in place of the n-th array.
        arrays: These arrays.
    """

    kinds: list[str]
    outline: list[Any]
    arrays: list[mx.array]


def leaves(caches: list[Any]) -> list[Any]:
    """The caches, with those that a CacheList holds in its place."""
    found = []
    for cache in caches:
        parts = getattr(cache, "caches", None)
        found += [cache] if parts is None else leaves(list(parts))
    return found


def kinds(caches: list[Any]) -> list[str]:
    """The class of each leaf, by its name."""
    return [type(cache).__name__ for cache in leaves(caches)]


def capture(caches: list[Any]) -> CacheState:
    """What these caches hold now.

    Raises:
        ValueError: A cache has no state that could be given back to it, or one that is no JSON and no arrays.
    """
    arrays: list[mx.array] = []

    def outline(value: Any) -> Any:
        if isinstance(value, mx.array):
            # A handle of its own: caches write into theirs in place.
            arrays.append(mx.stop_gradient(value))
            return {"array": len(arrays) - 1}
        if isinstance(value, list | tuple):
            return [outline(item) for item in value]
        if value is None or isinstance(value, bool | int | float | str):
            return value
        raise ValueError(f"a cache's state holds a {type(value).__name__}")

    for cache in caches:
        if not can_restore(cache):
            raise ValueError(f"{type(cache).__name__} cannot be given a state")
    outlines = [outline(_state(cache)) for cache in caches]
    return CacheState(kinds(caches), outlines, arrays)


def restore(state: CacheState, caches: list[Any]) -> None:
    """Let these caches hold what others did.

    Raises:
        ValueError: They are of other classes.
    """
    found = kinds(caches)
    if found != state.kinds:
        raise ValueError(f"caches are {', '.join(dict.fromkeys(found))}, not {', '.join(dict.fromkeys(state.kinds))}")

    def value(outline: Any) -> Any:
        if isinstance(outline, dict):
            return mx.stop_gradient(state.arrays[outline["array"]])
        return [value(item) for item in outline] if isinstance(outline, list) else outline

    for cache, outline in zip(caches, state.outline, strict=True):
        cache.state = value(outline)


def can_restore(cache: Any) -> bool:
    """Whether a cache's `state` can be set."""
    return getattr(getattr(type(cache), "state", None), "fset", None) is not None


def can_always_trim(cache: Any) -> bool:
    """Whether a cache can forget its last tokens, however many follow: windows only can before they are full."""
    bounded = any(getattr(cache, name, None) is not None for name in ("max_size", "chunk_size"))
    return cache.is_trimmable() and not bounded


def _state(cache: Any) -> Any:
    """A cache's state, without the room for more tokens that mlx-lm's plain one has."""
    if type(cache).__name__ == "KVCache" and cache.keys is not None:
        return *cache.keys_and_values(), cache.offset
    return cache.state
