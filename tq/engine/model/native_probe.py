"""How far apart a module of mlx-lm and the kernel that would stand for it are, over a few calls with random tokens.

All is computed in float32. Where a module chooses experts with modules of its own, these are left out: they compare
numbers, which turns the least difference into a large one.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from tq.engine.model import native_layers as native
from tq.engine.model.layers import QuantModule
from tq.engine.model.native_cache import Form, Place
from tq.engine.model.native_experts import FusedExperts
from tq.engine.model.native_layers import Kernel, NativeModule
from tq.engine.model.native_parts import Unfamiliar, distance

SMALL = 0.1  # root mean square of probes of layers: what a layer adds to them must not be lost in rounding
# The calls that are compared: tokens, and the window of the mask (0: as far as the cache reaches).
Calls = tuple[tuple[int, int], ...]
THOROUGH: Calls = ((5, 0), (3, 0), (1, 0), (4, 3), (1, 0))
BRIEF: Calls = ((2, 0), (1, 0))
FAR = (4099, 70001)  # positions, without what came before: scales and embeddings may change with the length


def disagreement(module: nn.Module, found: type[NativeModule], kernel: Kernel, calls: Calls, attempt: int) -> float:
    """The largest distance between what a module and a kernel compute, relative to what the module adds to its input.

    Args:
        found: What the module would become.
        attempt: Other attempts take other tokens.

    Raises:
        Unfamiliar: The module fails.
    """
    with _exact(module, kernel), _plain_network(module, kernel):
        if found is native.NativeFeedForward:
            probes = [_probe(found, kernel, n_tokens, attempt, i) for i, (n_tokens, _) in enumerate(calls)]
            return max(distance(_fed(kernel, x), _own(module, x)) for x in probes)
        try:
            return _with_cache(module, found, kernel, calls, attempt, strings=True)
        except Unfamiliar:  # some forwards know no masks but arrays
            return _with_cache(module, found, kernel, calls, attempt, strings=False)


def _with_cache(
    module: nn.Module, found: type[NativeModule], kernel: Kernel, calls: Calls, attempt: int, strings: bool
) -> float:
    from mlx_lm.models.base import create_causal_mask
    from mlx_lm.models.cache import KVCache

    def compare(x: mx.array, mask: Any, own: Any, ours: Any) -> float:
        factors = None
        if found is native.ScaledNativeLayer:
            factors = mx.random.uniform(0.5, 2.0, (x.shape[1], 1), key=mx.random.key(x.shape[1]))
        expected = _own(module, x, *(() if factors is None else (factors,)), mask, own)
        got = native.run(module, kernel, x, mask, ours, factors)
        base = 0 if found is native.NativeAttention else x
        return float("inf") if got is None else distance(got - base, expected - base)

    own, ours = KVCache(), KVCache()
    errors = []
    for i, (n_tokens, window) in enumerate(calls):
        mask = None
        if n_tokens > 1:
            plain = strings and not window
            mask = "causal" if plain else create_causal_mask(n_tokens, own.offset, window_size=window or None)
        errors.append(compare(_probe(found, kernel, n_tokens, attempt, i), mask, own, ours))
    for name in ("keys", "values"):
        errors.append(distance(getattr(ours, name)[:, :, : ours.offset], getattr(own, name)[:, :, : own.offset]))
    for position in FAR if calls is THOROUGH else FAR[-1:]:
        mask = "causal" if strings else create_causal_mask(3)
        x = _probe(found, kernel, 3, attempt, position)
        errors.append(compare(x, mask, _far(position), _far(position)))
    return max(errors)


def _far(position: int) -> Any:
    """A cache that has forgotten everything before a position."""
    from mlx_lm.models.cache import KVCache

    class Far(KVCache):
        def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
            return keys, values

        def native_place(self, n_tokens: int, form: Form) -> Place:
            shape = (1, form.n_kv_heads, n_tokens)
            keys = mx.zeros((*shape, form.head_dim), form.dtype)
            values = mx.zeros((*shape, form.value_dim), form.dtype)
            return Place(keys, values, 0, n_tokens, self.offset, lambda *_: None)

    cache = Far()
    cache.offset = position
    return cache


def _probe(found: type[NativeModule], kernel: Kernel, n_tokens: int, attempt: int, number: int) -> mx.array:
    size = 1.0 if found in (native.NativeAttention, native.NativeFeedForward) else SMALL
    return size * mx.random.normal((1, n_tokens, kernel.hidden), key=mx.random.key(1000 * attempt + number))


def _fed(kernel: Kernel, x: mx.array) -> mx.array:
    y = kernel.feed(x)
    assert y is not None
    return y


def _own(module: nn.Module, *arguments: Any) -> mx.array:
    """The module's own forward. Raises Unfamiliar if it does not take such arguments."""
    try:
        y = module(*arguments)
        mx.eval(y)
    except Exception as error:  # it is code of any architecture, called in a way that may not be its own
        message = (str(error) or repr(error)).splitlines()[0]
        raise Unfamiliar(f"fails when it is probed: {message}") from error
    if not isinstance(y, mx.array):
        raise Unfamiliar("returns more than one array")
    return y


@contextmanager
def _exact(module: nn.Module, kernel: Kernel) -> Iterator[None]:
    """Let the kernels of a module compute in float32."""
    params = []
    for part in module.modules():
        if isinstance(part, QuantModule) and part.prepared is not None:
            params += [part.prepared.matmul, part.prepared.gather]
        elif isinstance(part, FusedExperts):
            params.append(part.fused.params)
    before = [p.exact for p in params], kernel.exact, kernel.form
    for p in params:
        p.exact = 1
    kernel.exact = True
    if kernel.form is not None:
        kernel.form = kernel.form._replace(dtype=mx.float32)
    try:
        yield
    finally:
        for p, exact in zip(params, before[0], strict=True):
            p.exact = exact
        _, kernel.exact, kernel.form = before


class _Identity(nn.Module):
    def __call__(self, x: mx.array) -> mx.array:
        return x


@contextmanager
def _plain_network(module: nn.Module, kernel: Kernel) -> Iterator[None]:
    """Put nothing in the place of a feed-forward network that the kernel leaves to the module."""
    if kernel.network is None:
        yield
        return
    network = module[kernel.network]
    module[kernel.network] = _Identity()
    try:
        yield
    finally:
        module[kernel.network] = network
