"""Decoder layers, attention and feed-forward modules of mlx-lm that run as one kernel of tq/cpu (layer.cpp).

A module keeps its place, its parts and its attributes; its class becomes a subclass with another `__call__`. What the
kernel cannot do (batches, quantized caches, other types) goes through the forward that it had.
"""

import ctypes
from dataclasses import dataclass, field
from functools import cache
from typing import Any, ClassVar

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from tq import settings
from tq.cpu import lazy, library
from tq.engine.cache.packed import PackedKVCache
from tq.engine.model import native_cache
from tq.engine.model.layers import QuantLinear
from tq.engine.model.native_cache import Form
from tq.engine.model.native_parts import FeedForward, Norm
from tq.engine.model.native_routing import Mixture
from tq.engine.model.native_structure import Attention, Layer
from tq.engine.model.streamed import StreamedExperts

ATTENTION, FEED_FORWARD, CHOOSE, COMBINE = 1, 2, 4, 8  # tq_layer_parts
NO_ALIAS = -1
RESTING = 10  # among the parameters of a packed cache


@dataclass(eq=False)
class Kernel:
    """The parameters of a native module.

    Attributes:
        parts: Which halves of a layer it computes.
        pinned: What the structure at ``address`` points to, and itself.
        form: Of keys and values.
        exact: Whether it computes with float32 activations.
        network, before, after: The name of the feed-forward network in a layer whose second half is left to its own
            modules, and of the norms before and after it.
        residual: What that half is multiplied by.
        experts, chosen: What computes the experts of the second half if they are streamed, and how many of a token.
        calls: How often the kernel was called.
        bound: The ways in which it was called so far.
    """

    parts: int
    address: int
    pinned: lazy.Pinned
    form: Form | None
    hidden: int
    n_heads: int
    exact: bool
    network: str | None = None
    before: str | None = None
    after: str | None = None
    residual: float = 1.0
    experts: StreamedExperts | None = None
    chosen: int = 0
    calls: int = 0
    bound: dict[tuple, lazy.Bound] = field(default_factory=dict)

    def append(self, x: mx.array, cache: Any) -> mx.array | None:
        """What `attend` gives for a token that mlx-lm's own cache has room for, in a third of the time; or None."""
        if self.form is None or type(cache) is not native_cache.plain_cache():
            return None
        heads, key_dim, value_dim, _ = self.form
        y = self._bound((self.parts, False, True, False, False, self.exact), 2).append(
            x, cache, heads, key_dim, value_dim
        )
        self.calls += y is not None
        return y

    def attend(self, x: mx.array, mask: Any, cache: Any, factors: mx.array | None, parts: int) -> mx.array | None:
        """The half with attention, or both. None if the kernel cannot do this."""
        shape = x.shape
        if len(shape) != 3 or shape[0] != 1 or x.dtype != mx.float32 or not shape[1]:
            return None
        tokens = shape[1]
        if factors is not None and (factors.size != tokens or factors.dtype != mx.float32):
            return None
        if isinstance(cache, PackedKVCache):
            return self._attend_packed(x, mask, cache, factors, parts)
        inputs, row, rows, position, finish = [x], 0, tokens, 0, None
        if cache is not None:
            assert self.form is not None
            found = native_cache.place(cache, tokens, self.form)
            if found is None:
                return None
            keys, values, row, rows, position, finish = found
            inputs += (keys, values)
            del found, keys, values  # nobody else may hold them when they are written to
        causal = type(mask) is str
        masked = mask is not None and not causal
        if masked:
            if not self._reads(mask, tokens, rows):
                return None
            inputs.append(mask)
        elif causal and mask != "causal":
            return None
        if factors is not None:
            inputs.append(factors)
        what = (parts, causal, finish is not None, masked, factors is not None, self.exact)
        y, *buffers = self._bound(what, 2)(inputs, (position, row, rows))
        if finish is not None:
            finish(*buffers)
        self.calls += 1
        return y

    def _attend_packed(
        self, x: mx.array, mask: Any, cache: PackedKVCache, factors: mx.array | None, parts: int
    ) -> mx.array | None:
        tokens, form = x.shape[1], self.form
        if form is None or not ((mask is None and tokens == 1) or (type(mask) is str and mask == "causal")):
            return None
        code = cache.resting() if tokens == 1 else None
        resting = code is not None
        if code is None:
            code = cache.native(tokens, form.n_kv_heads, form.head_dim, form.value_dim)
            if code is None:
                return None
        kept = (cache.sink, cache.settings.window, cache.limit, resting)
        what = (parts, True, True, False, factors is not None, self.exact, code.address, *kept)
        position, row = cache.offset, cache.offset - cache.dropped
        # Nobody else may hold what is written to.
        inputs, cache.arrays = [x, *cache.arrays], cache.arrays[:-2] if resting else []
        held = len(inputs) - 1
        if factors is not None:
            inputs.append(factors)
        y, *arrays = self._bound(what, held)(inputs, (position, row, row + tokens, cache.packed))
        cache.advance(arrays, tokens)
        self.calls += 1
        return y

    def feed(self, x: mx.array) -> mx.array | None:
        """The half with the feed-forward network. None if the kernel cannot do this."""
        if x.dtype != mx.float32 or 0 in x.shape:
            return None
        if self.experts is not None:
            return self._feed_streamed(x, self.experts)
        (y,) = self._bound((FEED_FORWARD, False, False, False, False, self.exact), 0)([x], ())
        self.calls += 1
        return y

    def _feed_streamed(self, x: mx.array, experts: StreamedExperts) -> mx.array:
        """The same in three steps: who is chosen is known before the experts run."""
        rows, indices, weights = self._choose(x)
        combine = library.LayerParams(self.address, COMBINE, exact=self.exact)
        said = [x, experts(rows, indices, x), weights]
        (y,) = lazy.call("tq_layer_forward", combine, said, [(x.shape, mx.float32)], keep=self.pinned)
        self.calls += 1
        return y

    def choose(self, x: mx.array) -> mx.array:
        """The experts (tokens, k) that a layer whose experts are streamed would choose for x (..., hidden)."""
        return self._choose(x)[1]

    def _choose(self, x: mx.array) -> list[mx.array]:
        tokens = x.size // self.hidden
        made = [((tokens, self.hidden), mx.float32), ((tokens, self.chosen), mx.uint32)]
        made.append(((tokens, self.chosen), mx.float32))
        params = library.LayerParams(self.address, CHOOSE, exact=self.exact)
        return lazy.call("tq_layer_forward", params, [x], made, keep=self.pinned)

    def _bound(self, what: tuple, held: int) -> lazy.Bound:
        """A call of the kernel, made once for the parameters that come first in tq_layer_params.

        Args:
            what: Those after its address; the third says that there is a cache, the last of a packed one that it rests.
            held: Arrays of the cache, which follow x and which the outputs behind y continue: all, or the last two.
        """
        found = self.bound.get(what)
        if found is None:
            params = library.LayerParams(self.address, *what)
            first = held - 1 if len(what) == RESTING + 1 and what[RESTING] else 1
            aliases = [NO_ALIAS, *range(first, 1 + held if what[2] else 1)]
            found = lazy.bind("tq_layer_forward", params, "position", aliases, self.pinned)
            self.bound[what] = found
        return found

    def _reads(self, mask: Any, tokens: int, rows: int) -> bool:
        """Whether a mask is an array that broadcasts to (heads, tokens, rows), with all rows there."""
        if not isinstance(mask, mx.array) or mask.dtype not in (mx.bool_, mx.float32) or mask.ndim > 4:
            return False
        *lead, queries, keys = (1, 1, 1, *mask.shape)[-4:]
        return lead[0] == 1 and lead[1] in (1, self.n_heads) and queries in (1, tokens) and keys == rows


class NativeModule(nn.Module):
    """What all native modules share: the kernel, and the class that the module had.

    Arguments that a forward has beyond those here go to it with the others.
    """

    kernel: Kernel
    original: ClassVar[Any]  # that class
    arguments: ClassVar[tuple[str, ...]]  # that its forward begins with


class NativeLayer(NativeModule):
    """Of a decoder layer."""

    arguments = ("x", "mask", "cache")

    def __call__(self, x: mx.array, mask: Any = None, cache: Any = None, *more: Any, **named: Any) -> mx.array:
        y = None if more or named or self.training else run(self, self.kernel, x, mask, cache)
        return self.original.__call__(self, x, mask, cache, *more, **named) if y is None else y


class ScaledNativeLayer(NativeModule):
    """Of a decoder layer whose queries are multiplied by a number for each token."""

    arguments = ("x", "attn_scale", "mask", "cache")

    def __call__(
        self, x: mx.array, attn_scale: Any = None, mask: Any = None, cache: Any = None, *more: Any, **named: Any
    ) -> mx.array:
        own = attn_scale is None or more or named or self.training
        y = None if own else run(self, self.kernel, x, mask, cache, attn_scale)
        return self.original.__call__(self, x, attn_scale, mask, cache, *more, **named) if y is None else y


class NativeAttention(NativeModule):
    """Of attention."""

    arguments = ("x", "mask", "cache")

    def __call__(self, x: mx.array, mask: Any = None, cache: Any = None, *more: Any, **named: Any) -> mx.array:
        y = None if more or named or self.training else run(self, self.kernel, x, mask, cache)
        return self.original.__call__(self, x, mask, cache, *more, **named) if y is None else y


class NativeFeedForward(NativeModule):
    """Of a gated feed-forward network, or of a mixture of such."""

    arguments = ("x",)

    def __call__(self, x: mx.array) -> mx.array:
        y = None if self.training else self.kernel.feed(x)
        return self.original.__call__(self, x) if y is None else y


def run(
    module: Any, kernel: Kernel, x: mx.array, mask: Any, cache: Any, factors: mx.array | None = None
) -> mx.array | None:
    """What a layer or attention computes, or None if its own forward must."""
    parts = kernel.parts
    h = kernel.append(x, cache) if mask is None and factors is None else None
    if h is None:
        # A prompt in two steps: nobody asks for the second one of the last layer if only the cache is wanted.
        parts = parts if x.shape[1] == 1 else ATTENTION
        h = kernel.attend(x, mask, cache, factors, parts)
    if h is None or parts & FEED_FORWARD:
        return h
    if kernel.parts & FEED_FORWARD or kernel.experts is not None:
        return kernel.feed(h)
    if kernel.network is None:
        return h
    r = module[kernel.network](h if kernel.before is None else module[kernel.before](h))
    r = r if kernel.after is None else module[kernel.after](r)
    return h + (r if kernel.residual == 1 else r * kernel.residual)


def adopt(module: nn.Module, kind: type[NativeModule], kernel: Kernel) -> None:
    """Make a module native."""
    vars(module)["kernel"] = kernel
    module.__class__ = _native_class(kind, type(module))


def release(module: nn.Module) -> None:
    """Give a native module its own forward back."""
    module.__class__ = module.original
    del vars(module)["kernel"]


@cache
def _native_class(kind: Any, original: Any) -> type:
    return type(f"{kind.__name__}{original.__name__}", (kind, original), {"original": original})


def layer_kernel(layer: Layer) -> Kernel:
    """The kernel of a decoder layer."""
    made = _Builder()
    made.attention(layer.attention)
    made.norm("before_attention", layer.before_attention)
    made.norm("after_attention", layer.after_attention)
    made.struct.residual = layer.residual
    if layer.feed_forward is None:
        kernel = made.kernel(ATTENTION, layer.attention)
        kernel.network, kernel.residual = layer.names["feed_forward"], layer.residual
        kernel.before = layer.names.get("before_feed_forward")
        kernel.after = layer.names.get("after_feed_forward")
        return kernel
    made.network(layer.feed_forward)
    made.norm("before_feed_forward", layer.before_feed_forward)
    made.norm("after_feed_forward", layer.after_feed_forward)
    return made.kernel(ATTENTION if made.streamed else ATTENTION | FEED_FORWARD, layer.attention)


def attention_kernel(attention: Attention) -> Kernel:
    """The kernel of an attention module."""
    made = _Builder()
    made.attention(attention)
    made.struct.bare, made.struct.residual = True, 1.0
    return made.kernel(ATTENTION, attention)


def network_kernel(network: FeedForward | Mixture) -> Kernel:
    """The kernel of a feed-forward module."""
    made = _Builder()
    made.network(network)
    made.struct.bare, made.struct.residual = True, 1.0
    return made.kernel(FEED_FORWARD)


class _Builder:
    """Fills a tq_layer, and collects what it points to."""

    def __init__(self) -> None:
        self.struct = library.Layer()
        self.pinned: list[lazy.Pinned] = []
        self.exact = False
        self.streamed: StreamedExperts | None = None

    def attention(self, attention: Attention) -> None:
        struct = self.struct
        for name, linear in zip(("query", "key", "value"), attention.projections, strict=False):
            self.projection(name, linear)
        self.projection("out", attention.out)
        struct.hidden = attention.out.dense_shape[0]
        if attention.head_norms is not None:
            query_norm, key_norm = attention.head_norms
            self.norm("query_norm", query_norm)
            self.norm("key_norm", key_norm)
            struct.norm_whole = query_norm.weight.size != attention.head_dim
        struct.norm_after_rope = attention.norm_after_rope
        if attention.rope is not None:
            rope = attention.rope
            struct.rope = library.Rope(
                self.array(rope.frequencies), rope.dims, rope.interleaved, rope.position_scale, rope.multiplier
            )
        for name in ("gated", "n_heads", "n_kv_heads", "head_dim", "value_dim", "scale", "softcap"):
            setattr(struct, name, getattr(attention, name))
        if attention.sinks is not None:
            struct.sinks = self.array(attention.sinks)

    def network(self, network: FeedForward | Mixture) -> None:
        if isinstance(network, FeedForward):
            self.feed_forward(network)
            return
        router = network.router
        packed = self.projected(router) if isinstance(router, QuantLinear) else library.Projection()
        weight, bias, correction, shared_gate = (
            self.array(a) if isinstance(a, np.ndarray) else None
            for a in (router, network.bias, network.correction, network.shared_gate)
        )
        count = network.experts.num_experts
        how = (network.k, network.groups, network.kept_groups, network.sigmoid, network.normalize, network.factor)
        self.struct.router = library.Router(weight, packed, bias, correction, count, *how)
        self.struct.shared_gate = shared_gate
        if isinstance(network.experts, StreamedExperts):
            self.streamed, self.exact = network.experts, self.exact | settings.cpu_exact()
        else:
            experts = network.experts.fused
            self.struct.experts = experts.params
            self.pinned.append(experts.pinned)
            self.exact |= bool(experts.params.exact)
        self.struct.hidden = network.hidden
        if network.shared is not None:
            self.feed_forward(network.shared)

    def feed_forward(self, feed_forward: FeedForward) -> None:
        for name, linear in zip(("gate", "up"), feed_forward.projections, strict=False):
            self.projection(name, linear)
        self.projection("down", feed_forward.down)
        self.struct.hidden = feed_forward.down.dense_shape[0]
        self.struct.activation = feed_forward.activation

    def projection(self, name: str, linear: QuantLinear) -> None:
        setattr(self.struct, name, self.projected(linear))

    def projected(self, linear: QuantLinear) -> library.Projection:
        prepared = linear.prepared
        assert prepared is not None
        self.pinned.append(prepared.pinned)
        self.exact |= prepared.exact
        rotation = library.Rotation()
        if linear.rotation is not None and linear.rotation.prepared is not None:
            rotation = linear.rotation.prepared.rotation
            self.pinned.append(linear.rotation.prepared.pinned)
        return library.Projection(prepared.matrix, rotation)

    def norm(self, name: str, norm: Norm | None) -> None:
        if norm is not None:
            setattr(self.struct, name, library.Norm(self.array(norm.weight), norm.eps))

    def array(self, values: np.ndarray) -> int:
        pinned = lazy.Pinned(mx.array(np.ascontiguousarray(values, np.float32)))
        self.pinned.append(pinned)
        return pinned.addresses[0]

    def kernel(self, parts: int, attention: Attention | None = None) -> Kernel:
        # Calls that wait to be run read the structure: it lives with what it points to.
        memory = lazy.Memory(ctypes.sizeof(self.struct))
        ctypes.memmove(memory.address, ctypes.byref(self.struct), ctypes.sizeof(self.struct))
        pinned = lazy.Pinned(memory, also=self.pinned)
        form = None
        if attention is not None:
            dtype = mx.float32 if self.exact else mx.float16
            form = Form(attention.n_kv_heads, attention.head_dim, attention.value_dim, dtype)
        kernel = Kernel(parts, memory.address, pinned, form, self.struct.hidden, self.struct.n_heads, self.exact)
        kernel.experts, kernel.chosen = self.streamed, self.struct.router.k
        return kernel
