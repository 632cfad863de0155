"""The backend of the CPU kernels against float64 NumPy: all codes, with float32 and with 8-bit activations."""

import threading

import mlx.core as mx
import numpy as np
import pytest
from engine.ops.test_ops import dense, each_gather, held, naive_gather, pack, samples

from tq.engine import ops
from tq.engine.ops import cpu
from tq.engine.ops.prepared import affine_table, codebook_table
from tq.engine.quantize import PackedTensor, QuantSpec, decode_rotated, rotation, shared_arrays
from tq.engine.quantize.codebooks import mean_square_error, stored_codebook
from tq.engine.quantize.spec import CODEC_BITS

pytestmark = pytest.mark.skipif(cpu.unavailable() is not None, reason=f"no CPU kernels here: {cpu.unavailable()}")

SPECS = [
    *(QuantSpec("lloyd-max", bits, group) for bits in CODEC_BITS["lloyd-max"] for group in (32, 64, 128, 0)),
    *(QuantSpec("ternary", 0, group) for group in (32, 64, 128, 0)),
    *(QuantSpec("affine", bits, group) for bits in CODEC_BITS["affine"] for group in (32, 64, 128)),
    QuantSpec("lloyd-max", 4, 64, "none"),
    QuantSpec("affine", 4, 64, "none"),
]
FEW = [
    QuantSpec("lloyd-max", 3, 32),
    QuantSpec("lloyd-max", 8, 0),
    QuantSpec("ternary", 0, 32),
    QuantSpec("affine", 5, 32),
]
EXACT, INT8 = 1e-5, 0.01
by_label = pytest.mark.parametrize("spec", SPECS, ids=QuantSpec.label)
few_by_label = pytest.mark.parametrize("spec", FEW, ids=QuantSpec.label)


@pytest.fixture(params=[EXACT, INT8], ids=["exact", "int8"])
def bound(request, monkeypatch):
    """The largest relative error, with float32 and with 8-bit activations."""
    monkeypatch.setenv("TQ_CPU_EXACT", "1" if request.param == EXACT else "0")
    return request.param


def relative_error(found, expected):
    found, expected = np.array(found, np.float64), np.array(expected, np.float64)
    assert found.shape == expected.shape
    return np.sqrt(((found - expected) ** 2).mean() / (expected**2).mean())


def in_features(spec):
    """A multiple of the group, but not of the 64 columns of a block if that can be."""
    return {32: 352, 64: 320, 128: 384, 0: 300}[spec.group_size]


class TestMatmul:
    @by_label
    @pytest.mark.parametrize("lead", [(), (1,), (3, 1), (2, 5), (1, 37)], ids=str)
    def test_products(self, spec, bound, lead):
        n = in_features(spec)
        packed, x = pack(spec, 72, n), samples(*lead, n)
        found = cpu.matmul(mx.array(x), cpu.prepare(packed))
        assert found.dtype == mx.float32
        # 72 outputs are few: chance adds to the error of 8 bits.
        assert relative_error(found, x @ dense(packed).T) < (bound if bound == EXACT else 1.5 * bound)

    @few_by_label
    @pytest.mark.parametrize("rows", [1, 15, 17])
    def test_rows_that_fill_no_tile(self, spec, bound, rows):
        n = in_features(spec)
        packed, x = pack(spec, rows, n), samples(64, n)
        assert relative_error(cpu.matmul(mx.array(x), cpu.prepare(packed)), x @ dense(packed).T) < bound

    @few_by_label
    def test_the_bias_of_the_layer_is_in_the_product(self, spec, bound):
        n, bias = in_features(spec), samples(33, seed=5)
        packed, x = pack(spec, 33, n), samples(40, n)
        prepared = cpu.prepare(packed, mx.array(bias).astype(mx.float16))
        expected = x @ dense(packed).T + bias.astype(np.float16)
        assert prepared.prepared.has_bias
        assert relative_error(cpu.matmul(mx.array(x), prepared), expected) < bound

    @few_by_label
    def test_one_matrix_per_head(self, spec, bound):
        n = in_features(spec)
        packed = pack(spec, 3, 21, n)
        w, prepared = dense(packed), cpu.prepare(packed)
        for shape in ((2, 3, 4, n), (2, 1, 4, n), (3, 4, n), (1, n)):
            x = samples(*shape)
            assert relative_error(cpu.matmul(mx.array(x), prepared), x @ w.swapaxes(-1, -2)) < bound

    @few_by_label
    def test_one_matrix_for_all_heads(self, spec, bound):
        n = in_features(spec)
        packed, x = pack(spec, 1, 21, n), samples(2, 3, 4, n)
        assert relative_error(cpu.matmul(mx.array(x), cpu.prepare(packed)), x @ dense(packed).swapaxes(-1, -2)) < bound

    @few_by_label
    def test_products_with_the_matrix_that_is_not_transposed(self, spec):
        n = in_features(spec)
        packed, heads = pack(spec, 21, n), pack(spec, 3, 21, n)
        x, y = samples(2, 5, 21), samples(2, 3, 4, 21)
        assert relative_error(cpu.matmul(mx.array(x), cpu.prepare(packed), False), x @ dense(packed)) < EXACT
        assert relative_error(cpu.matmul(mx.array(y), cpu.prepare(heads), False), y @ dense(heads)) < EXACT

    def test_no_rows_give_no_rows(self):
        prepared, experts = cpu.prepare(pack(FEW[0], 21, 352)), cpu.prepare(pack(FEW[0], 3, 21, 352))
        assert cpu.matmul(mx.zeros((2, 0, 352)), prepared).shape == (2, 0, 21)
        assert cpu.matmul(mx.zeros((2, 3, 0, 352)), experts).shape == (2, 3, 0, 21)
        assert cpu.gather_matmul(mx.zeros((0, 1, 352)), experts, mx.zeros((0,), mx.uint32)).shape == (0, 1, 21)
        assert cpu.embed(mx.zeros((2, 0), mx.int32), prepared, mx.float32).shape == (2, 0, 352)

    @few_by_label
    @pytest.mark.parametrize("bad", [np.nan, np.inf])
    def test_what_is_not_finite_stays_visible(self, spec, bound, bad):
        n = in_features(spec)
        packed, x = cpu.prepare(pack(spec, 21, n)), samples(3, n)
        x[1, 7] = bad
        found = np.array(cpu.matmul(mx.array(x), packed))
        assert not np.isfinite(found[1]).any()
        assert np.isfinite(found[[0, 2]]).all()

    @few_by_label
    @pytest.mark.parametrize("size", [1e-30, 1e30])
    def test_tiny_and_huge_activations(self, spec, bound, size):
        n = in_features(spec)
        packed, x = pack(spec, 72, n), samples(8, n) * np.float32(size)
        found = np.array(cpu.matmul(mx.array(x), cpu.prepare(packed)), np.float64) / size
        assert relative_error(found, (x / np.float64(size)) @ dense(packed).T) < bound


class TestExperts:
    @few_by_label
    @each_gather
    def test_every_row_goes_to_its_expert(self, spec, bound, shape, indices, is_sorted):
        n = in_features(spec)
        packed, x, indices = pack(spec, 7, 40, n), samples(*shape[:-1], n), np.array(indices)
        found = cpu.gather_matmul(mx.array(x), cpu.prepare(packed), mx.array(indices), is_sorted)
        assert relative_error(found, naive_gather(x, dense(packed), indices)) < bound

    @few_by_label
    def test_the_bias_of_each_expert(self, spec, bound):
        n, bias = in_features(spec), samples(4, 21, seed=5)
        packed, x, indices = pack(spec, 4, 21, n), samples(9, 1, n), np.array([3, 0, 1, 1, 2, 0, 3, 3, 1])
        found = cpu.gather_matmul(mx.array(x), cpu.prepare(packed, mx.array(bias)), mx.array(indices))
        assert relative_error(found, naive_gather(x, dense(packed), indices) + bias[indices][:, None]) < bound

    def test_one_choice_for_many_rows(self, bound):
        packed, x, indices = pack(FEW[0], 7, 40, 352), samples(6, 2, 1, 352), np.array([[5, 0]])
        found = cpu.gather_matmul(mx.array(x), cpu.prepare(packed), mx.array(indices))
        expected = naive_gather(x, dense(packed), np.broadcast_to(indices, (6, 2)))
        assert relative_error(found, expected) < bound

    def test_one_row_for_all(self, bound):
        packed, x, indices = pack(FEW[0], 7, 40, 352), samples(1, 352), np.array([[5, 0], [1, 6], [2, 2]])
        found = cpu.gather_matmul(mx.array(x), cpu.prepare(packed), mx.array(indices))
        assert relative_error(found, naive_gather(x[None, None], dense(packed), indices)) < bound


@by_label
@pytest.mark.parametrize("ids", [3, [0, 72, 3, 3], [[1, 2, 3], [10, 9, 8]]], ids=str)
def test_rows_of_an_embedding(spec, ids):
    packed = pack(spec, 73, in_features(spec))
    found = cpu.embed(mx.array(ids), cpu.prepare(packed), mx.float32)
    assert relative_error(found, dense(packed)[np.array(ids)]) < EXACT


@by_label
def test_what_was_prepared_can_be_decoded(spec):
    for shape in ((73, in_features(spec)), (3, 21, in_features(spec))):
        packed = pack(spec, *shape)
        prepared = cpu.prepare(packed)
        assert prepared.per_matrix_arrays == []
        assert relative_error(decode_rotated(prepared), dense(packed)) < 1e-6


@few_by_label
@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_results_have_the_type_of_the_activation(spec, dtype):
    n = in_features(spec)
    packed, experts = cpu.prepare(pack(spec, 5, n)), cpu.prepare(pack(spec, 3, 5, n))
    x = mx.array(samples(2, n)).astype(dtype)
    turn = cpu.prepare_rotation(shared_arrays(QuantSpec(), n)["signs"])
    assert cpu.matmul(x, packed).dtype == dtype
    assert cpu.matmul(x, experts).dtype == dtype
    assert cpu.matmul(mx.zeros((2, 5), dtype), packed, False).dtype == dtype
    assert cpu.embed(mx.array([1]), packed, dtype).dtype == dtype
    assert cpu.gather_matmul(x[:, None], experts, mx.array([0, 2])).dtype == dtype
    assert cpu.rotate(x, turn).dtype == cpu.unrotate(x, turn).dtype == dtype


class TestRotation:
    # Blocks of 2^k, of m * 2^k with each m, several blocks, no block at all.
    @pytest.mark.parametrize("n", [64, 96, 160, 576, 1536, 2880, 33, 12, 28, 7 * 64, 8192])
    def test_rotations_are_those_of_the_reference(self, n):
        signs = mx.array(rotation.random_signs(n)).astype(mx.float16)
        prepared, x = cpu.prepare_rotation(signs), mx.array(samples(3, 2, n))
        turned = rotation.rotate(x, signs)
        assert relative_error(ops.rotate(x, signs, prepared), turned) < EXACT
        assert relative_error(ops.unrotate(turned, signs, prepared), x) < EXACT

    def test_no_rows_give_no_rows(self):
        prepared = cpu.prepare_rotation(mx.ones(64))
        assert cpu.rotate(mx.zeros((2, 0, 64)), prepared).shape == (2, 0, 64)


class TestTables:
    @pytest.mark.parametrize("bits", CODEC_BITS["lloyd-max"])
    def test_bytes_add_little_to_the_error_of_the_code(self, bits):
        levels = stored_codebook("lloyd-max", bits)
        table = codebook_table(tuple(levels.tolist()))
        byte = table.high.astype(float) - table.offset
        low = 0 if table.low is None else (table.low.astype(float) - 128) / 256
        found = ((byte + low) * table.scale)[: len(levels)]
        assert mean_square_error(found) < 1.1 * mean_square_error(levels)
        assert (table.low is not None) == (bits >= 7)
        assert np.array_equal(table.values, levels)
        assert byte.min() >= -127

    def test_few_levels_are_nearly_exact(self):
        for levels in (stored_codebook("lloyd-max", 1), stored_codebook("ternary", 0)):
            table = codebook_table(tuple(levels.tolist()))
            byte = table.high[: len(levels)].astype(float) - table.offset
            assert np.allclose(byte * table.scale, levels, rtol=1e-6)

    def test_affine_codes_are_their_own_bytes(self):
        table = affine_table(8)
        assert (table.scale, table.offset) == (1, 0)
        assert np.array_equal(table.high, np.arange(256))


@pytest.mark.parametrize(
    "spec", [QuantSpec("affine", 4, 32, "none"), QuantSpec("lloyd-max", 4, 32)], ids=QuantSpec.label
)
@pytest.mark.parametrize("size", [1e-7, 1e-3, 1e3, 1e6])
def test_scales_of_any_size(spec, bound, size):
    """mlx-lm keeps scales in bfloat16, which holds what float16 does not."""
    packed, x = pack(spec, 40, 352), samples(8, 352)
    arrays = packed.arrays | {"scales": packed.arrays["scales"].astype(mx.float32) * size}
    if "biases" in arrays:
        arrays["biases"] = mx.zeros_like(arrays["biases"])
    scaled = PackedTensor(spec, packed.shape, arrays)
    expected = x @ dense(scaled).T
    assert relative_error(cpu.matmul(mx.array(x), cpu.prepare(scaled)), expected) < max(bound, 5e-4)


def test_scales_of_zero():
    packed, x = pack(QuantSpec("lloyd-max", 4, 32), 40, 352), mx.array(samples(2, 352))
    arrays = packed.arrays | {"scales": mx.zeros_like(packed.arrays["scales"])}
    assert not np.array(cpu.matmul(x, cpu.prepare(PackedTensor(packed.spec, packed.shape, arrays)))).any()


def test_a_result_that_is_not_yet_computed_keeps_its_matrix(bound):
    packed, x = pack(FEW[0], 200, 352), samples(4, 352)
    expected = x @ dense(packed).T
    results = [cpu.matmul(mx.array(x), cpu.prepare(packed)) for _ in range(20)]
    del packed
    for result in results:
        assert relative_error(result, expected) < bound


def test_threads_may_share_a_matrix():
    packed = pack(FEW[0], 300, 352)
    prepared, w = cpu.prepare(packed), dense(packed)
    errors = []

    def work(seed):
        with (
            mx.stream(mx.new_thread_local_stream(mx.cpu))
            if hasattr(mx, "new_thread_local_stream")
            else mx.stream(mx.cpu)
        ):
            for i in range(20):
                x = samples(1 + i, 352, seed=seed + i)
                errors.append(relative_error(cpu.matmul(mx.array(x), prepared), x @ w.T))

    workers = [threading.Thread(target=work, args=(seed,)) for seed in (100, 200)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(errors) == 40
    assert max(errors) < EXACT


class TestSupports:
    @pytest.mark.parametrize("op", ops.OPS)
    def test_what_has_no_kernel_is_declined_with_the_reason(self, op):
        plain = pack(QuantSpec(), 8, 64)
        assert cpu.supports(op, plain, mx.float32) is None
        assert cpu.supports(op, held(plain), mx.float32) == "the weights are already decoded"
        qjl, foreign = (
            PackedTensor(QuantSpec(**fields), (8, 64), {}) for fields in ({"qjl": True}, {"group_size": 16})
        )
        assert cpu.supports(op, qjl, mx.float32) == "there is no kernel for qjl"
        assert cpu.supports(op, foreign, mx.float32) == "there is no kernel for groups of 16"

    def test_a_machine_without_the_kernels_says_why(self, monkeypatch):
        from tq.cpu import library

        state = library.LibraryState(False, "no C++ compiler was found")
        monkeypatch.setattr(library, "state", lambda: state)
        assert cpu.supports("matmul", pack(QuantSpec(), 8, 64), mx.float32) == "no C++ compiler was found"
