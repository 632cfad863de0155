"""Variants of the attention kernels: random caches, and attention over them in float64."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np

from tq.engine.quantize.codebooks import stored_codebook
from tq.metal import variants as packed
from tq.metal.attend import Codes, Tokens, attend, kernel_of
from tq.metal.variants import Case, Variant, random_matrix, random_rows, type_name

UNUSED = 64  # packed tokens behind those that count
LARGE = 999  # what is there, and behind plain tokens


@dataclass(frozen=True)
class Setting:
    """What a launch works on. Pairs are of keys and of values.

    Attributes:
        dtype: Of activations.
        heads: Of queries, and of keys.
        tokens: Of the sink; packed before the first that counts; packed; recent.
        length: Queries of a sequence.
        groups: Numbers that share a scale; 0: a vector.
    """

    bits: tuple[int, int]
    dims: tuple[int, int]
    dtype: mx.Dtype
    heads: tuple[int, int]
    tokens: tuple[int, int, int, int]
    length: int = 1
    batch: int = 1
    groups: tuple[int, int] = (0, 0)

    @property
    def label(self) -> str:
        heads, tokens = f"{self.heads[0]} heads of {self.heads[1]}", "+".join(str(n) for n in self.tokens)
        bits, dims = (f"{pair[0]}, {pair[1]}" for pair in (self.bits, self.dims))
        return f"{bits} bits, {dims} numbers, {type_name(self.dtype)}, {heads}, {self.length} queries, {tokens} tokens"


class Data:
    """A random cache and queries, as `attend` takes them, and what they are in float64."""

    def __init__(self, rng: np.random.Generator, setting: Setting):
        (self.key, *keys, exact_keys), (self.value, *values, exact_values) = (_side(rng, setting, i) for i in (0, 1))
        plain = tuple(zip(keys, values, strict=True))  # sink, packed, recent
        self.tokens = Tokens(plain[0], keys[1], values[1], plain[2], *setting.tokens)
        n_heads, dim = setting.heads[0], setting.dims[0]
        self.queries, exact = random_rows(rng, (setting.batch, n_heads, setting.length, dim), setting.dtype)
        self.exact = exact, exact_keys, exact_values
        self.scale = dim**-0.5

    def attend(self, **how: Any) -> mx.array:
        return attend(self.queries, self.tokens, self.key, self.value, **{"scale": self.scale, **how})

    def expected(self, **how: Any) -> np.ndarray:
        """float64. how: arguments of `attention`."""
        return attention(*self.exact, **{"scale": self.scale, **how})


def _side(rng: np.random.Generator, setting: Setting, side: int) -> tuple:
    """Of keys or values: codes; arrays of the sink, packed, and recent tokens; all that count in float64."""
    bits, dim, group, dtype = setting.bits[side], setting.dims[side], setting.groups[side], setting.dtype
    n_sink, first, n_packed, n_recent = setting.tokens
    lead, count = (setting.batch, setting.heads[1]), first + n_packed
    rotation = np.linalg.qr(rng.standard_normal((dim, dim)))[0].astype(np.float32)
    # 8-bit codes are integers: these are normal numbers with 1/32 for a unit, which goes into the scale.
    codebook = np.arange(-128, 128) / 32 if bits == 8 else stored_codebook("lloyd-max", bits)
    matrix = random_matrix(rng, packed.Codes(bits, group, codebook), (*lead, count + UNUSED, dim))
    dense = matrix.dense[:, :, first:count] @ rotation.astype(np.float64)
    scales = mx.where(mx.arange(count + UNUSED)[:, None] < count, matrix.scales, mx.array(LARGE, mx.float16))
    scales = scales / 32 if bits == 8 else scales
    arrays = (matrix.weight, scales) if count else (matrix.weight[:, :, :0], scales[:, :, :0])
    sink, exact_sink = random_rows(rng, (*lead, n_sink, dim), dtype)
    recent, exact_recent = random_rows(rng, (*lead, n_recent, dim), dtype)
    rest = mx.full((*lead, 3, dim), LARGE, dtype)
    sink, recent = (mx.concatenate([a, rest], axis=2) if a.size else a for a in (sink, recent))
    codes = Codes(bits, matrix.codebook, mx.array(rotation), group)
    return codes, sink, arrays, recent, np.concatenate([exact_sink, dense, exact_recent], axis=2)


def attention(
    queries: np.ndarray,
    keys: np.ndarray,
    values: np.ndarray,
    scale: float,
    mask: np.ndarray | str | None = None,
    sinks: np.ndarray | None = None,
    softcap: float = 0.0,
    starts: np.ndarray | None = None,
) -> np.ndarray:
    """Attention in float64: the arguments of `attend`, as NumPy arrays; keys and values of all tokens."""
    B, n_heads, length, _ = queries.shape
    group, total = n_heads // keys.shape[1], keys.shape[2]
    keys, values = np.repeat(keys, group, axis=1), np.repeat(values, group, axis=1)
    scores = queries @ keys.swapaxes(-1, -2) * scale
    if softcap:
        scores = softcap * np.tanh(scores / softcap)
    if isinstance(mask, str):
        mask = np.arange(total) <= np.arange(total - length, total)[:, None]
    if mask is not None:
        scores = np.where(mask, scores, -np.inf) if mask.dtype == bool else scores + mask
    if starts is not None:
        scores = np.where(np.arange(total) >= starts[:, None, None, None], scores, -np.inf)
    if sinks is not None:
        logits = np.broadcast_to(sinks[:, None, None], (B, n_heads, length, 1))
        scores = np.concatenate([scores, logits], axis=-1)
        values = np.concatenate([values, np.zeros_like(values[:, :, :1])], axis=2)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return weights @ values / weights.sum(axis=-1, keepdims=True)


def variants(settings: Iterable[Setting]) -> Iterator[Variant]:
    """One for each: queries are the last tokens."""
    for setting in settings:
        rows = setting.heads[0] // setting.heads[1] * setting.length
        yield Variant(kernel_of(rows, max(setting.dims)), setting.label, setting.dtype, partial(_case, setting))


def _case(setting: Setting, rng: np.random.Generator) -> Case:
    data = Data(rng, setting)
    arrays = (*data.tokens.keys, *data.tokens.values, *data.tokens.sink, *data.tokens.recent)
    expected = data.expected(mask="causal")
    size_bytes = sum(array.nbytes for array in arrays) + data.queries.nbytes + expected.size * setting.dtype.size
    return Case(lambda: data.attend(mask="causal"), expected, size_bytes)
