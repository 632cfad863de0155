"""A decoder layer as one kernel against float64 NumPy, which decodes the same codes and keeps its own cache."""

import ctypes
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hadamard import Rotation
from packed_matrix import PackedMatrix, relative_error

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

    def __init__(self, rows: int, columns: int, rotation: Rotation | None, seed: int, bias: bool = False):
        self.matrix = PackedMatrix(rows, columns, 4, group=64, bias=bias, seed=seed)
        # Rows of about unit length, so that activations keep their size.
        self.matrix.scales = (self.matrix.scales / math.sqrt(columns)).astype(np.float16)
        self.matrix.dense = self.matrix.values[self.matrix.codes] * self.matrix._spread(self.matrix.scales)
        self.rotation = rotation

    @property
    def struct(self) -> library.Projection:
        return library.Projection(self.matrix.matrix, self.rotation.rotation if self.rotation else library.Rotation())

    def __call__(self, x: np.ndarray) -> np.ndarray:
        x = x if self.rotation is None else x @ self.rotation.dense.T
        y = x @ self.matrix.dense[0].T
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
        self.sink_logits = random.normal(0, 2, self.n_heads).astype(np.float32) if self.sinks else None

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
            ctypes.addressof(struct), parts, position, row, row + len(x) if rows is None else rows, causal,
            cache is not None, mask is not None, factors is not None, exact,
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
            made = [projection(normalized(x, self.weights.get("before_feed_forward"))) for projection in self.gate_up]
            gate, up = np.split(made[0], 2, axis=-1) if self.fused else made
            x = self._add(x, self.down(ACTIVATIONS[self.activation](gate) * up), "after_feed_forward")
        return x

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


KINDS: dict[str, dict[str, Any]] = {
    "llama": {},
    "without norms": {"norms": ()},
    "all norms": {
        "norms": ("before_attention", "after_attention", "before_feed_forward", "after_feed_forward"),
        "residual": 0.3,
        "activation": 1,
    },
    "norms afterwards": {"norms": ("after_attention", "after_feed_forward"), "head_norm": "whole"},
    "norms of heads": {"head_norm": "head"},
    "norms after the embedding": {"head_norm": "head", "norm_after_rope": True},
    "fused": {"fused": True},
    "biases": {"bias": True},
    "biases, fused": {"bias": True, "fused": True},
    "rotations apart": {"rotations": "apart"},
    "no rotation": {"rotations": "none"},
    "interleaved": {"interleaved": True, "rope_dims": 12},
    "scaled embedding": {"position_scale": 0.25, "multiplier": 1.3, "rope_dims": 8},
    "no embedding": {"rope_dims": 0},
    "soft cap": {"softcap": 1.5, "scale": 2.0},
    "sinks": {"sinks": True},
    "gated": {"gated": True, "head_norm": "head"},
    "gated, fused": {"gated": True, "fused": True},
    "long values": {"value_dim": 36},
    "one head": {"n_heads": 1, "n_kv_heads": 1, "head_dim": 64, "value_dim": 64},
    "gelu": {"activation": 2},
    "relu": {"activation": 3},
    "squared relu": {"activation": 4},
    "bare": {"bare": True, "norms": ()},
}


@pytest.mark.parametrize("n", [1, 5])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_layer_matches_float64(kind, n):
    layer = Layer(**KINDS[kind])
    x = tokens(layer, n)
    ours, theirs = caches(layer, 11, 20), [a.astype(np.float64) for a in caches(layer, 11, 20)]
    y = layer.run(x, ours, position=11, row=11)
    assert relative_error(y, layer.expected(x, theirs, position=11, row=11)) < 1e-5
    for got, expected in zip(ours, theirs, strict=True):
        assert relative_error(got[:, :, : 11 + n], expected[:, :, : 11 + n]) < 1e-5
        assert np.isnan(got[:, :, 11 + n :]).all()


@pytest.mark.parametrize("n", [2, 16, 257, 600])
def test_prompts_of_any_length_match_float64(n):
    layer = Layer()
    x = tokens(layer, n)
    ours, theirs = caches(layer, 7, 7 + n), [a.astype(np.float64) for a in caches(layer, 7, 7 + n)]
    y = layer.run(x, ours, position=7, row=7)
    assert relative_error(y, layer.expected(x, theirs, position=7, row=7)) < 1e-5
    assert relative_error(ours[0], theirs[0]) < 1e-5


@pytest.mark.parametrize("n", [1, 9, 300])
def test_without_a_cache_the_prompt_is_all_there_is(n):
    layer = Layer()
    x = tokens(layer, n)
    assert relative_error(layer.run(x), layer.expected(x)) < 1e-5


@pytest.mark.parametrize("parts", [ATTENTION, FEED_FORWARD])
@pytest.mark.parametrize("n", [1, 300])
def test_either_half_alone(parts, n):
    layer = Layer()
    x = tokens(layer, n)
    cache, wide = caches(layer, 3, 310), [a.astype(np.float64) for a in caches(layer, 3, 310)]
    if parts == FEED_FORWARD:
        cache = wide = None
    y = layer.run(x, cache, parts=parts, position=3, row=3)
    assert relative_error(y, layer.expected(x, wide, parts=parts, position=3, row=3)) < 1e-5


def test_a_ring_is_seen_whole_wherever_the_token_goes():
    layer = Layer()
    x = tokens(layer, 1)
    where = {"position": 40, "row": 4, "rows": 12, "causal": False}
    ours, theirs = caches(layer, 12, 12), [a.astype(np.float64) for a in caches(layer, 12, 12)]
    y = layer.run(x, ours, **where)
    assert relative_error(y, layer.expected(x, theirs, **where)) < 1e-5
    assert relative_error(ours[1], theirs[1]) < 1e-5


def test_without_causality_every_token_sees_all():
    layer = Layer()
    x = tokens(layer, 280)
    y = layer.run(x, causal=False)
    assert relative_error(y, layer.expected(x, causal=False)) < 1e-5
    assert relative_error(y, layer.expected(x)) > 0.01


@pytest.mark.parametrize("shape", [(300, 310), (1, 310), (310,), (6, 300, 310), (1, 6, 1, 310), (1, 1, 300, 310)])
@pytest.mark.parametrize("dtype", [bool, np.float32])
def test_masks_of_any_shape(shape, dtype):
    layer = Layer()
    x = tokens(layer, 300)
    random = np.random.default_rng(3)
    mask = random.random(shape) < 0.5 if dtype is bool else random.normal(0, 2, shape).astype(np.float32)
    mask[..., 0] = True  # nobody sees nothing
    ours, theirs = caches(layer, 10, 310), [a.astype(np.float64) for a in caches(layer, 10, 310)]
    where = {"position": 10, "row": 10, "causal": False}
    y = layer.run(x, ours, mask=mask, **where)
    wide = mask.reshape(mask.shape[-3:]) if mask.ndim == 4 else mask
    assert relative_error(y, layer.expected(x, theirs, mask=wide, **where)) < 1e-5


def test_factors_of_the_queries():
    layer = Layer()
    x = tokens(layer, 270)
    factors = np.random.default_rng(1).uniform(0.5, 2, (270, 1)).astype(np.float32)
    assert relative_error(layer.run(x, factors=factors), layer.expected(x, factors=factors)) < 1e-5


def test_half_precision_caches_round_what_they_hold_and_nothing_else():
    layer = Layer()
    x = tokens(layer, 4)
    ours = caches(layer, 9, 16, np.float16)
    theirs = [a.astype(np.float64) for a in ours]
    y = layer.run(x, ours, position=9, row=9)
    expected = layer.expected(x, theirs, position=9, row=9)
    assert relative_error(y, expected) < 1e-3
    for got, wanted in zip(ours, theirs, strict=True):
        assert got.dtype == np.float16
        assert np.array_equal(got[:, :, :9], wanted[:, :, :9])
        np.testing.assert_allclose(got[:, :, 9:13], wanted[:, :, 9:13], rtol=2**-11, atol=1e-5)
        assert np.isnan(got[:, :, 13:]).all()


@pytest.mark.parametrize("n", [1, 40])
def test_int8_activations_are_close(n):
    layer = Layer(hidden=192, inner=320, n_heads=6, n_kv_heads=2, head_dim=32, value_dim=32, rope_dims=32)
    x = tokens(layer, n)
    expected = layer.expected(x)
    assert relative_error(layer.run(x, exact=False), expected) < 0.04  # four products in a row
    assert relative_error(layer.run(x), expected) < 1e-5


def test_not_a_number_reaches_those_that_see_it():
    layer = Layer()
    x = tokens(layer, 6)
    x[3, 17] = np.nan
    for exact in (True, False):
        ours = caches(layer, 0, 6)
        assert np.isnan(layer.run(x, ours, exact=exact)[3:]).all()
        assert np.isfinite(ours[0][:, :, :3]).all()
        assert np.isnan(ours[0][:, :, 3]).all()


def test_positions_far_away_turn_as_in_float32():
    """The angle is position times frequency rounded to float32, as in MLX: a float64 angle would be another one."""
    layer = Layer(norms=())
    x = tokens(layer, 3)
    ours, there = caches(layer, 0, 3), 100_003
    layer.run(x, ours, position=there)
    keys = layer.qkv[1](x.astype(np.float64)).reshape(3, 2, 20).swapaxes(0, 1)
    angles = (np.float32(there) + np.arange(3, dtype=np.float32))[:, None] * layer.frequencies
    a, b = np.split(keys, 2, -1)
    cos, sin = np.cos(angles.astype(np.float64)), np.sin(angles.astype(np.float64))
    expected = np.concatenate([a * cos - b * sin, a * sin + b * cos], -1)
    assert relative_error(ours[0][0], expected) < 1e-5


def test_layers_with_other_embeddings_alternate():
    """Tables of angles are kept between calls, and must not be taken for others."""
    layers = [Layer(rope_dims=dims, multiplier=m) for dims in (20, 12) for m in (1.0, 1.5, 2.0)]
    for n, position in ((1, 5), (3, 5), (1, 6), (1, 5)):
        for layer in layers:
            x = tokens(layer, n)
            got = layer.run(x, position=position)
            assert relative_error(got, layer.expected(x, position=position)) < 1e-5
