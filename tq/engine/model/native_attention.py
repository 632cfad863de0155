"""The attention of mlx-lm's models by tq's kernel, where MLX's for the CPU is tens of times slower.

It is what tq.engine.cache.hook puts in place of mlx-lm's function, where the kernels are. It computes the same, packed
caches included, and hands over what it cannot do.
"""

from functools import lru_cache
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from tq import settings
from tq.cpu import lazy, library
from tq.engine.cache import hook
from tq.engine.cache.native import pinned_sinks

_original = hook.original


def install(model: nn.Module) -> int:
    """Let the files that ``model`` is made of use the kernel. Returns in how many that changed something."""
    return hook.install(model, attention)


uninstall = hook.uninstall


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
    packed = hook.packed_attention(queries, keys, values, cache, scale, mask, sinks)
    if packed is not None:
        return packed
    if hasattr(cache, "bits") or not _fits(queries, keys, values, mask):
        return _original()(queries, keys, values, cache, scale=scale, mask=mask, sinks=sinks)
    B, n_heads, length, _ = queries.shape
    inputs = [queries, keys, values]
    causal = isinstance(mask, str) and length > 1
    masked = isinstance(mask, mx.array)
    if isinstance(mask, mx.array):
        inputs.append(_four_axes(mask, keys.shape[2]))
    position = keys.shape[2] - length if causal else 0
    pinned = None if sinks is None else pinned_sinks(sinks)
    params = _params(n_heads, keys.shape[1], keys.shape[3], values.shape[3], scale, causal, position, masked, pinned)
    outputs = [((B, n_heads, length, values.shape[3]), mx.float32)]
    return lazy.call("tq_attend", params, inputs, outputs, keep=pinned, strided=True)[0]


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
