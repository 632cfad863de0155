"""Products with packed matrices against float64 NumPy, which decodes the same codes."""

import itertools
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from packed_matrix import PackedMatrix, operate, quantized, relative_error

from tq.cpu import library

# Every width with each way to scale, and what else a matrix may have.
KINDS = [
    *({"bits": bits, "group": group} for bits in range(1, 9) for group in (0, 32, 64, 128)),
    *({"bits": bits, "group": group, "affine": True} for bits in (2, 3, 4, 8) for group in (0, 32, 64, 128)),
    *({"bits": bits, "group": group, "low": True} for bits in (7, 8) for group in (0, 32, 64, 128)),
]
SHAPES = [(1, 32), (15, 64), (17, 96), (33, 100), (48, 576), (40, 1000)]


def name_of(kind: dict) -> str:
    return "-".join(f"{key}{value}" for key, value in kind.items())


def multiply(matrix: PackedMatrix, x: np.ndarray, *, exact: bool) -> np.ndarray:
    params = library.MatmulParams(matrix.matrix, exact)
    return operate(library.library().tq_matmul, params, [x], (len(x), matrix.rows))


def check(matrix: PackedMatrix, x: np.ndarray) -> None:
    bias = 0 if matrix.bias is None else matrix.bias[0]
    exact = multiply(matrix, x, exact=True)
    expected = x.astype(np.float64) @ matrix.dense[0].T
    assert exact.shape == expected.shape
    assert relative_error(exact.astype(np.float64) - bias, expected) <= 1e-5
    with_codes = quantized(x) @ matrix.dense_bytes[0].T
    rounded = multiply(matrix, x, exact=False)
    # The same arithmetic in float64: what differs is float32 sums, and a code or two that lie on the edge.
    assert relative_error(rounded.astype(np.float64) - bias, with_codes) <= 5e-4


@pytest.mark.parametrize("kind", KINDS, ids=name_of)
def test_every_kind_of_matrix_and_number_of_rows(kind):
    random = np.random.default_rng(1)
    for i, (rows, columns) in enumerate(SHAPES):
        matrix = PackedMatrix(rows, columns, **kind, bias=i % 2 == 1, seed=i)
        for tokens in (1, 2, 3, 8, 17):
            check(matrix, random.standard_normal((tokens, columns)).astype(np.float32))


@pytest.mark.parametrize("tokens", [0, 1, 2, 3, 4, 5, 7, 8, 9, 16, 17, 33, 100])
def test_numbers_of_rows(tokens):
    random = np.random.default_rng(2)
    for (rows, columns), bits in itertools.product([(33, 100), (161, 1000)], (3, 4)):
        check(PackedMatrix(rows, columns, bits, group=64), random.standard_normal((tokens, columns)).astype(np.float32))


@pytest.mark.parametrize("kind", [{"group": 0}, {"group": 32}, {"group": 64, "low": True}], ids=name_of)
def test_more_columns_than_are_decoded_at_once(kind):
    matrix = PackedMatrix(37, 8400, 8 if "low" in kind else 4, **kind)
    random = np.random.default_rng(8)
    for tokens in (1, 2, 40):
        check(matrix, random.standard_normal((tokens, 8400)).astype(np.float32))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_error_of_8_bit_activations(bits):
    random = np.random.default_rng(3)
    matrix = PackedMatrix(96, 1024, bits, group=64, low=bits == 8)
    for tokens in (1, 20):
        x = random.standard_normal((tokens, 1024)).astype(np.float32)
        assert relative_error(multiply(matrix, x, exact=False), x.astype(np.float64) @ matrix.dense[0].T) <= 0.01


@pytest.mark.parametrize("tokens", [1, 5, 40])
@pytest.mark.parametrize("exact", [True, False])
def test_what_is_not_a_number_stays_in_its_row(tokens, exact):
    matrix = PackedMatrix(33, 200, 4, group=64)
    x = np.random.default_rng(4).standard_normal((tokens, 200)).astype(np.float32)
    clean = multiply(matrix, x, exact=exact)
    for bad in (np.nan, np.inf, -np.inf):
        broken = x.copy()
        broken[tokens // 2, 199] = bad
        result = multiply(matrix, broken, exact=exact)
        assert not np.isfinite(result[tokens // 2]).any()
        if np.isnan(bad) or not exact:
            assert np.isnan(result[tokens // 2]).all()
        others = np.arange(tokens) != tokens // 2
        np.testing.assert_array_equal(result[others], clean[others])


@pytest.mark.parametrize("tokens", [1, 9, 40])
def test_activations_of_any_size(tokens):
    matrix = PackedMatrix(33, 256, 4, group=64)
    x = np.random.default_rng(5).standard_normal((tokens, 256)).astype(np.float32)
    # Zeros, denormals that vanish, the smallest block that does not, and one close to what a float can hold.
    sizes = np.repeat(np.array([0, 1e-42, 1e-35, 1e34], np.float32), 64)
    for columns in (slice(0, 64), slice(64, 128), slice(128, 192), slice(192, 256)):
        part = np.zeros_like(x)
        part[:, columns] = (x * sizes)[:, columns]
        if columns.start < 128:
            np.testing.assert_array_equal(multiply(matrix, part, exact=False), 0)
        else:
            check(matrix, part)


def test_weights_at_the_ends_of_a_byte():
    """Bytes 0 and 255 with activations of both signs: where products of bytes may overflow an instruction."""
    for offset, columns in itertools.product((0, 128), (64, 1024)):
        matrix = PackedMatrix(32, columns, 8)
        matrix.table[:], matrix.table_scale, matrix.offset = np.arange(256), 1.0, offset
        matrix.packed[: len(matrix.packed) // 2] = 0  # the first tile; the second is all ones
        matrix.packed[len(matrix.packed) // 2 :] = 255
        bytes_of_rows = np.repeat([0.0, 255.0], 16) - offset
        for sign in (1, -1):
            for tokens in (1, 3, 40):
                x = np.full((tokens, columns), sign, np.float32)
                scale = matrix.scales[0].astype(np.float64).ravel()
                expected = np.tile(bytes_of_rows * scale * columns * sign, (tokens, 1))
                np.testing.assert_allclose(multiply(matrix, x, exact=False), expected, rtol=1e-5)


def test_several_threads_may_multiply_at_once():
    matrix = PackedMatrix(160, 512, 4, group=64)
    x = np.random.default_rng(6).standard_normal((16, 512)).astype(np.float32)
    alone = [multiply(matrix, x[:rows], exact=False) for rows in range(1, 17)]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(10):
            together = pool.map(lambda rows: multiply(matrix, x[:rows], exact=False), range(1, 17))
            for mine, theirs in zip(alone, together, strict=True):
                np.testing.assert_array_equal(mine, theirs)


def test_the_number_of_threads_changes_nothing():
    kernels = library.library()
    before = kernels.tq_get_threads()
    matrices = [PackedMatrix(rows, 320, 4, group=64) for rows in (1, 16, 250, 1000)]
    x = np.random.default_rng(7).standard_normal((33, 320)).astype(np.float32)
    try:
        results = []
        for threads in (1, 2, 3, 8):
            kernels.tq_set_threads(threads)
            results.append([multiply(m, x[:rows], exact=False) for m in matrices for rows in (1, 33)])
    finally:
        kernels.tq_set_threads(before)
    for result in results[1:]:
        for mine, theirs in zip(results[0], result, strict=True):
            np.testing.assert_array_equal(mine, theirs)
