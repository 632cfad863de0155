"""How far apart a module of mlx-lm and the kernel that would stand for it are, over a few calls with random tokens.

A thorough comparison computes in float32; a brief one as the kernels are used. Where a module chooses experts with
modules of its own, these are left out: they compare numbers, which turns the least difference into a large one.
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
# The calls that a thorough comparison makes one after another: tokens, and the window of the mask (0: all that came
# before).
CALLS = ((5, 0), (3, 0), (1, 0), (4, 3), (1, 0))
FAR = (4099, 70001)  # positions: scales and embeddings may change with the length
REMEMBERED = 3  # tokens before those


def disagreement(module: nn.Module, found: type[NativeModule], kernel: Kernel, attempt: int) -> float:
    """The largest distance between what a module and a kernel compute, relative to what the module adds to its input.

    Args:
        found: What the module would become.
        attempt: Other attempts take other tokens.

    Raises:
        Unfamiliar: The module fails.
    """
    with _exact(module, kernel), _float32_cache(kernel), _plain_network(module, kernel):
        if found is native.NativeFeedForward:
            probes = [_probe(found, kernel, n_tokens, attempt, i) for i, (n_tokens, _) in enumerate(CALLS)]
            return max(distance(_fed(kernel, x), _own(module, x)) for x in probes)
        try:
            return _with_cache(module, found, kernel, attempt, strings=True)
        except Unfamiliar:  # some forwards know no masks but arrays
            return _with_cache(module, found, kernel, attempt, strings=False)


def glimpse(module: nn.Module, found: type[NativeModule], kernel: Kernel, attempt: int) -> float:
    """The same from one token far behind a few others, computed as it will be when the model is used.

    Both sides quantize activations to 8 bits, from numbers that differ in their last bits: now and then a code falls on
    the other side, which shows as a distance of about 1e-3. Another attempt then tells.
    """
    with _float32_cache(kernel), _plain_network(module, kernel):
        x = _probe(found, kernel, 1, attempt, FAR[-1])
        if found is native.NativeFeedForward:
            return distance(_fed(kernel, x), _own(module, x))
        return _far(module, found, kernel, x, None, FAR[-1])


def _compare(
    module: nn.Module, found: type[NativeModule], kernel: Kernel, x: mx.array, mask: Any, own: Any, ours: Any
) -> float:
    factors = None
    if found is native.ScaledNativeLayer:
        factors = mx.random.uniform(0.5, 2.0, (x.shape[1], 1), key=mx.random.key(x.shape[1]))
    expected = _own(module, x, *(() if factors is None else (factors,)), mask, own)
    got = native.run(module, kernel, x, mask, ours, factors)
    base = 0 if found is native.NativeAttention else x
    return float("inf") if got is None else distance(got - base, expected - base)


def _with_cache(module: nn.Module, found: type[NativeModule], kernel: Kernel, attempt: int, strings: bool) -> float:
    from mlx_lm.models.base import create_causal_mask
    from mlx_lm.models.cache import KVCache

    own, ours = KVCache(), KVCache()
    errors = []
    for i, (n_tokens, window) in enumerate(CALLS):
        mask = None
        if n_tokens > 1:
            plain = strings and not window
            mask = "causal" if plain else create_causal_mask(n_tokens, own.offset, window_size=window or None)
        x = _probe(found, kernel, n_tokens, attempt, i)
        errors.append(_compare(module, found, kernel, x, mask, own, ours))
    errors.append(_distance_of_caches(ours, own))
    for position in FAR:
        mask = "causal" if strings else create_causal_mask(3, REMEMBERED)
        x = _probe(found, kernel, 3, attempt, position)
        errors.append(_far(module, found, kernel, x, mask, position))
    return max(errors)


def _far(module: nn.Module, found: type[NativeModule], kernel: Kernel, x: mx.array, mask: Any, position: int) -> float:
    own, ours = (_cache_far_away(position, kernel.form) for _ in range(2))
    return max(_compare(module, found, kernel, x, mask, own, ours), _distance_of_caches(ours, own))


def _distance_of_caches(ours: Any, own: Any) -> float:
    pairs = zip(ours.keys_and_values(), own.keys_and_values(), strict=True)
    return max(distance(a, b) for a, b in pairs)


def _cache_far_away(position: int, form: Form | None) -> Any:
    """A cache that has forgotten all before a position but for the last few tokens, which are random."""
    from mlx_lm.models.cache import KVCache

    class Far(KVCache):
        keys: mx.array
        values: mx.array

        def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
            self.keys = mx.concatenate([self.keys, keys], axis=2)
            self.values = mx.concatenate([self.values, values], axis=2)
            return self.keys, self.values

        def native_place(self, n_tokens: int, form: Form) -> Place:
            keys, values = (
                mx.concatenate([a, mx.zeros((*a.shape[:2], n_tokens, a.shape[3]))], axis=2)
                for a in (self.keys, self.values)
            )

            def finish(keys: mx.array, values: mx.array) -> None:
                self.keys, self.values = keys, values

            return Place(keys, values, REMEMBERED, REMEMBERED + n_tokens, self.offset, finish)

        def keys_and_values(self) -> tuple[mx.array, mx.array]:
            return self.keys, self.values

    assert form is not None
    cache = Far()
    cache.offset = position
    shape = (1, form.n_kv_heads, REMEMBERED)
    cache.keys = mx.random.normal((*shape, form.head_dim), key=mx.random.key(1))
    cache.values = mx.random.normal((*shape, form.value_dim), key=mx.random.key(2))
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
    before = [p.exact for p in params], kernel.exact
    for p in params:
        p.exact = 1
    kernel.exact = True
    try:
        yield
    finally:
        for p, exact in zip(params, before[0], strict=True):
            p.exact = exact
        kernel.exact = before[1]


@contextmanager
def _float32_cache(kernel: Kernel) -> Iterator[None]:
    """Let a kernel keep keys and values as the module does."""
    form = kernel.form
    if form is not None:
        kernel.form = form._replace(dtype=mx.float32)
    try:
        yield
    finally:
        kernel.form = form


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
