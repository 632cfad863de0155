"""Launches embed.metal: rows of a packed matrix."""

from collections.abc import Iterator, Sequence

import mlx.core as mx
import numpy as np

from tq.metal.fit import decoding
from tq.metal.kernel import Kernel, Launch
from tq.metal.matvec import run_length
from tq.metal.variants import Case, Codes, Variant, random_matrix, type_name

KERNEL = Kernel("embed", ("ids", "w", "scales", "levels"), ("y",))
THREADS = 64  # of a threadgroup


def embed(
    ids: mx.array,
    weight: mx.array,
    scales: mx.array,
    codebook: mx.array,
    bits: int,
    group_size: int,
    in_features: int,
    dtype: mx.Dtype,
) -> mx.array:
    """Rows of W in the rotated basis. ids: uint32 or int32 (n,) -> (n, in_features) of ``dtype``.

    Args:
        weight: Codes, uint32 (rows, words).
        scales: float16 (rows, groups); (rows, 1) for a scale per row.
        codebook: float16 (2^bits,); (3,) for trits.
        bits: 1 to 8; 0 for trits.
        group_size: Columns that share a scale; 0 for all.
    """
    decoder = decoding(codebook, bits, mx.float32)  # exact: nothing here waits for arithmetic
    runs = -(-in_features // run_length(bits))
    launch = Launch(
        {
            "T": dtype,
            "BITS": bits,
            "FORM": decoder.form,
            "TABLE": decoder.table_size,
            "GROUP": group_size,
            "COLUMNS": in_features,
        },
        grid=(-(-runs // THREADS) * THREADS, ids.size, 1),
        threadgroup=(THREADS, 1, 1),
        outputs=[((ids.size, in_features), dtype)],
    )
    return KERNEL([ids, weight, scales, decoder.levels], launch)[0]


def variants(
    codes: Sequence[Codes], dtypes: Sequence[mx.Dtype], shapes: Sequence[tuple[int, int, int]]
) -> Iterator[Variant]:
    """Every combination. shapes: (ids, rows, in_features)."""
    for kind in codes:
        for dtype in dtypes:
            for n, rows, columns in shapes:
                label = f"{kind.label}, {type_name(dtype)}, {n} of {rows}x{columns}"

                def prepare(rng: np.random.Generator, kind=kind, dtype=dtype, shape=(n, rows, columns)) -> Case:
                    n, rows, columns = shape
                    matrix = random_matrix(rng, kind, (rows, columns))
                    ids = rng.integers(0, rows, n).astype(np.uint32)
                    read = matrix.size_bytes * n // rows
                    return Case(
                        lambda: embed(mx.array(ids), *matrix.stored, columns, dtype),
                        matrix.dense[ids],
                        read + n * columns * dtype.size,
                    )

                yield Variant("embed", label, dtype, prepare)
