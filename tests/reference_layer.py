"""A random decoder layer: its C structure, the kernel over it, and what it computes in float64 NumPy."""

import ctypes
import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from hadamard import Rotation
from packed_matrix import PackedMatrix

from tq.cpu import library

ATTENTION, FEED_FORWARD = 1, 2
ACTIVATIONS = {
    0: lambda x: x / (1 + np.exp(-x)),
    1: lambda x: x / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    2: lambda x: x / 2 * (1 + np.vectorize(math.erf)(x / math.sqrt(2))),
    3: lambda x: np.maximum(x, 0),
    4: lambda x: np.maximum(x, 0) ** 2,
}
DTYPES = {"float32": 0, "float16": 1, "bool": 5}
EPS = 1e-3


def normalized(x: np.ndarray, weight: np.ndarray | None) -> np.ndarray:
    return x if weight is None else x / np.sqrt((x**2).mean(-1, keepdims=True) + EPS) * weight


class Projection:
    """A packed matrix with the rotation of its input; neighbours may share one."""

    def __init__(
        self, rows: int, columns: int, rotation: Rotation | None, seed: int, bias: bool = False, experts: int = 1
    ):
        self.matrix = PackedMatrix(rows, columns, 4, group=64, bias=bias, experts=experts, seed=seed)
        # Rows of about unit length, so that activations keep their size.
        self.matrix.scales = (self.matrix.scales / math.sqrt(columns)).astype(np.float16)
        self.matrix.dense = self.matrix.values[self.matrix.codes] * self.matrix._spread(self.matrix.scales)
        self.rotation = rotation

    @property
    def struct(self) -> library.Projection:
        return library.Projection(self.matrix.matrix, self.rotation.rotation if self.rotation else library.Rotation())

    def __call__(self, x: np.ndarray, expert: int = 0) -> np.ndarray:
        x = x if self.rotation is None else x @ self.rotation.dense.T
        y = x @ self.matrix.dense[expert].T
        return y if self.matrix.bias is None else y + self.matrix.bias[0]


@dataclass
class Layer:
    """A random layer; `expected` is what it computes in float64."""

    hidden: int = 96
    n_heads: int = 6
    n_kv_heads: int = 2
    head_dim: int = 20
    value_dim: int = 20
    inner: int = 160
    residual: float = 1.0
    bare: bool = False
    norms: tuple[str, ...] = ("before_attention", "before_feed_forward")
    head_norm: str = ""  # "head" or "whole"
    norm_after_rope: bool = False
    rope_dims: int = 20
    interleaved: bool = False
    position_scale: float = 1.0
    multiplier: float = 1.0
    softcap: float = 0.0
    sinks: bool = False
    gated: bool = False
    fused: bool = False
    bias: bool = False
    rotations: str = "shared"  # "shared", "apart" or "none"
    activation: int = 0
    scale: float = 0.5
    experts: int = 0
    k: int = 3
    router: dict[str, Any] = field(default_factory=dict)  # sigmoid, normalize, factor, groups, kept_groups
    router_bias: bool = False
    correction: bool = False
    packed_router: bool = False
    shared: str = ""  # "plain" or "gated": a network for all tokens beside the experts

    def __post_init__(self) -> None:
        random = np.random.default_rng(7)
        query_rows = self.n_heads * self.head_dim * (2 if self.gated else 1)
        rows = [query_rows, self.n_kv_heads * self.head_dim, self.n_kv_heads * self.value_dim]
        self.qkv = self._projections(rows, self.hidden, 10)
        self.out = self._projections([self.hidden], self.n_heads * self.value_dim, 20)[0]
        self.gate_up = self._projections([self.inner, self.inner], self.hidden, 30)
        self.down = self._projections([self.hidden], self.inner, 40)[0]
        self.weights = {name: random.uniform(0.5, 1.5, self.hidden).astype(np.float32) for name in self.norms}
        heads = (self.n_heads, self.n_kv_heads) if self.head_norm == "whole" else (1, 1)
        for name, n in zip(("query_norm", "key_norm"), heads, strict=True):
            weight = random.uniform(0.5, 1.5, n * self.head_dim).astype(np.float32)
            self.weights[name] = weight if self.head_norm else None
        self.frequencies = (100.0 ** -(np.arange(self.rope_dims // 2) * 2 / max(self.rope_dims, 1))).astype(np.float32)
        if self.experts:
            self._mixture(random)
        self.sink_logits = random.normal(0, 2, self.n_heads).astype(np.float32) if self.sinks else None

    def _mixture(self, random: np.random.Generator) -> None:
        shape = (self.experts, self.hidden)
        self.router_weight = (random.normal(0, 1, shape) / math.sqrt(self.hidden)).astype(np.float32)
        self.router_projection = Projection(*shape, Rotation(self.hidden), 50) if self.packed_router else None
        self.bias_of_logits = random.normal(0, 1, self.experts).astype(np.float32) if self.router_bias else None
        self.corrections = random.normal(0, 0.3, self.experts).astype(np.float32) if self.correction else None
        self.shared_gate = random.normal(0, 0.2, self.hidden).astype(np.float32) if self.shared == "gated" else None
        self.expert_rotations = Rotation(self.hidden), Rotation(80)
        self.expert_matrices = [
            Projection(rows, columns, rotation, seed, experts=self.experts)
            for rows, columns, rotation, seed in (
                (80, self.hidden, self.expert_rotations[0], 60),
                (80, self.hidden, self.expert_rotations[0], 61),
                (self.hidden, 80, self.expert_rotations[1], 62),
            )
        ]

    def _projections(self, rows: list[int], columns: int, seed: int) -> list[Projection]:
        shared = Rotation(columns) if self.rotations == "shared" else None
        rows = [sum(rows)] if self.fused else rows
        rotations = [Rotation(columns) if self.rotations == "apart" else shared for _ in rows]
        if self.rotations == "apart":
            for i, rotation in enumerate(rotations):
                rotation.signs = np.roll(rotation.signs, i)
        return [
            Projection(n, columns, rotation, seed + i, self.bias)
            for i, (n, rotation) in enumerate(zip(rows, rotations, strict=True))
        ]

    # --- the kernel ---

    @property
    def struct(self) -> library.Layer:
        def address(array: np.ndarray | None) -> int | None:
            return None if array is None else array.ctypes.data

        struct = library.Layer(
            hidden=self.hidden, bare=self.bare, residual=self.residual, gated=self.gated, n_heads=self.n_heads,
            n_kv_heads=self.n_kv_heads, head_dim=self.head_dim, value_dim=self.value_dim, scale=self.scale,
            softcap=self.softcap, sinks=address(self.sink_logits), norm_whole=self.head_norm == "whole",
            norm_after_rope=self.norm_after_rope, activation=self.activation,
            out=self.out.struct, down=self.down.struct,
        )  # fmt: skip
        for name, projection in zip(("query", "key", "value"), self.qkv, strict=False):
            setattr(struct, name, projection.struct)
        for name, projection in zip(("gate", "up"), self.gate_up, strict=False):
            setattr(struct, name, projection.struct)
        if self.rope_dims:
            struct.rope = library.Rope(
                address(self.frequencies), self.rope_dims, self.interleaved, self.position_scale, self.multiplier
            )
        for name, weight in self.weights.items():
            setattr(struct, name, library.Norm(address(weight), EPS))
        if self.experts:
            if not self.shared:
                struct.gate = struct.up = struct.down = library.Projection()
            packed = self.router_projection.struct if self.packed_router else library.Projection()
            struct.router = library.Router(
                weight=None if self.packed_router else address(self.router_weight), packed=packed,
                bias=address(self.bias_of_logits), correction=address(self.corrections), experts=self.experts,
                k=self.k, **({"factor": 1.0, "groups": 1, "kept_groups": 1} | self.router),
            )  # fmt: skip
            matrices = [projection.matrix.matrix for projection in self.expert_matrices]
            rotations = [rotation.rotation for rotation in self.expert_rotations]
            struct.experts = library.ExpertsParams(*matrices, *rotations, self.activation)
            struct.shared_gate = address(self.shared_gate)
        return struct

    def run(
        self,
        x: np.ndarray,
        cache: list[np.ndarray] | None = None,
        *,
        parts: int = ATTENTION | FEED_FORWARD,
        position: int = 0,
        row: int = 0,
        rows: int | None = None,
        causal: bool = True,
        mask: np.ndarray | None = None,
        factors: np.ndarray | None = None,
        exact: bool = True,
    ) -> np.ndarray:
        struct = self.struct
        y = np.full(x.shape, np.nan, np.float32)
        params = library.LayerParams(
            ctypes.addressof(struct), parts, causal, cache is not None, mask is not None, factors is not None, exact,
            position=position, row=row, rows=row + len(x) if rows is None else rows,
        )  # fmt: skip
        inputs = [a for a in (x, mask, factors) if a is not None]
        library.library().tq_layer_forward(ctypes.byref(params), described(inputs), described([y, *(cache or [])]))
        return y

    # --- the same in float64 ---

    def expected(
        self,
        x: np.ndarray,
        cache: list[np.ndarray] | None = None,
        *,
        parts: int = ATTENTION | FEED_FORWARD,
        position: int = 0,
        row: int = 0,
        rows: int | None = None,
        causal: bool = True,
        mask: np.ndarray | None = None,
        factors: np.ndarray | None = None,
    ) -> np.ndarray:
        x = x.astype(np.float64)
        if parts & ATTENTION:
            n = len(x)
            queries, keys, values = self._qkv(normalized(x, self.weights.get("before_attention")), position)
            queries, gates = queries[..., : self.head_dim], queries[..., self.head_dim :]
            if factors is not None:
                queries = queries * factors.reshape(1, n, 1)
            if cache is None:
                cache = [np.zeros((1, a.shape[0], n, a.shape[2])) for a in (keys, values)]
            for buffer, new in zip(cache, (keys, values), strict=True):
                buffer[0, :, row : row + n] = new
            rows = row + n if rows is None else rows
            visible = np.arange(rows) <= row + np.arange(n)[:, None] if causal else np.ones((n, rows), bool)
            scores = self._scores(queries, cache[0][0, :, :rows].astype(np.float64), visible, mask)
            repeats = self.n_heads // self.n_kv_heads
            branch = scores @ np.repeat(cache[1][0, :, :rows].astype(np.float64), repeats, axis=0)
            if self.gated:
                branch = branch / (1 + np.exp(-gates))
            branch = self.out(branch.swapaxes(0, 1).reshape(n, -1))
            x = self._add(x, branch, "after_attention")
        if parts & FEED_FORWARD:
            inputs = normalized(x, self.weights.get("before_feed_forward"))
            branch = self._mixed(inputs) if self.experts else self._network(inputs)
            x = self._add(x, branch, "after_feed_forward")
        return x

    def _network(self, x: np.ndarray) -> np.ndarray:
        made = [projection(x) for projection in self.gate_up]
        gate, up = np.split(made[0], 2, axis=-1) if self.fused else made
        return self.down(ACTIVATIONS[self.activation](gate) * up)

    def _mixed(self, x: np.ndarray) -> np.ndarray:
        logits = self.router_projection(x) if self.packed_router else x @ self.router_weight.T.astype(np.float64)
        logits = logits if self.bias_of_logits is None else logits + self.bias_of_logits
        scores = 1 / (1 + np.exp(-logits)) if self.router.get("sigmoid") else np.exp(logits)
        if not self.router.get("sigmoid"):
            scores /= scores.sum(-1, keepdims=True)
        values = scores if self.corrections is None else scores + self.corrections
        groups = self.router.get("groups", 1)
        if groups > 1:
            values = values.reshape(len(x), groups, -1)
            best = np.sort(values, axis=-1)[..., -2:].sum(-1)
            limit = np.sort(best, axis=-1)[:, -self.router["kept_groups"], None]
            values = np.where(best[..., None] < limit[..., None], 0, values).reshape(len(x), -1)
        y = np.zeros_like(x)
        for token, row in enumerate(x):
            chosen = np.argsort(-values[token])[: self.k]
            weights = scores[token, chosen] * self.router.get("factor", 1.0)
            weights = weights / scores[token, chosen].sum() if self.router.get("normalize") else weights
            for expert, weight in zip(chosen, weights, strict=True):
                gate, up, down = self.expert_matrices
                y[token] += weight * down(ACTIVATIONS[self.activation](gate(row, expert)) * up(row, expert), expert)
        if self.shared:
            weight = 1 / (1 + np.exp(-x @ self.shared_gate))[:, None] if self.shared == "gated" else 1
            y += weight * self._network(x)
        return y

    def _add(self, x: np.ndarray, branch: np.ndarray, norm: str) -> np.ndarray:
        branch = normalized(branch, self.weights.get(norm))
        return branch if self.bare else x + self.residual * branch

    def _qkv(self, x: np.ndarray, position: int) -> list[np.ndarray]:
        """(heads, tokens, dim) of each, placed; queries are followed by their gates."""
        columns = np.concatenate([projection(x) for projection in self.qkv], axis=-1)
        stride = self.head_dim * (2 if self.gated else 1)
        ends = np.cumsum([self.n_heads * stride, self.n_kv_heads * self.head_dim])
        queries, keys, values = (
            part.reshape(len(x), n, -1).swapaxes(0, 1)
            for part, n in zip(np.split(columns, ends, -1), (self.n_heads, *(self.n_kv_heads,) * 2), strict=True)
        )
        queries[..., : self.head_dim] = self._place(queries[..., : self.head_dim], "query_norm", position)
        return [queries, self._place(keys, "key_norm", position), values]

    def _place(self, x: np.ndarray, norm: str, position: int) -> np.ndarray:
        def norms(x: np.ndarray) -> np.ndarray:
            if self.head_norm != "whole":
                return normalized(x, self.weights[norm])
            flat = x.swapaxes(0, 1).reshape(x.shape[1], -1)
            return normalized(flat, self.weights[norm]).reshape(x.shape[1], len(x), -1).swapaxes(0, 1)

        if not self.norm_after_rope:
            x = norms(x)
        if self.rope_dims:
            at = (position + np.arange(x.shape[1])) * self.position_scale
            angles = at[:, None] * self.frequencies.astype(np.float64)
            turned, rest = x[..., : self.rope_dims] * self.multiplier, x[..., self.rope_dims :]
            a, b = (turned[..., ::2], turned[..., 1::2]) if self.interleaved else np.split(turned, 2, -1)
            first = a * np.cos(angles) - b * np.sin(angles)
            second = a * np.sin(angles) + b * np.cos(angles)
            both = np.stack([first, second], -1) if self.interleaved else np.concatenate([first, second], -1)
            x = np.concatenate([both.reshape(turned.shape), rest], -1)
        return norms(x) if self.norm_after_rope else x

    def _scores(self, queries: np.ndarray, keys: np.ndarray, visible: np.ndarray, mask: Any) -> np.ndarray:
        scores = queries @ np.repeat(keys, self.n_heads // self.n_kv_heads, axis=0).swapaxes(1, 2) * self.scale
        if self.softcap:
            scores = self.softcap * np.tanh(scores / self.softcap)
        if mask is not None:
            scores = np.where(mask, scores, -np.inf) if mask.dtype == bool else scores + mask
        scores = np.where(visible, scores, -np.inf)
        if self.sinks:
            sinks = np.broadcast_to(self.sink_logits[:, None, None], (*scores.shape[:2], 1))
            scores = np.concatenate([scores, sinks], -1)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        return weights[..., :-1] if self.sinks else weights


def described(arrays: list[np.ndarray]) -> ctypes.Array:
    """tq_array[] over NumPy arrays."""
    made = []
    for a in arrays:
        shape = (ctypes.c_int32 * a.ndim)(*a.shape)
        strides = (ctypes.c_int64 * a.ndim)(*(step // a.itemsize for step in a.strides))
        made.append(library.Array(a.ctypes.data, shape, strides, a.ndim, DTYPES[str(a.dtype)]))
    return (library.Array * len(made))(*made)


def tokens(layer: Layer, n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 1, (n, layer.hidden)).astype(np.float32)


def caches(layer: Layer, held: int, capacity: int, dtype: type = np.float32) -> list[np.ndarray]:
    """Keys and values of `held` tokens; the rows after them are NaN."""
    random = np.random.default_rng(5)
    made = []
    for dim in (layer.head_dim, layer.value_dim):
        buffer = np.full((1, layer.n_kv_heads, capacity, dim), np.nan, dtype)
        buffer[:, :, :held] = random.normal(0, 1, (1, layer.n_kv_heads, held, dim))
        made.append(buffer)
    return made
