"""matvec.metal: every kind of codes, type and tail, against float64."""

import mlx.core as mx
import numpy as np
import pytest
from metal.emulator import device_requested, emulated

from tq.engine.quantize import packing
from tq.engine.quantize.codebooks import stored_codebook
from tq.metal import matvec as launcher
from tq.metal.fit import FROM_TABLE, QUARTIC, decoding, evaluate
from tq.metal.matvec import arrange, matvec, run_length, variants
from tq.metal.variants import Codes, Matrix, random_matrix, random_rows

# What rounding the result costs, and some float32 sums. How close arithmetic comes to the levels is tested by itself.
ALLOWED = {mx.float16: 4e-4, mx.bfloat16: 2.5e-3, mx.float32: 1e-6}


def codes(bits: int, group_size: int) -> Codes:
    return Codes(bits, group_size, stored_codebook("lloyd-max" if bits else "ternary", bits))


def foreign(bits: int, group_size: int) -> Codes:
    levels = np.random.default_rng(bits).standard_normal(2**bits if bits else 3)
    return Codes(bits, group_size, np.sort(levels))


def as_decoded(matrix: Matrix, dtype: mx.Dtype) -> np.ndarray:
    """The matrix with the levels that a kernel uses, float64."""
    rows, columns = matrix.dense.shape
    decoder = decoding(matrix.codebook, matrix.bits, dtype)
    levels = np.array(decoder.levels, np.float64)
    if decoder.form != FROM_TABLE:
        levels = evaluate(np.array(decoder.levels), decoder.form, matrix.codebook.size).astype(np.float64)
    chosen = np.array(packing.unpack(matrix.weight, matrix.bits, columns))
    scales = np.array(matrix.scales, np.float64)
    return levels[chosen] * np.repeat(scales, columns // scales.shape[1], axis=1)


def check(matrix: Matrix, x: mx.array, exact: np.ndarray, bias: mx.array | None = None) -> None:
    y = matvec(x, *matrix.stored, bias)
    assert y.dtype == x.dtype
    expected = exact @ as_decoded(matrix, x.dtype).T
    if bias is not None:
        expected += np.array(bias.astype(mx.float32), np.float64)
    got = np.array(y.astype(mx.float32), np.float64)
    assert np.linalg.norm(got - expected) <= ALLOWED[x.dtype] * np.linalg.norm(expected)


@pytest.mark.usefixtures("metal")
@pytest.mark.parametrize(
    ("bits", "group", "tokens", "rows", "columns", "dtype"),
    [
        (0, 0, 1, 37, 100, mx.float16),
        (0, 64, 1, 33, 192, mx.bfloat16),
        (0, 32, 3, 5, 96, mx.float32),
        (1, 0, 1, 21, 40, mx.bfloat16),
        (2, 64, 1, 40, 128, mx.float32),
        (2, 0, 1, 5, 39, mx.float16),
        (3, 64, 1, 70, 320, mx.float16),
        (3, 32, 1, 6, 96, mx.bfloat16),
        (3, 0, 2, 9, 57, mx.float32),
        (4, 64, 1, 64, 256, mx.float16),
        (4, 128, 1, 7, 256, mx.bfloat16),
        (4, 0, 1, 3, 23, mx.float32),
        (5, 32, 2, 17, 64, mx.float16),
        (6, 128, 1, 12, 128, mx.float16),
        (7, 0, 1, 11, 30, mx.float16),
        (8, 64, 5, 7, 64, mx.bfloat16),
        (8, 0, 1, 7, 20, mx.float32),
    ],
)
def test_equals_float64(bits, group, tokens, rows, columns, dtype):
    rng = np.random.default_rng(columns)
    matrix = random_matrix(rng, codes(bits, group), (rows, columns))
    check(matrix, *random_rows(rng, (tokens, columns), dtype))


@pytest.mark.usefixtures("metal")
@pytest.mark.parametrize("bits", [3, 4])
def test_stored_levels_are_met_to_two_thousandths(bits):
    # Enough weights that each level is as frequent as it should be. On a GPU, and by `tq doctor`, the same is asked.
    (variant,) = variants([codes(bits, 64)], [mx.float16], [(1, 64, 1024)])
    assert variant.prepare(np.random.default_rng(0)).error() < 2e-3


@pytest.mark.usefixtures("metal")
@pytest.mark.parametrize("tokens", [2, 4, 7, 8, 11])
def test_a_few_rows_read_each_weight_once(tokens):
    rng = np.random.default_rng(tokens)
    check(random_matrix(rng, codes(3, 64), (13, 64)), *random_rows(rng, (tokens, 64), mx.float16))


@pytest.mark.usefixtures("metal")
def test_four_bits_of_quartic_levels():
    v = (np.arange(16) - 7.5) / 8 * 13 / 16
    rng = np.random.default_rng(0)
    matrix = random_matrix(rng, Codes(4, 32, 2.5 * (v + np.abs(v) ** 3 * v)), (6, 96))
    assert decoding(matrix.codebook, 4, mx.float16).form == QUARTIC + 26
    check(matrix, *random_rows(rng, (1, 96), mx.float16))


@pytest.mark.usefixtures("metal")
@pytest.mark.parametrize("bits", [0, 3])
def test_foreign_levels(bits):
    rng = np.random.default_rng(bits)
    check(random_matrix(rng, foreign(bits, 32), (6, 96)), *random_rows(rng, (1, 96), mx.float16))


@pytest.mark.usefixtures("metal")
@pytest.mark.parametrize("bias_type", [mx.float16, mx.float32])
def test_bias(bias_type):
    rng = np.random.default_rng(0)
    bias, _ = random_rows(rng, (10,), bias_type)
    check(random_matrix(rng, codes(2, 0), (10, 32)), *random_rows(rng, (2, 32), mx.float32), bias)


@pytest.mark.usefixtures("metal")
@pytest.mark.parametrize(("bits", "columns"), [(0, 3), (1, 1), (3, 7)])
def test_fewer_elements_than_a_device_array_has(bits, columns):
    # One row of W, one of x, one scale: each goes to constant memory.
    rng = np.random.default_rng(9)
    check(random_matrix(rng, codes(bits, 0), (1, columns)), *random_rows(rng, (1, columns), mx.float32))


@pytest.mark.usefixtures("metal")
@pytest.mark.parametrize(("lanes", "split"), [(4, 4), (8, 1), (32, 8)])
def test_every_arrangement(lanes, split, monkeypatch):
    monkeypatch.setattr(launcher, "arrange", lambda *_: launcher.Arrangement(lanes, split, 0.0))
    rng = np.random.default_rng(lanes)
    check(random_matrix(rng, codes(4, 0), (35, 400)), *random_rows(rng, (2, 400), mx.float16))


@pytest.mark.parametrize(("bits", "group"), [(3, 64), (4, 0)])
def test_slices_lie_anywhere_in_memory(bits, group, kernel_class):
    if device_requested():
        pytest.skip("only the emulator chooses where an input lies")
    rng = np.random.default_rng(4)
    with emulated(misalign=1):
        check(random_matrix(rng, codes(bits, group), (9, 64)), *random_rows(rng, (1, 64), mx.float16))


@pytest.mark.parametrize("columns", [512, 768, 1024, 2880, 5120])
@pytest.mark.parametrize("rows", [4096, 16384])
def test_no_lane_idles_where_there_is_work_for_all(columns, rows):
    assert arrange(65536, columns, 4).idle == 0
    how = arrange(rows, columns, 4)
    assert how.idle <= 1 / 16
    runs = columns // run_length(4)
    assert how.lanes * how.split <= max(runs, 4)


def test_matrices_with_few_rows_are_split():
    assert arrange(256, 4096, 4).split > 1
    assert arrange(32768, 4096, 4).split == 1
