"""Rows of packed matrices as floats, against float64 NumPy."""

import numpy as np
import pytest
from hadamard import Rotation
from packed_matrix import PackedMatrix, operate, relative_error

from tq.cpu import library

KINDS = [
    *({"bits": bits, "group": group} for bits in range(1, 9) for group in (0, 32, 64, 128)),
    *({"bits": bits, "group": group, "affine": True} for bits in (2, 3, 4, 5, 6, 8) for group in (0, 32, 64, 128)),
]


def embed(matrix: PackedMatrix, ids: np.ndarray, rotation: Rotation | None = None) -> np.ndarray:
    params = library.EmbedParams(matrix.matrix, rotation.rotation if rotation else library.Rotation())
    return operate(library.library().tq_embed, params, [ids.astype(np.int32)], (*ids.shape, matrix.columns))


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: "-".join(f"{key}{value}" for key, value in kind.items()))
def test_every_kind_of_matrix(kind):
    for rows, columns in [(1, 32), (15, 64), (17, 96), (33, 100), (48, 576)]:
        matrix = PackedMatrix(rows, columns, **kind, seed=columns)
        ids = np.random.default_rng(0).permutation(rows)
        assert relative_error(embed(matrix, ids), matrix.dense[0][ids]) < 1e-6


@pytest.mark.parametrize("columns", [64, 100, 192, 576, 1536])
def test_rows_return_to_their_original_basis(columns):
    matrix, rotation = PackedMatrix(40, columns, 4, group=64), Rotation(columns)
    ids = np.array([[3, 39, 3], [0, 17, 16]])
    rows = embed(matrix, ids, rotation)
    assert relative_error(rows, matrix.dense[0][ids] @ rotation.dense) < 1e-6


def test_many_rows_are_shared_out_over_threads():
    loaded = library.library()
    before = loaded.tq_get_threads()
    matrix, rotation = PackedMatrix(1000, 192, 3, group=64), Rotation(192)
    ids = np.random.default_rng(3).integers(0, 1000, 777)
    expected = matrix.dense[0][ids] @ rotation.dense
    try:
        for threads in (1, 2, 3, 7):
            loaded.tq_set_threads(threads)
            assert relative_error(embed(matrix, ids, rotation), expected) < 1e-6
    finally:
        loaded.tq_set_threads(before)


def test_no_rows():
    assert embed(PackedMatrix(16, 64, 4), np.zeros(0, int)).shape == (0, 64)


def test_nan_and_infinity_stay():
    matrix = PackedMatrix(16, 64, 4, group=32)
    matrix.scales[0, 0, 1, 5], matrix.scales[0, 0, 0, 6] = np.nan, np.inf
    rows = embed(matrix, np.arange(16))
    assert np.isnan(rows[5, 32:]).all() and np.isfinite(rows[5, :32]).all()
    assert np.isinf(rows[6, :32]).all() and np.isfinite(rows[7:]).all()
