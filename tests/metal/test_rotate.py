"""rotate.metal against rotation.py, and against the dense matrix in float64."""

import mlx.core as mx
import numpy as np
import pytest
from metal.emulator import emulated

from tq.engine.quantize import rotation
from tq.metal.rotate import declines, rotate, split, unrotate, variants

ALLOWED = {mx.float16: 5e-4, mx.bfloat16: 4e-3, mx.float32: 1e-6}
# No transform; 2^k in lanes, in registers, and over SIMD-groups; and m * 2^k of each m, alone and in blocks.
SIZES = [(3, 3), (5, 8), (2, 1024), (1, 8192), (3, 12), (1, 6144), (1, 1792)]


@pytest.mark.usefixtures("metal")
@pytest.mark.parametrize(("rows", "n"), SIZES)
def test_equals_float64(rows, n):
    for variant in variants([mx.float32], [(rows, n)]):
        assert variant.prepare(np.random.default_rng(n)).error() < ALLOWED[mx.float32], variant.label


@pytest.mark.usefixtures("metal")
@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
@pytest.mark.parametrize("n", [64])
def test_types(n, dtype):
    for variant in variants([dtype], [(3, n)]):
        case = variant.prepare(np.random.default_rng(n))
        assert case.launch().dtype == dtype
        assert case.error() < ALLOWED[dtype], variant.label


def test_slices_lie_anywhere_in_memory(emulator):
    with emulated(misalign=1):
        for variant in variants([mx.float16], [(3, 64)]):
            assert variant.prepare(np.random.default_rng(0)).error() < ALLOWED[mx.float16], variant.label


@pytest.mark.usefixtures("metal")
@pytest.mark.parametrize("n", [40, 192])
def test_equals_the_plain_operations_and_goes_back(n):
    signs = mx.array(rotation.random_signs(n))
    x = mx.array(np.random.default_rng(0).standard_normal((2, n)).astype(np.float32))
    block = rotation.hadamard_block(n)
    y = rotate(x, signs, block)
    np.testing.assert_allclose(np.array(y), np.array(rotation.rotate(x, signs)), atol=2e-6)
    back = unrotate(y, signs, block)
    np.testing.assert_allclose(np.array(back), np.array(rotation.unrotate(y, signs)), atol=2e-6)
    np.testing.assert_allclose(np.array(back), np.array(x), atol=2e-6)


def test_the_small_matrices_in_the_text_are_those_of_mlx():
    from tq.metal.kernel import text

    header, _ = text("rotate")
    for m in (12, 20, 28):
        listed = header.split(f"HADAMARD_{m}[{m}] = {{")[1].split("}")[0]
        rows = [int(word, 16) for word in listed.split(",")]
        signs = np.array([[-1 if row >> k & 1 else 1 for k in range(m)] for row in rows])
        np.testing.assert_allclose(signs / np.sqrt(m), rotation.transposed_hadamard(m).T, atol=1e-6)


@pytest.mark.parametrize("n", [64, 2048, 4096, 8192, 5120, 14336, 12288, 10240, 2880, 3072, 11008])
def test_sizes_of_models_fit(n):
    assert declines(n) is None
    m, values, threads = split(rotation.hadamard_block(n))
    assert m * values * threads == rotation.hadamard_block(n)
    # Registers for the block and the product with the small matrix, and a power of two of threads.
    assert m * values <= 32
    assert threads <= 512
    assert threads & (threads - 1) == 0


def test_what_does_not_fit_is_declined_with_its_size():
    assert "28672" in declines(28672)
