"""What a decoder layer is made of, read from the names and types of its parts: a claim that native_proof tests.

Nothing here decides that a module runs natively. What is read may be wrong for an architecture that uses the names of
others for something else, so that module and claim are compared by what they compute.
"""

import inspect
from dataclasses import dataclass
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from tq.engine.model.layers import QuantLinear
from tq.engine.model.native_parts import (
    FeedForward,
    Norm,
    Rope,
    Unfamiliar,
    first_module,
    prepared_linear,
    read_feed_forward,
    read_norm,
    read_rope,
    refuse_others,
)
from tq.engine.model.native_routing import Mixture, is_mixture, read_mixture

ATTENTION = ("self_attn", "attention", "attn", "mixer")
FEED_FORWARD = ("mlp", "feed_forward", "ffn", "block_sparse_moe", "moe")
BEFORE_ATTENTION = (
    "input_layernorm", "attention_norm", "attention_layernorm", "attn_norm", "operator_norm", "pre_mixer_norm", "ln_1",
)  # fmt: skip
AFTER_ATTENTION = ("post_self_attn_layernorm", "post_mixer_norm")
BEFORE_FEED_FORWARD = (
    "pre_feedforward_layernorm", "pre_mlp_layernorm", "pre_mlp_norm", "pre_ff_layernorm", "ffn_norm",
    "feedforward_layernorm", "ln_2",
)  # fmt: skip
AFTER_FEED_FORWARD = ("post_feedforward_layernorm", "post_mlp_layernorm", "post_mlp_norm")
# Follows attention if another norm comes before the feed-forward network, or none before attention; else precedes it.
EITHER = "post_attention_layernorm"
HEAD_NORMS = (("q_norm", "k_norm"), ("query_layernorm", "key_layernorm"), ("q_layernorm", "k_layernorm"))
SEPARATE = ("q_proj", "k_proj", "v_proj")
FUSED = ("qkv_proj", "query_key_value")
OUT = ("o_proj", "out_proj", "dense")
HEAD_COUNTS = ("n_heads", "num_attention_heads", "num_heads", "n_head", "q_num_heads")
SOFT_CAPS = ("attn_logit_softcapping", "attn_logit_softcap")


@dataclass(frozen=True)
class Attention:
    """Projections are (query, key, value), or one that holds the rows of all three.

    Attributes:
        gated: Each head of the query projection is followed by as many gates of what the head gives.
        head_norms: Of queries and keys, of each head or of all together.
    """

    projections: tuple[QuantLinear, ...]
    out: QuantLinear
    gated: bool
    head_norms: tuple[Norm, Norm] | None
    norm_after_rope: bool
    rope: Rope | None
    n_heads: int
    n_kv_heads: int
    head_dim: int
    value_dim: int
    scale: float
    softcap: float
    sinks: np.ndarray | None


@dataclass(frozen=True)
class Layer:
    """A decoder layer whose attention is familiar.

    Attributes:
        feed_forward: None if it is a module of another kind.
        residual: What the branches are multiplied by before they are added.
        names: Of its parts, by role: the names of the fields here.
    """

    attention: Attention
    feed_forward: FeedForward | Mixture | None
    residual: float
    names: dict[str, str]
    before_attention: Norm | None = None
    after_attention: Norm | None = None
    before_feed_forward: Norm | None = None
    after_feed_forward: Norm | None = None


def read_layer(module: nn.Module) -> Layer:
    """Raises Unfamiliar."""
    parts = dict(module.children())
    names = _layer_names(module, parts)
    norms = {role: read_norm(parts[name], name) for role, name in names.items() if role.startswith(("before", "after"))}
    try:
        feed_forward = read_network(parts[names["feed_forward"]])
    except Unfamiliar:
        feed_forward = None
    try:
        attention = read_attention(attention_of(module))
    except Unfamiliar as reason:
        raise Unfamiliar(f"has a {names['attention']} that {reason}") from reason
    hidden = attention.out.dense_shape[0]
    sizes = {norm.weight.size for norm in norms.values()}
    if sizes - {hidden} or (feed_forward is not None and feed_forward.hidden != hidden):
        raise Unfamiliar("has parts that do not fit together")
    return Layer(attention, feed_forward, _residual(module), names, **norms)


def read_network(module: nn.Module) -> FeedForward | Mixture:
    """Raises Unfamiliar."""
    return read_mixture(module) if is_mixture(module) else read_feed_forward(module)


def attention_of(layer: nn.Module) -> nn.Module:
    """The attention of a layer, without modules around it that only hold it."""
    found = layer[first_module(layer, ATTENTION)]
    while not is_attention(found):
        inner = [part for part in found.children().values() if isinstance(part, nn.Module)]
        if len(inner) != 1:
            break
        found = inner[0]
    return found


def is_layer(module: nn.Module) -> bool:
    """Whether a module has attention and a feed-forward network side by side."""
    return first_module(module, ATTENTION) is not None and first_module(module, FEED_FORWARD) is not None


def is_attention(module: nn.Module) -> bool:
    separate = all(name in module for name in SEPARATE)
    return first_module(module, OUT) is not None and (separate or first_module(module, FUSED) is not None)


def read_attention(module: nn.Module) -> Attention:
    """Raises Unfamiliar."""
    if not is_attention(module):
        raise Unfamiliar("is no attention with query, key and value projections")
    fused, out_name = first_module(module, FUSED), first_module(module, OUT) or ""
    names = (fused,) if fused else SEPARATE
    projections = tuple(prepared_linear(module[name], name) for name in names)
    out = prepared_linear(module[out_name], out_name)
    head_norms = next((pair for pair in HEAD_NORMS if all(name in module for name in pair)), None)
    has_rope = isinstance(module.get("rope"), nn.Module)
    refuse_others(module, {*names, out_name, "rope", "sinks", *(head_norms or ())})
    heads = _heads(module, projections, out)
    norms = [read_norm(module[name], name) for name in head_norms or ()]
    sizes = [norm.weight.size for norm in norms]
    whole = [heads.n_heads * heads.head_dim, heads.n_kv_heads * heads.head_dim]
    if norms and sizes != [heads.head_dim] * 2 and (sizes != whole or heads.gated):
        raise Unfamiliar("has norms that do not fit its heads")
    rope = read_rope(module.rope, heads.head_dim) if has_rope else None
    softcap = next((vars(module)[name] for name in SOFT_CAPS if vars(module).get(name)), 0.0)
    scale = getattr(module, "scale", getattr(module, "softmax_scale", heads.head_dim**-0.5))
    sinks = module.get("sinks")
    if not isinstance(scale, (int, float)) or (sinks is not None and sinks.shape != (heads.n_heads,)):
        raise Unfamiliar("has a scale or sinks of an unknown kind")
    return Attention(
        projections=projections,
        out=out,
        **heads._asdict(),
        head_norms=(norms[0], norms[1]) if norms else None,
        norm_after_rope=False,
        rope=rope,
        scale=float(scale),
        softcap=float(softcap),
        sinks=None if sinks is None else np.array(sinks.astype(mx.float32)),
    )


def call_arguments(module: nn.Module) -> list[str]:
    """The names of the arguments of a module's call."""
    return list(inspect.signature(type(module).__call__).parameters)[1:]


def _layer_names(module: nn.Module, parts: dict[str, object]) -> dict[str, str]:
    """Role to name. Raises Unfamiliar if a part has no role."""
    roles = {
        "attention": ATTENTION,
        "feed_forward": FEED_FORWARD,
        "before_attention": BEFORE_ATTENTION,
        "after_attention": AFTER_ATTENTION,
        "before_feed_forward": BEFORE_FEED_FORWARD,
        "after_feed_forward": AFTER_FEED_FORWARD,
    }
    names = {role: name for role, known in roles.items() if (name := first_module(module, known))}
    if EITHER in parts:
        role = "before_feed_forward"
        if role in names or "before_attention" not in names:
            role = "after_attention"
        if role in names:
            raise Unfamiliar(f"has {names[role]} and {EITHER} in one place")
        names[role] = EITHER
    refuse_others(module, set(names.values()))
    return names


class Heads(NamedTuple):
    n_heads: int
    n_kv_heads: int
    head_dim: int
    value_dim: int
    gated: bool


def _heads(module: nn.Module, projections: tuple[QuantLinear, ...], out: QuantLinear) -> Heads:
    """From the number of heads, which a module has to tell, and the shapes."""
    hidden, width = out.dense_shape
    n_heads = next((vars(module)[name] for name in HEAD_COUNTS if isinstance(vars(module).get(name), int)), None)
    if not n_heads or width % n_heads or any(projection.dense_shape[1] != hidden for projection in projections):
        raise Unfamiliar("does not say how many heads it has")
    value_dim = width // n_heads
    rows = [projection.dense_shape[0] for projection in projections]
    if len(rows) == 1:
        n_kv_heads = (rows[0] - width) // (2 * value_dim)
        rows = [width, n_kv_heads * value_dim, rows[0] - width - n_kv_heads * value_dim]
    gated = rows[0] == 2 * width and rows[1] == rows[2]
    head_dim = value_dim if gated else rows[0] // n_heads
    n_kv_heads = rows[1] // max(head_dim, 1)
    queries = (2 if gated else 1) * n_heads * head_dim
    if rows != [queries, n_kv_heads * head_dim, n_kv_heads * value_dim] or n_kv_heads < 1 or n_heads % n_kv_heads:
        raise Unfamiliar("has projections that do not fit its heads")
    return Heads(n_heads, n_kv_heads, head_dim, value_dim, gated)


def _residual(module: nn.Module) -> float:
    fields = vars(module)
    if "scale_depth" in fields and "num_hidden_layers" in fields:  # MiniCPM
        return fields["scale_depth"] / fields["num_hidden_layers"] ** 0.5
    return float(fields.get("residual_multiplier", 1.0))
