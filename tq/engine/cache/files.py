"""Packed caches in files: mlx-lm's own format and functions, which find the class of a cache by its name."""

from pathlib import Path
from typing import Any

from tq.engine.cache.batch import BatchPackedKVCache
from tq.engine.cache.packed import PackedKVCache
from tq.engine.cache.window import PackedRotatingKVCache
from tq.errors import TQError

CLASSES: dict[str, Any] = {
    found.__name__: found for found in (PackedKVCache, PackedRotatingKVCache, BatchPackedKVCache)
}


def register() -> None:
    """Let mlx-lm's `load_prompt_cache` and CacheList find these classes: they look a name up in their own module.

    Raises:
        TQError: mlx-lm has another class of that name.
    """
    from mlx_lm.models import cache

    for name, found in CLASSES.items():
        if vars(cache).setdefault(name, found) is not found:
            raise TQError(f"this version of mlx-lm has a {name} of its own", "install mlx-lm 0.32")


def save_prompt_cache(path: str | Path, cache: list[Any], metadata: dict[str, str] | None = None) -> None:
    """Write a model's caches, packed or not, to a safetensors file. As mlx-lm's function of that name."""
    from mlx_lm.models.cache import save_prompt_cache

    save_prompt_cache(str(path), cache, metadata)


def load_prompt_cache(path: str | Path, return_metadata: bool = False) -> Any:
    """The caches that `save_prompt_cache`, tq's or mlx-lm's, wrote, and its metadata if asked for.

    Raises:
        TQError: There is no such file, it holds no caches, or ones that cannot be read here.
    """
    from mlx_lm.models.cache import load_prompt_cache

    register()
    try:
        return load_prompt_cache(str(path), return_metadata)
    except (OSError, RuntimeError, ValueError, KeyError, TypeError, IndexError) as error:
        raise TQError(f"cannot read a prompt cache from {path}: {str(error).splitlines()[0]}") from error
