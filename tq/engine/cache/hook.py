"""Where a model's attention finds packed tokens: a function in place of mlx-lm's, put in explicitly and taken out.

mlx-lm's model files bind `scaled_dot_product_attention` by name when they are imported, so `install` replaces that name
in the files that a loaded model is made of. Without it a packed cache hands decoded keys and values to the model's own
attention: the same result, with all tokens of a layer decoded at once.
"""

import sys
from collections.abc import Callable
from functools import cache as once
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from tq.engine.cache.batch import BatchPackedKVCache
from tq.engine.cache.packed import PackedKVCache

NAME = "scaled_dot_product_attention"

_changed: dict[str, dict[str, Any]] = {}  # namespaces by the name of their module


@once
def original() -> Callable[..., mx.array]:
    """mlx-lm's function."""
    from mlx_lm.models import base

    return base.scaled_dot_product_attention


def attention(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    cache: Any,
    scale: float,
    mask: mx.array | str | None,
    sinks: mx.array | None = None,
) -> mx.array:
    """As mlx-lm's function of the same arguments."""
    found = packed_attention(queries, keys, values, cache, scale, mask, sinks)
    if found is None:
        return original()(queries, keys, values, cache, scale=scale, mask=mask, sinks=sinks)
    return found


def packed_attention(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    cache: Any,
    scale: float,
    mask: mx.array | str | None,
    sinks: mx.array | None = None,
) -> mx.array | None:
    """The same if a packed cache gave these keys and values, else None."""
    if not isinstance(cache, PackedKVCache | BatchPackedKVCache):
        return None
    return cache.attend(queries, keys, values, scale=scale, mask=mask, sinks=sinks)


def install(model: nn.Module, function: Callable[..., mx.array] = attention) -> int:
    """Let the files that `model` is made of use `function`. Returns in how many that changed something."""
    changed = 0
    for name in {type(module).__module__ for module in model.modules()}:
        namespace = vars(sys.modules[name]) if name in sys.modules else {}
        if namespace.get(NAME) is not function and namespace.get(NAME) in (original(), attention):
            namespace[NAME] = function
            _changed[name] = namespace
            changed += 1
    return changed


def uninstall() -> None:
    """Give all files mlx-lm's function back."""
    for namespace in _changed.values():
        namespace[NAME] = original()
    _changed.clear()
