"""Launches matvec.metal: a packed matrix times one row (decode) or a few (speculation, small batches)."""

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from tq.metal.fit import decoding
from tq.metal.kernel import Kernel, Launch
from tq.metal.variants import Case, Codes, Variant, random_matrix, random_rows, type_name

KERNEL = Kernel("matvec", ("x", "w", "scales", "levels", "bias"), ("y",))
# Rows of x up to which registers are best: a weight costs 4 to 7 cycles to decode, and per row one and half a load
# (benchmarks/metal_budget.json: 15 and 17 cycles in all for 8 rows of 3 and 4 bits). A tile of matmul.metal stores and
# loads each weight in threadgroup memory, about 16 cycles with its decoding, and 8 rows take the 8x8 product 9 more.
MOST_ROWS = 8
ROWS = 4  # of W, that share the activations in registers
# SIMD-groups that keep a large GPU busy (40 cores with 4 schedulers each, 4 waiting for memory on each).
ENOUGH = 640
# What a SIMD-group does once, in units of a step of its loop.
OVERHEAD = 0.2
# What shorter reads of neighbouring lanes cost: a guess, that breaks ties.
SHORT_READS = {32: 1.0, 16: 1.005, 8: 1.01, 4: 1.015}


class Arrangement(NamedTuple):
    """How lanes share the work.

    Attributes:
        lanes: Neighbouring lanes that share rows of W.
        split: SIMD-groups of a threadgroup that share them.
        idle: The share of the lanes' steps in which they have no columns left.
    """

    lanes: int
    split: int
    idle: float

    @property
    def simd_groups(self) -> int:
        """Of a threadgroup."""
        return max(2, self.split)


def arrange(out_features: int, in_features: int, bits: int) -> Arrangement:
    """The arrangement of the least time: steps of the loop, times the SIMD-groups that wait for their turn."""
    runs = -(-in_features // run_length(bits))

    def cost(lanes: int, split: int) -> float:
        steps = -(-runs // (lanes * split))
        simd_groups = -(-out_features // (ROWS * 32 // lanes)) * split
        return (steps + OVERHEAD) * max(1.0, simd_groups / ENOUGH) * SHORT_READS[lanes]

    lanes, split = min(((lanes, split) for split in (1, 2, 4, 8) for lanes in SHORT_READS), key=lambda a: cost(*a))
    steps = -(-runs // (lanes * split))
    return Arrangement(lanes, split, 1 - runs / (steps * lanes * split))


def run_length(bits: int) -> int:
    """Columns that a lane takes at once: codes.metal."""
    return 16 if bits else 20


def matvec(
    x: mx.array,
    weight: mx.array,
    scales: mx.array,
    codebook: mx.array,
    bits: int,
    group_size: int,
    bias: mx.array | None = None,
) -> mx.array:
    """x (tokens, in) @ W^T + bias -> (tokens, out), of the type of x. For up to MOST_ROWS tokens; more is correct.

    Args:
        weight: Codes, uint32 (out, words).
        scales: float16 (out, groups); (out, 1) for a scale per row.
        codebook: float16 (2^bits,); (3,) for trits.
        bits: 1 to 8; 0 for trits.
        group_size: Columns that share a scale; 0 for all.
        bias: (out,) of any float type.
    """
    tokens, columns = x.shape
    decoder = decoding(codebook, bits, x.dtype)
    codes = bits, group_size, decoder.form, decoder.table_size
    # A kernel has all of its inputs: scales stand in for a bias, which is not read then.
    inputs = [x, weight, scales, decoder.levels, scales if bias is None else bias]
    return KERNEL(inputs, _launch(tokens, columns, weight.shape[0], x.dtype, codes, bias is not None))[0]


@lru_cache(maxsize=4096)
def _launch(
    tokens: int, columns: int, rows: int, dtype: mx.Dtype, codes: tuple[int, int, int, int], bias: bool
) -> Launch:
    bits, group_size, form, table_size = codes
    how = arrange(rows, columns, bits)
    together = min(MOST_ROWS, 1 << (tokens - 1).bit_length())
    sets = how.simd_groups // how.split * (32 // how.lanes)  # of ROWS rows, in a threadgroup
    threads = 32 * how.simd_groups
    return Launch(
        {
            "T": dtype,
            "BITS": bits,
            "FORM": form,
            "TABLE": table_size,
            "GROUP": group_size,
            "WHOLE": columns % run_length(bits) == 0,
            "M": together,
            "ROWS": ROWS,
            "LK": how.lanes,
            "SPLIT": how.split,
            "SIMD_GROUPS": how.simd_groups,
            "BIAS": bias,
        },
        grid=(-(-rows // (sets * ROWS)) * threads, -(-tokens // together), 1),
        threadgroup=(threads, 1, 1),
        outputs=[((tokens, rows), dtype)],
    )


def variants(
    codes: Sequence[Codes], dtypes: Sequence[mx.Dtype], shapes: Sequence[tuple[int, int, int]], bias: bool = False
) -> Iterator[Variant]:
    """Every combination. shapes: (tokens, out, in), with ``in`` a multiple of the groups."""
    for kind in codes:
        for dtype in dtypes:
            for tokens, rows, columns in shapes:
                label = f"{kind.label}, {type_name(dtype)}, {tokens} of {rows}x{columns}{', bias' * bias}"

                def prepare(rng: np.random.Generator, kind=kind, dtype=dtype, shape=(tokens, rows, columns)) -> Case:
                    tokens, rows, columns = shape
                    matrix = random_matrix(rng, kind, (rows, columns))
                    x, exact = random_rows(rng, (tokens, columns), dtype)
                    added, added_exact = random_rows(rng, (rows,), dtype) if bias else (None, 0.0)
                    return Case(
                        lambda: matvec(x, *matrix.stored, added),
                        exact @ matrix.dense.T + added_exact,
                        matrix.size_bytes + x.nbytes + tokens * rows * dtype.size,
                    )

                yield Variant("matvec", label, dtype, prepare)
