"""PackedTensor: which arrays belong to one matrix, and what they take."""

import mlx.core as mx
import pytest

from tq.engine.quantize import PackedTensor, QuantSpec, encode
from tq.engine.quantize.packed import ArrayLayout


def packed(spec, *shape):
    return encode(mx.random.normal(shape, key=mx.random.key(0)), spec)


@pytest.mark.parametrize(
    ("spec", "names"),
    [
        (QuantSpec(bits=3), {"weight", "scales"}),
        (QuantSpec("ternary", 0, rotation="none"), {"weight", "scales"}),
        (QuantSpec("affine"), {"weight", "scales", "biases"}),
        (QuantSpec(bits=2, qjl=True), {"weight", "scales", "qjl_packed", "qjl_norms"}),
    ],
)
def test_arrays_of_one_matrix_have_its_leading_axes(spec, names):
    matrix = packed(spec, 3, 5, 128)
    assert set(matrix.per_matrix_arrays) == names
    assert all(matrix.arrays[name].shape[:2] == (3, 5) for name in names)
    assert all(matrix.arrays[name].ndim == 1 for name in matrix.arrays.keys() - names)


def test_size_counts_every_array():
    matrix = packed(QuantSpec(bits=3), 5, 128)
    assert matrix.in_features == 128
    assert matrix.size_bytes == 5 * 12 * 4 + 5 * 2 * 2 + 8 * 2 + 128 * 2  # words, scales, codebook, signs


def test_layout_of_one_array_knows_its_bytes():
    assert ArrayLayout(mx.uint32, (3, 5, 7)).size_bytes == 3 * 5 * 7 * 4
    assert ArrayLayout(mx.float16, ()).size_bytes == 2


def test_packed_tensors_do_not_change():
    with pytest.raises(AttributeError):
        PackedTensor(QuantSpec(), (1, 64), {}).shape = (2, 64)
