"""Ways to code head vectors that kv_experiments.py tries: what they leave of vectors, and the bits that they take."""

from functools import cache as once
from typing import Any

import mlx.core as mx
import numpy as np

from tq.engine.cache import codecs, lloyd_max
from tq.engine.cache.rotation import rotation
from tq.engine.quantize.rotation import rotate as hadamard

SCALE_BITS = 16
TOKENS = 64  # of a block
SUB_GROUP = 16


class Coder:
    """What is left of vectors (B, heads, tokens, dim): the vectors themselves."""

    fitted = False

    def bits(self, dim: int) -> float:
        """Of a number, all that is stored for each token included."""
        return 32.0

    def fit(self, x: mx.array, queries: mx.array) -> None:
        """See the first vectors that are packed, and the mean square of each number of queries so far, (heads, dim)."""

    def code(self, x: mx.array) -> mx.array:
        return x


keep = Coder


class Codec(Coder):
    """A codec of tq as it is."""

    def __init__(self, name: str, bits: float, group: int = 0):
        self.how = name, bits, group
        self.order: mx.array | None = None

    def _made(self, dim: int) -> codecs.VectorCodec:
        name, bits, group = self.how
        return codecs.make(name, bits, dim, group)

    def bits(self, dim: int) -> float:
        return codecs.size_bytes(self._made(dim)) * 8 / dim

    def fit(self, x: mx.array, queries: mx.array) -> None:
        self.order = self._made(x.shape[-1]).fit(x)

    def code(self, x: mx.array) -> mx.array:
        codec = self._made(x.shape[-1])
        return codec.unrotate(codec.decode(codec.encode(codec.rotate(x, self.order))), self.order)


class Rotated(Coder):
    """The codes of lloyd-max after another rotation: none, hadamard (without signs), random."""

    def __init__(self, bits: int, how: str):
        self.n_bits, self.how = bits, how

    def bits(self, dim: int) -> float:
        return self.n_bits + SCALE_BITS / dim

    def code(self, x: mx.array) -> mx.array:
        dim = x.shape[-1]
        codec = codecs.make("lloyd-max", self.n_bits, dim, 0)
        matrix = _matrix(self.how, dim)
        return codec.decode(codec.encode(x @ matrix.T)) @ matrix


@once
def _matrix(how: str, dim: int) -> mx.array:
    if how == "none":
        return mx.eye(dim)
    if how == "hadamard":
        return hadamard(mx.eye(dim), mx.ones(dim)).T
    q, _ = np.linalg.qr(np.random.default_rng(5).standard_normal((dim, dim)))
    return mx.array(q.astype(np.float32))


class Norm(Coder):
    """lloyd-max with the root mean square as scale, as in the paper; `exact`: one that keeps the vector's length."""

    def __init__(self, bits: int, exact: bool = False):
        self.n_bits, self.exact = bits, exact

    def bits(self, dim: int) -> float:
        return self.n_bits + SCALE_BITS / dim

    def code(self, x: mx.array) -> mx.array:
        matrix = rotation(x.shape[-1])
        y = x @ matrix.T
        rms = mx.sqrt(mx.square(y).mean(axis=-1, keepdims=True))
        levels = _nearest(y, rms, self.n_bits)
        scale = rms / mx.sqrt(mx.square(levels).mean(axis=-1, keepdims=True)) if self.exact else rms
        return (levels * scale.astype(mx.float16).astype(mx.float32)) @ matrix


def _nearest(y: mx.array, scale: mx.array, bits: int) -> mx.array:
    """The levels nearest to y / scale."""
    codec: Any = codecs.make("lloyd-max", bits, y.shape[-1], 0)
    return mx.array(codec.levels)[codec._nearest(y * lloyd_max._inverse(scale))]


class Wrapped(Coder):
    """Vectors changed before another coder, and back."""

    def __init__(self, inner: Coder):
        self.inner = inner

    def bits(self, dim: int) -> float:
        return self.inner.bits(dim)

    def fit(self, x: mx.array, queries: mx.array) -> None:
        self.learn(x, queries)
        self.inner.fit(self.forth(x), queries)

    def code(self, x: mx.array) -> mx.array:
        return self.back(self.inner.code(self.forth(x)))

    def learn(self, x: mx.array, queries: mx.array) -> None: ...
    def forth(self, x: mx.array) -> mx.array: ...
    def back(self, x: mx.array) -> mx.array: ...


class Centred(Wrapped):
    """Less the mean of the first vectors."""

    def learn(self, x: mx.array, queries: mx.array) -> None:
        self.mean = x.mean(axis=2, keepdims=True)

    def forth(self, x: mx.array) -> mx.array:
        return x - self.mean

    def back(self, x: mx.array) -> mx.array:
        return x + self.mean


class CentredBlocks(Wrapped):
    """Less the mean of each block, which would be stored in 16 bits."""

    def bits(self, dim: int) -> float:
        return self.inner.bits(dim) + 16 / TOKENS

    def code(self, x: mx.array) -> mx.array:
        blocks = [x[:, :, i : i + TOKENS] for i in range(0, x.shape[2], TOKENS)]
        means = [b.mean(axis=2, keepdims=True) for b in blocks]
        return mx.concatenate([self.inner.code(b - m) + m for b, m in zip(blocks, means, strict=True)], axis=2)

    def forth(self, x: mx.array) -> mx.array:
        return x


class Scaled(Wrapped):
    """Each number over its root mean square to a power; queries would be multiplied by it."""

    def __init__(self, inner: Coder, power: float):
        super().__init__(inner)
        self.power = power

    def learn(self, x: mx.array, queries: mx.array) -> None:
        self.factor = mx.square(x).mean(axis=2, keepdims=True) ** (-self.power / 2)

    def forth(self, x: mx.array) -> mx.array:
        return x * self.factor

    def back(self, x: mx.array) -> mx.array:
        return x / self.factor


class Balanced(Scaled):
    """The factors that make the noise of scores least, if channels are independent: (E q^2 / E k^2)^(1/4)."""

    def __init__(self, inner: Coder):
        super().__init__(inner, 0.5)

    def learn(self, x: mx.array, queries: mx.array) -> None:
        self.factor = (queries[None, :, None] / mx.square(x).mean(axis=2, keepdims=True)) ** 0.25


class Principal(Wrapped):
    """In the principal axes of the first vectors of each head, the strongest first: for codecs with several widths."""

    def learn(self, x: mx.array, queries: mx.array) -> None:
        rows = np.array(x, np.float64)[0]
        moments = np.einsum("hnd,hne->hde", rows, rows)
        axes = np.linalg.eigh(moments)[1][..., ::-1]
        self.axes = mx.array(np.ascontiguousarray(axes).astype(np.float32))[None]

    def forth(self, x: mx.array) -> mx.array:
        return x @ self.axes

    def back(self, x: mx.array) -> mx.array:
        return x @ self.axes.swapaxes(-1, -2)


class PerChannel(Coder):
    """One scale per channel and block of 64 tokens (KIVI has it for keys): affine, or lloyd-max of what a Hadamard
    matrix over the tokens makes of them."""

    def __init__(self, bits: int, rotated: bool):
        self.n_bits, self.rotated = bits, rotated
        self.inner = Codec("lloyd-max" if rotated else "affine", bits)

    def bits(self, dim: int) -> float:
        return self.n_bits + (SCALE_BITS if self.rotated else 2 * SCALE_BITS) / TOKENS

    def code(self, x: mx.array) -> mx.array:
        B, H, n, d = x.shape
        y = x.reshape(B, H, n // TOKENS, TOKENS, d).swapaxes(-1, -2).reshape(B, H, -1, TOKENS)
        y = self.inner.code(y).reshape(B, H, n // TOKENS, d, TOKENS)
        return y.swapaxes(-1, -2).reshape(x.shape)


class SubScales(Coder):
    """lloyd-max with one of four factors of the scale for each 16 numbers."""

    def __init__(self, bits: int):
        self.n_bits = bits

    def bits(self, dim: int) -> float:
        return self.n_bits + SCALE_BITS / dim + 2 / SUB_GROUP

    def code(self, x: mx.array) -> mx.array:
        dim = x.shape[-1]
        matrix = rotation(dim)
        levels, scale, _ = sub_scaled((x @ matrix.T).reshape(*x.shape[:-1], -1, SUB_GROUP), self.n_bits,
                                      factors(self.n_bits, dim))  # fmt: skip
        return (levels * scale).reshape(x.shape) @ matrix


def sub_scaled(y: mx.array, bits: int, ratios: tuple[float, ...]) -> tuple[mx.array, mx.array, mx.array]:
    """Groups (..., groups, 16): levels with their factors, scales of vectors (..., 1, 1), and factors of groups."""
    rms = mx.sqrt(mx.square(y).mean(axis=(-2, -1), keepdims=True))
    best_scale, best_error, best_levels, best_factor = rms, mx.full(rms.shape, np.inf), y * 0, None
    for start in np.linspace(0.75, 1.25, 7):
        scale = rms * float(start)
        chosen, error, factor = y * 0, mx.full((*y.shape[:-1], 1), np.inf), mx.ones((*y.shape[:-1], 1))
        for ratio in ratios:
            levels = _nearest(y, scale * ratio, bits) * ratio
            e = mx.square(levels * scale - y).sum(axis=-1, keepdims=True)
            chosen, factor = mx.where(e < error, levels, chosen), mx.where(e < error, ratio, factor)
            error = mx.minimum(e, error)
        fitted = (chosen * y).sum(axis=(-2, -1), keepdims=True) / mx.square(chosen).sum(axis=(-2, -1), keepdims=True)
        fitted = fitted.astype(mx.float16).astype(mx.float32)
        e = mx.square(chosen * fitted - y).sum(axis=(-2, -1), keepdims=True)
        better = e < best_error
        best_scale, best_error = mx.where(better, fitted, best_scale), mx.minimum(e, best_error)
        best_levels = mx.where(better, chosen, best_levels)
        best_factor = factor if best_factor is None else mx.where(better, factor, best_factor)
    assert best_factor is not None
    return best_levels, best_scale, best_factor


@once
def factors(bits: int, dim: int) -> tuple[float, ...]:
    """Four factors, trained on normal vectors: each is the best one for the groups that chose it."""
    y = mx.array(np.random.default_rng(1).standard_normal((3000, dim // SUB_GROUP, SUB_GROUP)).astype(np.float32))
    ratios = (0.6, 0.8, 1.0, 1.25)
    for _ in range(10):
        levels, scale, chosen = sub_scaled(y, bits, ratios)
        plain = levels / chosen
        moved = []
        for ratio in ratios:
            here = mx.abs(chosen - ratio) < 1e-6
            q = mx.where(here, plain * scale, 0)
            moved.append(float((q * y).sum() / mx.square(q).sum()))
        ratios = tuple(moved)
    return ratios


STATES_BITS = 8


class Trellis(Coder):
    """A bit-shift trellis with 256 states and a trained table (QTIP): a sequence for each vector, any first state."""

    def __init__(self, bits: int):
        self.n_bits = bits

    def bits(self, dim: int) -> float:
        return self.n_bits + (STATES_BITS - self.n_bits + SCALE_BITS) / dim

    def code(self, x: mx.array) -> mx.array:
        dim = x.shape[-1]
        matrix = np.array(rotation(dim))
        y = np.array(x).reshape(-1, dim) @ matrix.T
        table = trellis_table(self.n_bits)
        rms = np.sqrt(np.square(y).mean(-1, keepdims=True)) + 1e-20
        q = table[viterbi(y / rms, table, self.n_bits)]
        scale = (q * y).sum(-1, keepdims=True) / np.square(q).sum(-1, keepdims=True)
        return mx.array(((q * scale.astype(np.float16)) @ matrix).astype(np.float32).reshape(x.shape))


def viterbi(x: np.ndarray, table: np.ndarray, bits: int) -> np.ndarray:
    """The states (n, T) whose values are nearest to x (n, T)."""
    n, length = x.shape
    states, branch = len(table), 2**bits
    cost = np.square(x[:, :1] - table)
    came = np.empty((length, n, states // branch), np.uint8)
    rows = np.arange(n)
    for t in range(1, length):
        before = cost.reshape(n, branch, -1)  # state s follows those with s >> bits as their low bits
        came[t] = before.argmin(axis=1)
        cost = np.repeat(before.min(axis=1), branch, axis=1) + np.square(x[:, t : t + 1] - table)
    found = np.empty((n, length), np.int64)
    found[:, -1] = cost.argmin(axis=1)
    for t in range(length - 1, 0, -1):
        low = found[:, t] >> bits
        found[:, t - 1] = low + came[t][rows, low].astype(np.int64) * (states // branch)
    return found


@once
def trellis_table(bits: int) -> np.ndarray:
    """256 values, each the mean of what it stood for, after 60 rounds over fresh normal sequences."""
    rng = np.random.default_rng(2)
    table = rng.standard_normal(2**STATES_BITS).astype(np.float32)
    for _ in range(60):
        x = rng.standard_normal((64, 512)).astype(np.float32)
        states = viterbi(x, table, bits).ravel()
        count = np.bincount(states, minlength=len(table))
        mean = np.bincount(states, x.ravel(), len(table)) / np.maximum(count, 1)
        table = np.where(count > 0, mean, table).astype(np.float32)
    return table


def error(coder: Coder, dim: int, n: int = 2000) -> float:
    """Mean square error on normal vectors."""
    x = mx.array(np.random.default_rng(7).standard_normal((1, 1, n // TOKENS * TOKENS, dim)).astype(np.float32))
    coder.fit(x, mx.ones((1, dim)))
    return float(mx.square(coder.code(x) - x).mean())
