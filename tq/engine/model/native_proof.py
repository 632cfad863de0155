"""Which modules of a model run natively: those that compute on random tokens what their own forward computes.

The first module of each sort is compared thoroughly: a prompt, its continuation, single tokens, a mask, far positions,
large logits, and what the cache holds afterwards. Others of that sort, which have the same code and the same settings
but other weights and another number, are compared for one token. A module that differs keeps its forward, with the
reason.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from tq.engine.model import native_layers as native
from tq.engine.model import native_probe
from tq.engine.model import native_structure as structure
from tq.engine.model.layers import QuantLinear
from tq.engine.model.native_experts import FusedExperts
from tq.engine.model.native_layers import Kernel, NativeModule
from tq.engine.model.native_parts import FeedForward, Unfamiliar, is_feed_forward
from tq.engine.model.native_routing import Mixture, is_mixture
from tq.engine.model.native_structure import Attention, Layer
from tq.engine.model.streamed import StreamedExperts

DISAGREEMENT = 1e-4  # of what a module adds to its input, relative to the root mean square
SHARP = 12.0  # root mean square of the logits at which a soft cap shows
TRIES = 3  # where a choice may turn on the last bit, which is no disagreement: of experts, or of codes of 8 bits
NUMBER = re.compile(r"idx|index|layer_id|layer_number")
Claim = Layer | Attention | FeedForward | Mixture


@dataclass(frozen=True)
class Adoption:
    """What became of a module.

    Attributes:
        kind: ``layer``, ``attention`` or ``feed-forward network``.
        reason: Why it keeps its own forward, or None if it runs natively.
    """

    path: str
    kind: str
    reason: str | None


def install(model: nn.Module) -> list[Adoption]:
    """Make modules of ``model`` native where that computes the same: layers, or else halves of them.

    Does nothing to a model where it has done so already.
    """
    if "adoptions" in vars(model):
        return vars(model)["adoptions"]
    proven: dict[tuple, int] = {}
    adoptions: list[Adoption] = []
    covered: tuple[str, ...] = ()
    for path, module in sorted(model.named_modules(), key=lambda item: item[0].count(".")):
        if f"{path}.".startswith(covered):
            continue
        kind = next((kind for kind in KINDS if kind.looks_like(module)), None)
        if kind is None:
            continue
        try:
            covered += tuple(f"{path}.{part}" for part in _adopt(module, kind, proven))
        except Unfamiliar as reason:
            adoptions.append(Adoption(path, kind.name, str(reason)))
        else:
            adoptions.append(Adoption(path, kind.name, None))
    vars(model)["adoptions"] = adoptions
    return adoptions


def notes(model: nn.Module) -> list[str]:
    """Why layers of ``model`` do not run as one kernel each, where ``install`` has left some as they were."""
    adoptions: list[Adoption] = vars(model).get("adoptions", [])
    layers = [adoption for adoption in adoptions if adoption.kind == KINDS[0].name]
    reasons = Counter(adoption.reason for adoption in layers if adoption.reason is not None)
    return [f"{n} of {len(layers)} layers run by mlx-lm's forward: a layer {reason}" for reason, n in reasons.items()]


def uninstall(model: nn.Module) -> None:
    """Give all modules their own forward back."""
    vars(model).pop("adoptions", None)
    for module in native_modules(model):
        native.release(module)


def native_modules(model: nn.Module) -> list[NativeModule]:
    return [module for module in model.modules() if isinstance(module, NativeModule)]


@dataclass(frozen=True)
class _Kind:
    name: str
    looks_like: Callable[[nn.Module], bool]
    read: Callable[[nn.Module], Any]
    kernel: Callable[[Any], Kernel]
    classes: tuple[type[NativeModule], ...]


KINDS = (
    _Kind(
        "layer",
        structure.is_layer,
        structure.read_layer,
        native.layer_kernel,
        (native.NativeLayer, native.ScaledNativeLayer),
    ),
    _Kind(
        "attention",
        structure.is_attention,
        structure.read_attention,
        native.attention_kernel,
        (native.NativeAttention,),
    ),
    _Kind(
        "feed-forward network",
        lambda module: is_feed_forward(module) or is_mixture(module),
        structure.read_network,
        native.network_kernel,
        (native.NativeFeedForward,),
    ),
)


def _adopt(module: nn.Module, kind: _Kind, proven: dict[tuple, int]) -> list[str]:
    """Make a module native. Returns the names of the parts that it stands for. Raises Unfamiliar.

    Args:
        proven: Which variant was found right for the sorts of modules so far.
    """
    arguments = structure.call_arguments(module)
    found = next((c for c in kind.classes if tuple(arguments[: len(c.arguments)]) == c.arguments), None)
    if found is None or (found is native.NativeFeedForward and len(arguments) > 1):
        raise Unfamiliar(f"is called with {', '.join(arguments)}")
    claim = kind.read(module)
    sort = (*map(type, module.modules()), _outline(claim), _settings(module))
    variants = list(_variants(claim))
    if sort in proven:
        variant = variants[proven[sort]]
        kernel = kind.kernel(variant)
        if any(native_probe.glimpse(module, found, kernel, attempt) < DISAGREEMENT for attempt in range(TRIES)):
            return _adopted(module, found, kernel, variant)
    for number, variant in enumerate(variants):
        kernel = kind.kernel(variant)
        error = _least_disagreement(module, found, kernel, variant)
        if error < DISAGREEMENT:
            error = max(error, _sharp_disagreement(module, found, kind, variant))
        if error < DISAGREEMENT:
            proven[sort] = number
            return _adopted(module, found, kernel, variant)
    raise Unfamiliar(f"computes something else ({error:.1e} of its output apart)")


def _adopted(module: nn.Module, found: type[NativeModule], kernel: Kernel, claim: Claim) -> list[str]:
    native.adopt(module, found, kernel)
    if isinstance(claim, Layer) and claim.feed_forward is None:
        return [f"{claim.names['attention']}."]
    return [""]


def _variants(claim: Claim) -> Iterator[Claim]:
    """A claim, and others that the same parts allow."""
    if not isinstance(claim, Layer):
        yield from _attention_variants(claim) if isinstance(claim, Attention) else (claim,)
        return
    networks = (claim.feed_forward,) if claim.feed_forward is None else (claim.feed_forward, None)
    for network in networks:
        for attention in _attention_variants(claim.attention):
            yield replace(claim, attention=attention, feed_forward=network)


def _attention_variants(attention: Attention) -> Iterator[Attention]:
    yield attention
    if attention.rope is not None:
        yield replace(attention, rope=None)
        if attention.head_norms is not None:
            yield replace(attention, norm_after_rope=True)


def _outline(value: Any) -> Any:
    """What two modules of one kind have in common: everything but weights."""
    if isinstance(value, QuantLinear):
        return (value.dense_shape, "bias" in value)
    if isinstance(value, StreamedExperts):
        return (value.num_experts, value.output_dims)
    if isinstance(value, FusedExperts):
        return tuple(part.dense_shape for part in (value.gate_proj, value.up_proj, value.down_proj))
    if isinstance(value, np.ndarray):
        return value.shape
    if is_dataclass(value):
        return tuple((field.name, _outline(getattr(value, field.name))) for field in fields(value))
    if isinstance(value, dict):
        return tuple(value.items())
    return tuple(map(_outline, value)) if isinstance(value, tuple) else value


def _settings(module: nn.Module) -> tuple:
    """The plain attributes of a module and its parts, but for its number in the model."""
    return tuple(
        (name, value)
        for part in module.modules()
        for name, value in sorted(vars(part).items())
        if isinstance(value, (bool, int, float, str)) and not name.startswith("_") and not NUMBER.search(name)
    )


def _sharp_disagreement(module: Any, found: type[NativeModule], kind: _Kind, claim: Claim) -> float:
    """The same with larger logits, if the module has a scale that can be changed for that."""
    attention, owner, size = claim, module, 1.0
    if isinstance(claim, Layer):
        attention, owner = claim.attention, structure.attention_of(module)
        size = 1.0 if claim.before_attention is not None else native_probe.SMALL
    if not isinstance(attention, Attention) or not isinstance(vars(owner).get("scale"), float):
        return 0.0
    factor = max(1.0, SHARP / _logit_size(attention, size))
    sharp = replace(attention, scale=attention.scale * factor)
    kernel = kind.kernel(replace(claim, attention=sharp) if isinstance(claim, Layer) else sharp)
    before = owner.scale
    owner.scale = before * factor
    try:
        return _least_disagreement(module, found, kernel, claim)
    finally:
        owner.scale = before


def _logit_size(attention: Attention, size: float) -> float:
    """About the root mean square of the logits for inputs of a size."""
    n, dim = attention.n_heads * attention.head_dim, attention.head_dim
    x = size * mx.random.normal((1, 8, attention.out.dense_shape[0]), key=mx.random.key(0))
    made = [projection(x) for projection in attention.projections]
    queries, keys = made[0], made[0][..., n : n + attention.n_kv_heads * dim] if len(made) == 1 else made[1]
    sizes = [float(np.sqrt(np.square(np.array(a)).mean())) for a in (queries[..., :n], keys)]
    if attention.head_norms is not None:
        sizes = [float(np.sqrt((norm.weight**2).mean())) for norm in attention.head_norms]
    return max(abs(attention.scale) * sizes[0] * sizes[1] * dim**0.5, 1e-6)


def _least_disagreement(module: nn.Module, found: type[NativeModule], kernel: Kernel, claim: Claim) -> float:
    network = claim.feed_forward if isinstance(claim, Layer) else claim
    least = float("inf")
    for attempt in range(TRIES if isinstance(network, Mixture) else 1):
        least = min(least, native_probe.disagreement(module, found, kernel, attempt))
        if least < DISAGREEMENT:
            break
    return least
