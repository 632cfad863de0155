"""tq: large language models that fit, run fast and stay sharp on one machine."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tq.engine.model.load import LoadedModel, load

__version__ = "0.1.0"
__all__ = ["LoadedModel", "__version__", "load"]


def __getattr__(name: str) -> Any:
    """``tq.load`` without importing MLX before it is asked for: the BLAS bridge must come first."""
    if name in ("LoadedModel", "load"):
        from tq.cpu import blas

        blas.enable()
        from tq.engine.model import load as module

        return getattr(module, name)
    raise AttributeError(f"module 'tq' has no attribute {name!r}")
