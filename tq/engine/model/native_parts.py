"""Parts of decoder layers that kernels know: norms, rotary embeddings, gated networks, read from modules of mlx-lm.

What is read is compared with what the module computes, as far as that is known from the module alone.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from tq.engine.model.layers import QuantLinear, QuantModule

GATED = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"), ("c_fc_0", "c_fc_1", "c_proj"))
FUSED_GATED = (("gate_up_proj", "down_proj"), ("proj_1", "proj_2"))
ACTIVATIONS: dict[int, Callable[[mx.array], mx.array]] = {  # tq_activation
    0: nn.silu,
    1: nn.gelu_approx,
    2: nn.gelu,
    3: nn.relu,
    4: nn.relu2,
}
LINEAR = (nn.Linear, QuantLinear)
POSITIONS = (0, 1, 37, 4099, 70001)  # where a rotary embedding is compared: some change beyond a length
TOLERANCE = 1e-5  # between two ways to compute the same in float32, relative to the root mean square


class Unfamiliar(Exception):
    """Why a module is not read as a native one, in words that follow its name."""


@dataclass(frozen=True)
class Norm:
    """y = weight * x / sqrt(mean(x^2) + eps)."""

    weight: np.ndarray
    eps: float


@dataclass(frozen=True)
class Rope:
    """A rotary embedding: see tq_rope in tq/cpu/kernels/tq_layer.h."""

    frequencies: np.ndarray
    dims: int
    interleaved: bool
    position_scale: float
    multiplier: float


@dataclass(frozen=True)
class FeedForward:
    """Projections are (gate, up), or one that holds the rows of both."""

    projections: tuple[QuantLinear, ...]
    down: QuantLinear
    activation: int

    @property
    def hidden(self) -> int:
        return self.down.dense_shape[0]


def is_feed_forward(module: nn.Module) -> bool:
    """Whether a module has the matrices of a gated network: not those of experts."""
    return any(all(isinstance(module.get(name), LINEAR) for name in names) for names in (*GATED, *FUSED_GATED))


def read_feed_forward(module: nn.Module) -> FeedForward:
    """Raises Unfamiliar."""
    names = next((names for names in (*GATED, *FUSED_GATED) if all(name in module for name in names)), None)
    if names is None:
        raise Unfamiliar("is no gated feed-forward network")
    refuse_others(module, set(names))
    *projections, down = (prepared_linear(module[name], name) for name in names)
    hidden, inner = down.dense_shape
    wanted = [(inner, hidden)] * 2 if len(projections) == 2 else [(2 * inner, hidden)]
    if [projection.dense_shape for projection in projections] != wanted:
        raise Unfamiliar("has matrices that do not fit together")
    return FeedForward(tuple(projections), down, _activation(module, projections, down))


def read_norm(module: nn.Module, name: str) -> Norm:
    """Raises Unfamiliar if the module computes anything but an RMSNorm."""
    weight, eps = module.get("weight"), getattr(module, "eps", None)
    if isinstance(weight, mx.array) and weight.ndim == 1 and isinstance(eps, float):
        weight = weight.astype(mx.float32)
        x = mx.random.normal((2, weight.size), key=mx.random.key(0))
        plain = x * mx.rsqrt(mx.square(x).mean(-1, keepdims=True) + eps)
        candidates = (weight, weight + 1)
        errors = distances([plain * candidate for candidate in candidates], module(x))
        for candidate, error in zip(candidates, errors, strict=True):
            if error < TOLERANCE:
                return Norm(np.array(candidate), eps)
    raise Unfamiliar(f"has a {name} that is no RMSNorm")


def read_rope(module: nn.Module, head_dim: int) -> Rope | None:
    """None for a module that leaves its input as it is. Raises Unfamiliar."""
    x = mx.random.normal((1, 1, 2, head_dim), key=mx.random.key(1))
    if mx.array_equal(module(x, offset=3), x).item():
        return None
    dims = getattr(module, "dims", getattr(module, "dim", 0))
    frequencies = getattr(module, "_freqs", None)
    if type(module) is nn.RoPE:  # as MLX computes them
        half = dims // 2
        inverse = mx.exp(mx.arange(0, -half, -1, dtype=mx.float32) * (np.log(module.base) / half))
    elif isinstance(frequencies, mx.array) and frequencies.shape == (dims // 2,):
        inverse = mx.reciprocal(frequencies.astype(mx.float32))
    else:
        raise Unfamiliar("has a rotary embedding without fixed frequencies")
    if not 0 < dims <= head_dim or dims % 2:
        raise Unfamiliar("has a rotary embedding that does not fit its heads")
    multiplier = getattr(module, "mscale", getattr(module, "_scale", 1.0))
    position_scale = module.scale if type(module) is nn.RoPE else 1.0
    found = Rope(np.array(inverse), dims, bool(getattr(module, "traditional", False)), position_scale, multiplier)
    turned = mx.concatenate([_turned(found, x, position) for position in POSITIONS])
    theirs = mx.concatenate([module(x, offset=position) for position in POSITIONS])
    if max(distance(a, b) for a, b in zip(theirs, turned, strict=True)) > TOLERANCE:
        raise Unfamiliar("has a rotary embedding of an unknown kind")
    return found


def distance(a: mx.array, b: mx.array) -> float:
    """Root mean square of a - b relative to that of b; infinite if that is not a number."""
    return distances([a], b)[0]


def distances(candidates: Sequence[mx.array], b: mx.array) -> list[float]:
    """That of each, computed at once."""
    b = b.astype(mx.float32)
    size = mx.maximum(mx.square(b).sum(), 1e-30)
    errors = mx.stack([mx.sqrt(mx.square(a.astype(mx.float32) - b).sum() / size) for a in candidates])
    return [error if error == error else float("inf") for error in map(float, np.array(errors))]


def first_module(module: nn.Module, names: tuple[str, ...]) -> str | None:
    return next((name for name in names if isinstance(module.get(name), nn.Module)), None)


def refuse_others(module: nn.Module, known: set[str | None]) -> None:
    """Raises Unfamiliar if the module has weights that no known part accounts for, or looks back in its own way."""
    for name, value in module.items():
        weighs = isinstance(value, mx.array)
        if isinstance(value, nn.Module):
            weighs = bool(value.parameters()) or any(isinstance(part, QuantModule) for part in value.modules())
        if weighs and name not in known and not name.startswith("_"):
            raise Unfamiliar(f"has a part {name}")
    for name, value in vars(module).items():
        if type(value) is int and ("window" in name or "chunk" in name):
            raise Unfamiliar(f"has a {name} of its own")


def prepared_linear(linear: object, name: str) -> QuantLinear:
    """Raises Unfamiliar if it is not a matrix in the memory order of the kernels."""
    if not isinstance(linear, QuantLinear):
        raise Unfamiliar(f"has a {name} that is not quantized")
    if linear.prepared is None or linear.added_bias is not None:
        raise Unfamiliar(f"has a {name} that another backend runs")
    return linear


def _activation(module: nn.Module, projections: list[QuantLinear], down: QuantLinear) -> int:
    """The activation that the module applies, found by trying them all."""
    hidden, inner = down.dense_shape
    x = mx.random.normal((1, 4, hidden), key=mx.random.key(2))

    def inputs(x: mx.array) -> list[mx.array]:
        made = [projection(x) for projection in projections]
        return list(mx.split(made[0], 2, axis=-1)) if len(made) == 1 else made

    # Large enough for the curved parts of the functions, in which alike ones differ.
    x = x * (2 / mx.maximum(mx.sqrt(mx.square(inputs(x)[0]).mean()), 1e-6))
    gate, up = inputs(x)
    y = module(x)
    made = down(mx.concatenate([function(gate) * up for function in ACTIVATIONS.values()]))
    errors = dict(zip(ACTIVATIONS, distances(list(made), y[0]), strict=True))
    best = min(errors, key=errors.__getitem__)
    if errors[best] > TOLERANCE:
        raise Unfamiliar("has an unknown activation")
    return best


def _turned(rope: Rope, x: mx.array, position: int) -> mx.array:
    """x (1, 1, tokens, head_dim) after the rotary embedding, in NumPy, rounding the angles as MLX does."""
    value = np.array(x)
    turned, rest = value[..., : rope.dims] * np.float32(rope.multiplier), value[..., rope.dims :]
    at = np.arange(position, position + value.shape[2], dtype=np.float32) * np.float32(rope.position_scale)
    angles = at[:, None] * rope.frequencies
    cosines, sines = np.cos(angles), np.sin(angles)
    halves = (turned[..., ::2], turned[..., 1::2]) if rope.interleaved else np.split(turned, 2, axis=-1)
    first, second = halves[0] * cosines - halves[1] * sines, halves[0] * sines + halves[1] * cosines
    both = (
        np.stack([first, second], -1).reshape(turned.shape) if rope.interleaved else np.concatenate([first, second], -1)
    )
    return mx.array(np.concatenate([both, rest], -1))
