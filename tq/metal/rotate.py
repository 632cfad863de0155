"""Launches rotate.metal: the randomized Hadamard rotation and its inverse, signs included."""

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from tq.engine.quantize.rotation import HADAMARD_FACTORS, hadamard_block, random_signs, transposed_hadamard
from tq.metal.kernel import Kernel, Launch
from tq.metal.variants import Case, Variant, random_rows, type_name

KERNEL = Kernel("rotate", ("x", "signs"), ("y",))
# Values of each row of P that a thread may hold; M times as many registers, twice that while it multiplies by H_M.
MOST_VALUES = {1: 16, 12: 2, 20: 1, 28: 1}
MOST_THREADS = 512  # with those registers


class Split(NamedTuple):
    """A block of features = m * values * threads: how a threadgroup holds it."""

    m: int
    values: int
    threads: int


def split(block: int) -> Split:
    """How ``block`` = m * 2^k features are held."""
    m = next(m for m in HADAMARD_FACTORS if block % m == 0 and (block // m) & (block // m - 1) == 0)
    power = block // m
    values = min(MOST_VALUES[m], max(1, power // 32))
    return Split(m, values, power // values)


def declines(n: int) -> str | None:
    """None, or why ``n`` features are not rotated here."""
    block = hadamard_block(n)
    if split(block).threads <= MOST_THREADS:
        return None
    return f"a Hadamard block of {block} features does not fit into one threadgroup"


def rotate(x: mx.array, signs: mx.array, block: int) -> mx.array:
    """y = H (signs * x) in blocks of ``block`` features. x: (rows, n), signs: (n,) of any float type."""
    return KERNEL([x, signs], _launch(x.shape, x.dtype, block, False))[0]


def unrotate(y: mx.array, signs: mx.array, block: int) -> mx.array:
    """The inverse: x = signs * (H^T y)."""
    return KERNEL([y, signs], _launch(y.shape, y.dtype, block, True))[0]


@lru_cache(maxsize=1024)
def _launch(shape: tuple[int, int], dtype: mx.Dtype, block: int, inverse: bool) -> Launch:
    how = split(block)
    copies = max(1, 32 // how.threads)  # blocks of a threadgroup
    blocks = shape[0] * shape[1] // block
    threads = copies * how.threads
    return Launch(
        {
            "T": dtype,
            "M": how.m,
            "V": how.values,
            "THREADS": how.threads,
            "COPIES": copies,
            "INVERSE": inverse,
        },
        grid=(-(-blocks // copies) * threads, 1, 1),
        threadgroup=(threads, 1, 1),
        outputs=[(shape, dtype)],
    )


def transform(x: np.ndarray, transposed: bool = False) -> np.ndarray:
    """H x, or H^T x, in float64. x: (rows, n)."""
    shape, block = x.shape, hadamard_block(x.shape[-1])
    m = split(block).m
    x = x.reshape(-1, m, block // m)
    if m > 1:
        matrix = transposed_hadamard(m).astype(np.float64)
        x = (matrix if transposed else matrix.T) @ x
    for half in (2**k for k in range((block // m).bit_length() - 1)):
        pairs = x.reshape(-1, 2, half)
        x = np.stack([pairs[:, 0] + pairs[:, 1], pairs[:, 0] - pairs[:, 1]], axis=1) / np.sqrt(2)
    return x.reshape(shape)


def variants(dtypes: Sequence[mx.Dtype], shapes: Sequence[tuple[int, int]]) -> Iterator[Variant]:
    """Every combination, there and back. shapes: (rows, n)."""
    for dtype in dtypes:
        for rows, n in shapes:
            for inverse in (False, True):
                label = f"{'unrotate' if inverse else 'rotate'}, {type_name(dtype)}, {rows}x{n}"

                def prepare(rng: np.random.Generator, dtype=dtype, rows=rows, n=n, inverse=inverse) -> Case:
                    x, values = random_rows(rng, (rows, n), dtype)
                    signs = random_signs(n)
                    given = mx.array(signs).astype(dtype)
                    expected = transform(values, True) * signs if inverse else transform(values * signs)
                    run = unrotate if inverse else rotate
                    return Case(lambda: run(x, given, hadamard_block(n)), expected, 2 * x.nbytes + given.nbytes)

                yield Variant("rotate", label, dtype, prepare)
