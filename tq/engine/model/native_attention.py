"""The attention of mlx-lm's models by tq's kernel, where MLX's for the CPU is tens of times slower.

mlx-lm's model files bind ``scaled_dot_product_attention`` by name when they are imported, so ``install`` replaces that
name in the files that a loaded model is made of. The replacement computes the same and hands over what it cannot do.
"""

import sys
from collections.abc import Callable
from functools import cache, lru_cache
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from tq import settings
from tq.cpu import lazy, library

NAME = "scaled_dot_product_attention"
KEPT_SINKS = 512  # arrays of sinks that stay pinned: one per layer of a model that has them

_changed: dict[str, dict[str, Any]] = {}  # namespaces by the name of their module


def install(model: nn.Module) -> int:
    """Let the files that ``model`` is made of use the kernel. Returns in how many that changed something."""
    before = len(_changed)
    for name in {type(module).__module__ for module in model.modules()}:
        namespace = vars(sys.modules[name]) if name in sys.modules else {}
        if namespace.get(NAME) is _original():
            namespace[NAME] = attention
            _changed[name] = namespace
    return len(_changed) - before


def uninstall() -> None:
    """Give all files mlx-lm's function back."""
    for namespace in _changed.values():
        namespace[NAME] = _original()
    _changed.clear()


def attention(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    cache: Any,
    scale: float,
    mask: mx.array | str | None,
    sinks: mx.array | None = None,
) -> mx.array:
    """As mlx-lm's function of the same arguments: (B, n_heads, L, value_dim)."""
    if hasattr(cache, "bits") or not _fits(queries, keys, values, mask):
        return _original()(queries, keys, values, cache, scale=scale, mask=mask, sinks=sinks)
    B, n_heads, length, _ = queries.shape
    inputs = [queries, keys, values]
    causal = isinstance(mask, str) and length > 1
    masked = isinstance(mask, mx.array)
    if isinstance(mask, mx.array):
        inputs.append(_four_axes(mask, keys.shape[2]))
    position = keys.shape[2] - length if causal else 0
    pinned = None if sinks is None else _pinned(sinks)
    params = _params(n_heads, keys.shape[1], keys.shape[3], values.shape[3], scale, causal, position, masked, pinned)
    outputs = [((B, n_heads, length, values.shape[3]), mx.float32)]
    return lazy.call("tq_attend", params, inputs, outputs, keep=pinned, strided=True)[0]


@cache
def _original() -> Callable[..., mx.array]:
    from mlx_lm.models import base

    return base.scaled_dot_product_attention


def _fits(queries: mx.array, keys: Any, values: Any, mask: Any) -> bool:
    """Whether the kernel takes these: float32 on the CPU, and a mask of one of the known kinds."""
    if isinstance(mask, mx.array):
        if mask.ndim > 4:
            return False
    elif mask is not None and mask != "causal":
        return False
    if not isinstance(keys, mx.array) or not queries.ndim == keys.ndim == values.ndim == 4:
        return False
    return (
        queries.dtype == keys.dtype == values.dtype == mx.float32
        and queries.shape[0] == keys.shape[0]
        and queries.shape[1] % keys.shape[1] == 0
        and queries.size > 0
        and values.size > 0
        and mx.default_device() == mx.Device(mx.cpu)
    )


def _four_axes(mask: mx.array, n_keys: int) -> mx.array:
    """(B or 1, n_heads or 1, L or 1, S), bool or float32."""
    mask = mask.reshape(*(1,) * (4 - mask.ndim), *mask.shape)
    if mask.dtype != mx.bool_:
        mask = mask.astype(mx.float32)
    return mask if mask.shape[3] == n_keys else mx.broadcast_to(mask, (*mask.shape[:3], n_keys))


@lru_cache(maxsize=64)
def _params(
    n_heads: int,
    n_kv_heads: int,
    head_dim: int,
    value_dim: int,
    scale: float,
    causal: bool,
    position: int,
    masked: bool,
    sinks: lazy.Pinned | None,
) -> library.AttendParams:
    return library.AttendParams(
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        head_dim=head_dim,
        value_dim=value_dim,
        scale=scale,
        causal=causal,
        position=position,
        sinks=None if sinks is None else sinks.addresses[0],
        exact=settings.cpu_exact(),
        mask=masked,
    )


_sinks: dict[int, tuple[mx.array, lazy.Pinned]] = {}


def _pinned(sinks: mx.array) -> lazy.Pinned:
    """The float32 values of ``sinks``, the same object for the same array."""
    found = _sinks.get(id(sinks))
    if found is None:
        if len(_sinks) >= KEPT_SINKS:
            _sinks.clear()
        # Beside its values the array itself is kept, because the id of a dead object is given to another.
        found = _sinks[id(sinks)] = (sinks, lazy.Pinned(sinks.astype(mx.float32)))
    return found[1]
