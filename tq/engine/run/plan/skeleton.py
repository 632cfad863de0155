"""A model without weights: mlx-lm's modules over arrays that have a shape and a type, and take no memory.

MLX arrays are graphs until they are evaluated. What a model computes from such arrays has the shapes and types of the
real thing, so that a token that goes through it says what the caches of any architecture hold.
"""

import copy
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

from tq.engine.cache import hook
from tq.engine.cache.state import leaves
from tq.engine.model.architecture import build_model, parameters
from tq.errors import TQError

MOST_TOKENS = 16  # that a state of fixed size remembers, such as the last words of an n-gram
# Head dimensions of Metal's attention for many queries (mlx/backend/metal/scaled_dot_product_attention.cpp) that every
# release of MLX has. Newer ones also have 72 and 96: there `as_on_gpu` counts too much, never too little.
FUSED_HEAD_DIMS = (64, 80, 128)


@dataclass(frozen=True)
class Blueprint:
    """What to build.

    Attributes:
        config: config.json.
        dtype: Of activations, and of all floating-point parameters that `kept` does not name.
        kept: Types of parameters that stay as they are stored.
        folder, trust_remote_code: Where a model's own code is, and whether it may run.
    """

    config: dict[str, Any]
    dtype: mx.Dtype
    kept: dict[str, mx.Dtype]
    folder: Path | None = None
    trust_remote_code: bool = False


class Skeleton:
    """A model that can be called, and takes no memory.

    Attributes:
        model: mlx-lm's.
        arrays: Its parameters by path. Calls may replace them by others of the same shapes.
    """

    def __init__(self, blueprint: Blueprint):
        """Raises TQError: mlx-lm has no such architecture, or it cannot run on this machine."""
        self.model: nn.Module = build_model(blueprint.config, blueprint.folder, blueprint.trust_remote_code)
        self.model.eval()
        self.arrays = {
            name: blank(array.shape, _type_of(name, array, blueprint)) for name, array in parameters(self.model).items()
        }
        self.set(list(self.arrays.values()))
        try:
            self._filled = self._fill()
        except RuntimeError as error:
            kind = blueprint.config.get("model_type")
            raise TQError(
                f"what a {kind} model keeps cannot be found out on this machine: {str(error).splitlines()[0]}"
            ) from error

    def set(self, arrays: list[mx.array]) -> None:
        """Let these be the parameters, in the order of `arrays`."""
        self.model.update(tree_unflatten(list(zip(self.arrays, arrays, strict=True))))

    def caches(self) -> list[Any]:
        """The model's caches, without tokens."""
        from mlx_lm.models.cache import make_prompt_cache

        return make_prompt_cache(self.model)

    def _fill(self) -> list[Any]:
        """Caches after as many single tokens as it takes until states have the size that they keep."""
        caches = self.caches()
        before = None
        for _ in range(MOST_TOKENS):
            self(1, caches)
            states = [cache.nbytes for cache in leaves(caches) if type(cache).__name__ == "ArraysCache"]
            if not states or states == before:
                break
            before = states
        return caches

    def filled(self) -> list[Any]:
        """The caches after some tokens: their arrays have the heads, numbers and types of real ones."""
        return copy.copy(self._filled)

    def __call__(self, n_tokens: int, caches: list[Any]) -> mx.array:
        """Logits of so many tokens, which are never computed."""
        with plain_attention(self.model):
            return self.model(blank((1, n_tokens), mx.int32), cache=caches)


def blank(shape: tuple[int, ...], dtype: mx.Dtype) -> mx.array:
    """An array that takes no memory, not even where somebody evaluates it: one number, seen as many."""
    return mx.broadcast_to(mx.zeros((), dtype), shape)


def _type_of(name: str, array: mx.array, blueprint: Blueprint) -> mx.Dtype:
    if name in blueprint.kept:
        return blueprint.kept[name]
    return blueprint.dtype if mx.issubdtype(array.dtype, mx.floating) else array.dtype


@contextmanager
def plain_attention(model: nn.Module) -> Iterator[None]:
    """mlx-lm's own attention in the files of a model, where one that was loaded before has put another (hook.py)."""
    spaces = [vars(sys.modules[name]) for name in {type(module).__module__ for module in model.modules()}]
    before = [(space, space[hook.NAME]) for space in spaces if hook.NAME in space]
    for space, _ in before:
        space[hook.NAME] = hook.original()
    try:
        yield
    finally:
        for space, function in before:
            space[hook.NAME] = function


@contextmanager
def as_on_gpu() -> Iterator[None]:
    """Attention and the gated delta rule as a GPU of Apple computes them: by kernels that keep nothing in memory."""
    from mlx_lm.models import gated_delta

    attention, rule = mx.fast.scaled_dot_product_attention, gated_delta.gated_delta_ops

    def fused(q: mx.array, k: mx.array, v: mx.array, **how: Any) -> mx.array:
        if q.shape[-1] != v.shape[-1] or q.shape[-1] not in FUSED_HEAD_DIMS:
            return attention(q, k, v, **how)
        mask = [m for m in (how.get("mask"),) if isinstance(m, mx.array)]
        return mx.depends(mx.zeros((*q.shape[:-1], v.shape[-1]), q.dtype), [q, k, v, *mask])

    def kernel(
        q: mx.array, k: mx.array, v: mx.array, g: mx.array, beta: mx.array, state: mx.array, mask: Any = None
    ) -> tuple[mx.array, mx.array]:
        made = [mx.zeros(v.shape, q.dtype), mx.zeros(state.shape, state.dtype)]
        y, after = mx.depends(made, [q, k, v, g, beta, state])
        return y, after

    mx.fast.scaled_dot_product_attention, gated_delta.gated_delta_ops = fused, kernel
    try:
        yield
    finally:
        mx.fast.scaled_dot_product_attention, gated_delta.gated_delta_ops = attention, rule
