"""Attention over a cache whose tokens are partly packed: the reference, in plain mx.

Tokens are read in steps with an online softmax (Milakov and Gimelshein 2018), so that memory is bounded: no step holds
more than STEP_NUMBERS decoded numbers or scores.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import mlx.core as mx

from tq.engine.cache.codecs import VectorCodec
from tq.engine.cache.settings import BLOCK

STEP_NUMBERS = 1 << 21
HIDDEN = mx.finfo(mx.float32).min  # the score of what a mask hides


@dataclass(frozen=True)
class Plain:
    """The first `count` tokens of keys and values (B, n_kv_heads, tokens, dim)."""

    keys: mx.array
    values: mx.array
    count: int


@dataclass(frozen=True)
class Packed:
    """`count` tokens from `first` on of packed arrays: (B, n_kv_heads, tokens, ...) each."""

    keys: list[mx.array]
    values: list[mx.array]
    count: int
    first: int
    codecs: tuple[VectorCodec, VectorCodec]
    fitted: tuple[mx.array | None, mx.array | None]


Segment = Plain | Packed


def decoded(segments: Sequence[Segment], dtype: mx.Dtype) -> tuple[mx.array, mx.array]:
    """Keys and values (B, n_kv_heads, tokens, dim) of all segments."""
    parts: tuple[list[mx.array], list[mx.array]] = ([], [])
    for segment in segments:
        if segment.count == 0:
            continue
        for side, arrays in enumerate((segment.keys, segment.values)):
            parts[side].append(_tokens(segment, side, arrays).astype(dtype))
    keys, values = (one[0] if len(one) == 1 else mx.concatenate(one, axis=2) for one in parts)
    return keys, values


def _tokens(segment: Segment, side: int, arrays: mx.array | list[mx.array]) -> mx.array:
    """Keys or values of a whole segment in their own basis."""
    if isinstance(segment, Plain):
        assert isinstance(arrays, mx.array)
        return arrays if arrays.shape[2] == segment.count else arrays[:, :, : segment.count]
    codec = segment.codecs[side]
    stop = segment.first + segment.count
    return codec.unrotate(codec.decode([a[:, :, segment.first : stop] for a in arrays]), segment.fitted[side])


def attend(
    queries: mx.array,
    segments: Sequence[Segment],
    scale: float,
    mask: mx.array | str | None = None,
    sinks: mx.array | None = None,
    softcap: float = 0.0,
    values_are_keys: bool = False,
) -> mx.array:
    """As `mx.fast.scaled_dot_product_attention` over the tokens of the segments in their order.

    Args:
        queries: (B, n_heads, L, head_dim).
        mask: None, "causal" (queries are the last L tokens), or an array that broadcasts to (B, n_heads, L, tokens): a
            bool one (true: visible), or one that is added to scores.
        sinks: (n_heads,): a score that takes part in the softmax and has no value.
        softcap: If not 0, scores are softcap * tanh(score / softcap) before the mask.
        values_are_keys: Attend to the keys as values: what latent attention does.

    Returns:
        (B, n_heads, L, value_dim), the type of `queries`.
    """
    B, n_heads, length, _ = queries.shape
    n_kv_heads, value_dim = _form(segments[0], values_are_keys)
    total = sum(segment.count for segment in segments)
    softmax = _Softmax(
        queries, n_kv_heads, value_dim, scale, softcap, sinks, _Mask(mask, queries.shape, n_kv_heads, total)
    )
    # Packed tokens first: what they sum to is in the basis of their codes, and leaves it once.
    column = 0
    columns = []
    for segment in segments:
        columns.append(column)
        column += segment.count
    in_order = sorted(zip(segments, columns, strict=True), key=lambda pair: isinstance(pair[0], Plain))
    for segment, column in in_order:
        if segment.count == 0:
            continue
        if isinstance(segment, Plain):
            for start, stop in softmax.steps(segment.count):
                keys = segment.keys[:, :, start:stop].astype(mx.float32)
                values = keys if values_are_keys else segment.values[:, :, start:stop].astype(mx.float32)
                softmax.add(softmax.queries, keys, values, column + start)
            continue
        side = 0 if values_are_keys else 1
        key_codec, value_codec = segment.codecs[0], segment.codecs[side]
        rotated = key_codec.rotate(softmax.scaled, segment.fitted[0]).reshape(softmax.queries.shape)
        for start, stop in softmax.steps(segment.count):
            part = slice(segment.first + start, segment.first + stop)
            keys = key_codec.decode([a[:, :, part] for a in segment.keys])
            values = keys if values_are_keys else value_codec.decode([a[:, :, part] for a in segment.values])
            softmax.add(rotated, keys, values, column + start)
        total_values = softmax.sums.reshape(B, n_heads, length, value_dim)
        softmax.sums = value_codec.unrotate(total_values, segment.fitted[side]).reshape(softmax.sums.shape)
    return softmax.result().reshape(B, n_heads, length, value_dim).astype(queries.dtype)


def _form(segment: Segment, values_are_keys: bool) -> tuple[int, int]:
    """Key heads, and numbers of a value."""
    if isinstance(segment, Plain):
        return segment.keys.shape[1], (segment.keys if values_are_keys else segment.values).shape[3]
    return segment.keys[0].shape[1], segment.codecs[0 if values_are_keys else 1].dim


class _Mask:
    """A mask, by runs of tokens."""

    def __init__(self, mask: mx.array | str | None, shape: Sequence[int], n_kv_heads: int, total: int):
        self.causal = isinstance(mask, str)
        self.length, self.total = shape[2], total
        self.array: mx.array | None = None
        if isinstance(mask, mx.array):
            mask = mask.reshape(*(1,) * (4 - mask.ndim), *mask.shape)
            batch, heads, rows, columns = mask.shape
            if columns not in (1, total):
                raise ValueError(f"a mask over {columns} tokens does not fit a cache of {total}")
            split = (1, 1) if heads == 1 else (n_kv_heads, heads // n_kv_heads)
            self.array = mx.broadcast_to(mask.reshape(batch, *split, rows, columns), (batch, *split, rows, total))

    def apply(self, scores: mx.array, start: int) -> mx.array:
        """scores: (B, n_kv_heads, group, L, tokens from `start` on)."""
        stop = start + scores.shape[-1]
        first = self.total - self.length  # the token of the first query
        if self.causal and stop > first + 1:
            visible = mx.arange(first, self.total)[:, None] >= mx.arange(start, stop)
            return mx.where(visible, scores, HIDDEN)
        if self.array is None:
            return scores
        part = self.array[..., start:stop]
        return mx.where(part, scores, HIDDEN) if part.dtype == mx.bool_ else scores + part.astype(mx.float32)


class _Softmax:
    """The online softmax: largest score, sum of weights, and weighted sum of values so far, of each query."""

    def __init__(
        self,
        queries: mx.array,
        n_kv_heads: int,
        value_dim: int,
        scale: float,
        softcap: float,
        sinks: mx.array | None,
        mask: _Mask,
    ):
        B, n_heads, length, dim = queries.shape
        group = n_heads // n_kv_heads
        self.shape = (B, n_kv_heads, group, length)
        self.scaled = queries.astype(mx.float32) * scale
        self.queries = self.scaled.reshape(B, n_kv_heads, group * length, dim)
        self.softcap, self.mask = softcap, mask
        self.numbers = B * (n_kv_heads * (dim + value_dim) + n_heads * length)  # of a token in a step
        self.largest = mx.full((*self.shape, 1), HIDDEN)
        self.weights = mx.zeros((*self.shape, 1))
        if sinks is not None:
            self.largest = mx.broadcast_to(sinks.astype(mx.float32).reshape(n_kv_heads, group, 1, 1), (*self.shape, 1))
            self.weights = mx.ones((*self.shape, 1))
        self.sums = mx.zeros((B, n_kv_heads, group * length, value_dim))

    def steps(self, count: int) -> Iterator[tuple[int, int]]:
        step = max(STEP_NUMBERS // self.numbers // BLOCK, 1) * BLOCK
        for start in range(0, count, step):
            yield start, min(start + step, count)

    def add(self, queries: mx.array, keys: mx.array, values: mx.array, column: int) -> None:
        """Tokens from `column` on: keys and values (B, n_kv_heads, n, dim)."""
        scores = (queries @ keys.swapaxes(-1, -2)).reshape(*self.shape, -1)
        if self.softcap:
            scores = self.softcap * mx.tanh(scores / self.softcap)
        scores = self.mask.apply(scores, column)
        largest = mx.maximum(self.largest, scores.max(axis=-1, keepdims=True))
        weights = mx.exp(scores - largest)
        before = mx.exp(self.largest - largest)
        self.largest = largest
        self.weights = self.weights * before + weights.sum(axis=-1, keepdims=True)
        flat = self.sums.shape[:3]
        self.sums = self.sums * before.reshape(*flat, 1) + weights.reshape(*flat, -1) @ values

    def result(self) -> mx.array:
        return self.sums / self.weights.reshape(*self.sums.shape[:3], 1)
