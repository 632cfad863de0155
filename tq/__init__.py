"""tq: large language models that fit, run fast and stay sharp on one machine."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tq.engine.cache.convert import convert_cache, upgrade_cache
    from tq.engine.cache.files import load_prompt_cache, save_prompt_cache
    from tq.engine.cache.settings import KVSettings
    from tq.engine.model.load import LoadedModel, load

__version__ = "0.1.0"
__all__ = [
    "KVSettings",
    "LoadedModel",
    "__version__",
    "convert_cache",
    "load",
    "load_prompt_cache",
    "save_prompt_cache",
    "upgrade_cache",
]

_WHERE = {
    "KVSettings": "tq.engine.cache.settings",
    "LoadedModel": "tq.engine.model.load",
    "convert_cache": "tq.engine.cache.convert",
    "load": "tq.engine.model.load",
    "load_prompt_cache": "tq.engine.cache.files",
    "save_prompt_cache": "tq.engine.cache.files",
    "upgrade_cache": "tq.engine.cache.convert",
}


def __getattr__(name: str) -> Any:
    """``tq.load`` and the like without importing MLX before they are asked for: the BLAS bridge must come first."""
    if name in _WHERE:
        from importlib import import_module

        from tq.cpu import blas

        blas.enable()
        return getattr(import_module(_WHERE[name]), name)
    raise AttributeError(f"module 'tq' has no attribute {name!r}")
