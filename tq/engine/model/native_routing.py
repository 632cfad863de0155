"""What a mixture of experts is made of, read from the names and types of its parts and from what it computes.

As in native_structure, this is a claim. Which scores the experts are chosen by is found by trying the known ways.
"""

from dataclasses import dataclass, replace
from itertools import product

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from tq.engine.model.layers import QuantLinear
from tq.engine.model.native_experts import FusedExperts
from tq.engine.model.native_parts import (
    TOLERANCE,
    FeedForward,
    Unfamiliar,
    distance,
    first_module,
    prepared_linear,
    read_feed_forward,
    refuse_others,
)
from tq.engine.model.streamed import StreamedExperts

EXPERTS = ("switch_mlp", "experts")
ROUTERS = ("gate", "router")
SHARED = ("shared_expert", "shared_experts")
SHARED_GATE = "shared_expert_gate"
CORRECTIONS = ("e_score_correction_bias", "expert_bias")
COUNTS = ("top_k", "num_experts_per_tok", "moe_k")
GROUPS, KEPT_GROUPS = "n_group", "topk_group"
MAX_CHOSEN = 64
PROBED_TOKENS = 128  # by which ways to choose are told apart: some differ for few tokens


@dataclass(frozen=True, eq=False)
class Mixture:
    """A mixture of experts: see tq_router in tq/cpu/kernels/tq_layer.h.

    Attributes:
        router: The matrix of the router, or its weight (experts, hidden) in float32.
        shared: The network that takes part for every token, times the sigmoid of ``shared_gate`` . x if that is there.
    """

    router: QuantLinear | np.ndarray
    bias: np.ndarray | None
    correction: np.ndarray | None
    k: int
    experts: FusedExperts | StreamedExperts
    shared: FeedForward | None
    shared_gate: np.ndarray | None
    groups: int
    kept_groups: int
    sigmoid: bool = False
    normalize: bool = False
    factor: float = 1.0

    @property
    def hidden(self) -> int:
        return self.experts.output_dims


def is_mixture(module: nn.Module) -> bool:
    experts = module.get(first_module(module, EXPERTS) or "")
    return isinstance(experts.network if isinstance(experts, StreamedExperts) else experts, FusedExperts)


def read_mixture(module: nn.Module) -> Mixture:
    """Raises Unfamiliar."""
    router_name, experts_name = first_module(module, ROUTERS), first_module(module, EXPERTS)
    if router_name is None or not is_mixture(module):
        raise Unfamiliar("is no mixture of experts with a router")
    shared_name = first_module(module, SHARED)
    refuse_others(module, {router_name, experts_name, shared_name, SHARED_GATE, *CORRECTIONS})
    holders = [module, *_modules(module[router_name])]  # a router may be a matrix in a module of its own
    router, bias = _router(holders[1:])
    corrections = [holder[name] for holder in holders for name in CORRECTIONS if isinstance(holder.get(name), mx.array)]
    experts = module[experts_name]
    count = experts.num_experts
    k, groups, kept_groups = (_number(holders, names) for names in (COUNTS, (GROUPS,), (KEPT_GROUPS,)))
    if not 0 < k <= min(count, MAX_CHOSEN) or count % groups or not kept_groups <= groups <= count // 2:
        raise Unfamiliar("does not say how many experts it chooses")
    shared_gate = module.get(SHARED_GATE)
    if shared_gate is not None and (type(shared_gate) is not nn.Linear or "bias" in shared_gate):
        raise Unfamiliar(f"has a {SHARED_GATE} of an unknown kind")
    claim = Mixture(
        router=router,
        bias=bias,
        correction=_float(corrections[0].reshape(-1)) if corrections else None,
        k=k,
        experts=experts,
        shared=read_feed_forward(module[shared_name]) if shared_name else None,
        shared_gate=None if shared_gate is None else _float(shared_gate.weight.reshape(-1)),
        groups=groups,
        kept_groups=kept_groups,
    )
    if not _fits_together(claim, count):
        raise Unfamiliar("has parts that do not fit together")
    return _scored(module, claim, holders)


def _fits_together(claim: Mixture, count: int) -> bool:
    """Whether the parts have the sizes that the kernel takes for granted: some routers know experts that are none."""
    router = claim.router.dense_shape if isinstance(claim.router, QuantLinear) else claim.router.shape
    per_expert = all(a is None or a.shape == (count,) for a in (claim.bias, claim.correction))
    gate = claim.shared_gate is None or (claim.shared is not None and claim.shared_gate.shape == (claim.hidden,))
    shared = claim.shared is None or claim.shared.hidden == claim.hidden
    return router == (count, claim.hidden) and per_expert and gate and shared


def _modules(module: nn.Module) -> list[nn.Module]:
    return [module, *(part for part in module.children().values() if isinstance(part, nn.Module))]


def _number(holders: list[nn.Module], names: tuple[str, ...]) -> int:
    """The first of the attributes that is set, or 1."""
    return next((value for holder in holders for name in names if (value := vars(holder).get(name))), 1)


def _router(parts: list[nn.Module]) -> tuple[QuantLinear | np.ndarray, np.ndarray | None]:
    for part in parts:
        if isinstance(part, QuantLinear):
            return prepared_linear(part, "router"), None
        weight, bias = part.get("weight"), part.get("bias")
        if isinstance(weight, mx.array) and weight.ndim == 2:
            return _float(weight), None if bias is None else _float(bias)
    raise Unfamiliar("has a router without a matrix")


class _Stub(nn.Module):
    """In the place of experts: a vector for each, whatever the token. Of a shared network: nothing."""

    def __init__(self, vectors: mx.array | None = None):
        super().__init__()
        self.vectors = vectors

    def __call__(self, x: mx.array, indices: mx.array | None = None) -> mx.array:
        return mx.zeros_like(x) if indices is None or self.vectors is None else self.vectors[indices]


def _scored(module: nn.Module, claim: Mixture, holders: list[nn.Module]) -> Mixture:
    """The claim with the scores by which the module chooses, found by trying them all. Raises Unfamiliar."""
    x = mx.random.normal((1, PROBED_TOKENS, claim.hidden), key=mx.random.key(4))
    vectors = mx.random.normal((claim.experts.num_experts, claim.hidden), key=mx.random.key(5))
    parts = {name: module[name] for name in (first_module(module, EXPERTS), first_module(module, SHARED)) if name}
    try:
        for name, part in parts.items():
            module[name] = _Stub(vectors if part is claim.experts else None)
        y = module(x)
        mx.eval(y)
    except Exception as error:  # it is code of any architecture
        raise Unfamiliar(f"fails when it is probed: {(str(error) or repr(error)).splitlines()[0]}") from error
    finally:
        for name, part in parts.items():
            module[name] = part
    factors = {1.0, *(float(vars(h)["routed_scaling_factor"]) for h in holders if "routed_scaling_factor" in vars(h))}
    ways = (
        replace(claim, sigmoid=sigmoid, normalize=normalize, factor=factor)
        for sigmoid, normalize, factor in product((False, True), (True, False), factors)
    )
    errors = {way: distance(_computed(way, vectors, x), y) for way in ways}
    best = min(errors, key=errors.__getitem__)
    if errors[best] > TOLERANCE:
        raise Unfamiliar("chooses its experts in an unknown way")
    return best


def _computed(claim: Mixture, vectors: mx.array, x: mx.array) -> mx.array:
    """The weighted sum of the vectors of the experts that the claim chooses."""
    router = claim.router
    logits = router(x) if isinstance(router, QuantLinear) else x @ mx.array(router).T
    logits = logits if claim.bias is None else logits + mx.array(claim.bias)
    scores = mx.sigmoid(logits) if claim.sigmoid else mx.softmax(logits, axis=-1)
    order = scores if claim.correction is None else scores + mx.array(claim.correction)
    if claim.groups > 1:
        order = mx.unflatten(order, -1, (claim.groups, -1))
        best = mx.topk(order, 2, axis=-1).sum(-1)
        dropped = mx.argsort(mx.argsort(best, axis=-1), axis=-1) < claim.groups - claim.kept_groups
        order = mx.where(dropped[..., None], 0, order).flatten(-2)
    chosen = mx.argpartition(-order, kth=claim.k - 1, axis=-1)[..., : claim.k]
    weights = mx.take_along_axis(scores, chosen, axis=-1)
    if claim.normalize:
        weights = weights / weights.sum(-1, keepdims=True)
    return (vectors[chosen] * (claim.factor * weights)[..., None]).sum(-2)


def _float(array: mx.array) -> np.ndarray:
    return np.array(array.astype(mx.float32))
