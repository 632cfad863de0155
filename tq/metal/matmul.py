"""Launches matmul.metal: a packed matrix times many rows (a prompt)."""

from collections.abc import Iterator, Sequence
from itertools import product

import mlx.core as mx
import numpy as np

from tq.metal.fit import decoding
from tq.metal.kernel import Kernel, Launch
from tq.metal.matvec import run_length
from tq.metal.variants import Case, Codes, Variant, random_matrix, random_rows, type_name

KERNEL = Kernel("matmul", ("x", "w", "scales", "levels", "bias"), ("y",))
THREADS = 128  # of a threadgroup, TILE_THREADS of tile.metal
# Threadgroups that keep a large GPU busy: with fewer, tiles are made smaller.
ENOUGH = 128


def tile_shape(rows: int, out_features: int) -> tuple[int, int]:
    """(BM, BN): rows of x and of W of a tile.

    A weight is decoded once for BM rows, so that larger is better, until threadgroups are too few for the GPU.
    """
    bm = 64 if rows > 32 else 32
    bn = 64 if -(-rows // bm) * -(-out_features // 64) >= ENOUGH else 32
    return bm, bn


def matmul(
    x: mx.array,
    weight: mx.array,
    scales: mx.array,
    codebook: mx.array,
    bits: int,
    group_size: int,
    bias: mx.array | None = None,
) -> mx.array:
    """x (rows, in) @ W^T + bias -> (rows, out), of the type of x.

    Args:
        weight: Codes, uint32 (out, words).
        scales: float16 (out, groups); (out, 1) for a scale per row.
        codebook: float16 (2^bits,); (3,) for trits.
        bits: 1 to 8; 0 for trits.
        group_size: Columns that share a scale; 0 for all.
        bias: (out,) of any float type.
    """
    rows, out_features = x.shape[0], weight.shape[0]
    bm, bn = tile_shape(rows, out_features)
    how = decoding(codebook, bits, x.dtype)
    launch = Launch(
        {
            "T": x.dtype,
            "BITS": bits,
            "GROUP": group_size,
            "FORM": how.form,
            "TABLE": how.table_size,
            "WHOLE": x.shape[1] % run_length(bits) == 0,
            "BM": bm,
            "BN": bn,
            "BIAS": bias is not None,
        },
        grid=(-(-rows // bm) * THREADS, -(-out_features // bn), 1),
        threadgroup=(THREADS, 1, 1),
        outputs=[((rows, out_features), x.dtype)],
    )
    return KERNEL([x, weight, scales, how.levels, scales if bias is None else bias], launch)[0]


def variants(
    codes: Sequence[Codes], dtypes: Sequence[mx.Dtype], shapes: Sequence[tuple[int, int, int]], bias: bool = False
) -> Iterator[Variant]:
    """Every combination. shapes: (rows, out, in), with ``in`` a multiple of the groups."""
    for kind, dtype, shape in product(codes, dtypes, shapes):

        def prepare(rng: np.random.Generator, kind=kind, dtype=dtype, shape=shape) -> Case:
            rows, out_features, columns = shape
            matrix = random_matrix(rng, kind, (out_features, columns))
            x, exact = random_rows(rng, (rows, columns), dtype)
            added, added_exact = random_rows(rng, (out_features,), dtype) if bias else (None, 0.0)
            return Case(
                lambda: matmul(x, *matrix.stored, added),
                exact @ matrix.dense.T + added_exact,
                matrix.size_bytes + x.nbytes + rows * out_features * dtype.size,
            )

        label = f"{kind.label}, {type_name(dtype)}, {shape[0]} of {shape[1]}x{shape[2]}{', bias' * bias}"
        yield Variant("matmul", label, dtype, prepare)
