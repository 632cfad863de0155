"""Products of rows with the matrices of their experts against float64 NumPy."""

import numpy as np
import pytest
from packed_matrix import PackedMatrix, operate, quantized, relative_error

from tq.cpu import library

EXPERTS = 7


def gather(matrix: PackedMatrix, x: np.ndarray, experts: np.ndarray, *, exact: bool) -> np.ndarray:
    params = library.GatherParams(matrix.matrix, exact)
    return operate(library.library().tq_gather_matmul, params, [x, experts], (*experts.shape, matrix.rows))


def expected(matrix: PackedMatrix, dense: np.ndarray, x: np.ndarray, experts: np.ndarray) -> np.ndarray:
    rows = np.repeat(x.astype(np.float64), experts.size // len(x) if len(x) else 0, axis=0)
    products = np.einsum("rc,rnc->rn", rows, dense[experts.ravel()])
    if matrix.bias is not None:
        products = products + matrix.bias[experts.ravel()]
    return products.reshape(*experts.shape, matrix.rows)


def check(matrix: PackedMatrix, x: np.ndarray, experts: np.ndarray) -> None:
    exact = gather(matrix, x, experts, exact=True)
    assert relative_error(exact, expected(matrix, matrix.dense, x, experts)) <= 1e-5
    rounded = gather(matrix, x, experts, exact=False)
    assert relative_error(rounded, expected(matrix, matrix.dense_bytes, quantized(x), experts)) <= 5e-4


KINDS = [
    {"bits": 4, "group": 64},
    {"bits": 4, "group": 64, "affine": True},
    {"bits": 3, "group": 0},
    {"bits": 2, "group": 32},
    {"bits": 6, "group": 128, "bias": True},
    {"bits": 8, "group": 64, "low": True},
]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: "-".join(f"{key}{value}" for key, value in kind.items()))
def test_rows_meet_their_experts(kind):
    random = np.random.default_rng(0)
    matrix = PackedMatrix(33, 100, **kind, experts=EXPERTS)
    for tokens, per_token in [(1, 1), (1, 3), (2, 2), (5, 4), (40, 2), (100, 1)]:
        x = random.standard_normal((tokens, 100)).astype(np.float32)
        check(matrix, x, random.integers(0, EXPERTS, (tokens, per_token), dtype=np.uint32))


def test_all_rows_may_go_to_one_expert():
    matrix = PackedMatrix(48, 192, 4, group=64, experts=EXPERTS)
    x = np.random.default_rng(1).standard_normal((37, 192)).astype(np.float32)
    check(matrix, x, np.full((37, 1), EXPERTS - 1, np.uint32))


def test_rows_that_arrive_sorted_or_not_give_the_same():
    random = np.random.default_rng(2)
    matrix = PackedMatrix(48, 192, 3, group=64, experts=EXPERTS)
    x = random.standard_normal((64, 192)).astype(np.float32)
    experts = np.sort(random.integers(0, EXPERTS, 64, dtype=np.uint32))
    order = random.permutation(64)
    together = gather(matrix, x, experts, exact=False)
    np.testing.assert_array_equal(gather(matrix, x[order], experts[order], exact=False), together[order])


def test_an_expert_that_is_not_asked_for_is_not_read():
    matrix = PackedMatrix(17, 64, 4, group=64, experts=3)
    x = np.random.default_rng(3).standard_normal((9, 64)).astype(np.float32)
    experts = np.tile(np.array([0, 2], np.uint32), (9, 1))
    before = gather(matrix, x, experts, exact=False)
    matrix.scales[1] = np.nan
    matrix.packed[len(matrix.packed) // 3 : 2 * len(matrix.packed) // 3] = 255
    np.testing.assert_array_equal(gather(matrix, x, experts, exact=False), before)


def test_no_rows_at_all():
    matrix = PackedMatrix(17, 64, 4, experts=2)
    for exact in (True, False):
        none = gather(matrix, np.zeros((0, 64), np.float32), np.zeros((0, 2), np.uint32), exact=exact)
        assert none.shape == (0, 2, 17)
