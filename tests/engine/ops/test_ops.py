"""Operations: the reference against float64 NumPy, MLX's kernels against the reference, and the choice between them."""

from dataclasses import replace
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest

from tq.engine import ops
from tq.engine.ops import cpu, native, reference
from tq.engine.quantize import PackedTensor, QuantSpec, decode_rotated, encode
from tq.engine.quantize.spec import CODEC_BITS, GROUP_SIZES
from tq.errors import TQError, UsageError

CODED = [
    QuantSpec("lloyd-max", 3, 32),
    QuantSpec("lloyd-max", 5, 0, "none"),
    QuantSpec("ternary", 0, 32),
    QuantSpec("affine", 4, 32),
    QuantSpec("lloyd-max", 2, 32, qjl=True),
]
AFFINE = [QuantSpec("affine", bits, 64) for bits in CODEC_BITS["affine"]] + [
    QuantSpec("affine", 4, group, "none") for group in GROUP_SIZES
]
by_label = pytest.mark.parametrize("spec", CODED, ids=QuantSpec.label)
affine_by_label = pytest.mark.parametrize("spec", AFFINE, ids=QuantSpec.label)


@pytest.fixture(autouse=True)
def no_memory_of_choices():
    ops._select.cache_clear()
    yield
    ops._select.cache_clear()


def samples(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def pack(spec, *shape):
    return encode(mx.array(samples(*shape, seed=1)), spec)


def dense(packed):
    return np.array(decode_rotated(packed), dtype=np.float64)


def held(packed):
    """The same matrix with its dense weight in memory."""
    return PackedTensor(packed.spec, packed.shape, packed.arrays, decode_rotated(packed))


def assert_close(found, expected, atol=2e-4):
    assert found.shape == expected.shape
    np.testing.assert_allclose(np.array(found.astype(mx.float32)), np.array(expected), rtol=0, atol=atol)


def naive_gather(x, w, indices):
    """x (..., 1, in) times the transposed expert of each index, one by one."""
    x = np.broadcast_to(x, (*indices.shape, *x.shape[-2:]))
    found = np.empty((*indices.shape, 1, w.shape[1]))
    for place in np.ndindex(*indices.shape):
        found[place] = x[place] @ w[indices[place]].T
    return found


# Shapes of gathers: (x, indices, sorted). Few rows choose fewer experts than there are, many choose all.
GATHERS = {
    "one token": ((1, 1, 1, 1, 96), [[[4, 0]]], False),
    "few tokens": ((1, 2, 1, 1, 96), [[[6, 2], [2, 2]]], False),
    "many tokens": ((2, 3, 1, 1, 96), [[[0, 5, 1], [2, 3, 6], [1, 1, 0]], [[4, 4, 2], [6, 0, 3], [5, 2, 1]]], False),
    "an input per expert": ((1, 2, 2, 1, 96), [[[3, 1], [0, 6]]], False),
    "few sorted rows": ((4, 1, 96), [1, 1, 3, 6], True),
    "many sorted rows": ((9, 1, 96), [0, 0, 1, 3, 3, 3, 5, 6, 6], True),
}
each_gather = pytest.mark.parametrize(("shape", "indices", "is_sorted"), GATHERS.values(), ids=GATHERS.keys())


class TestReference:
    @by_label
    @pytest.mark.parametrize("lead", [(), (1,), (7,), (2, 3)])
    def test_matmul_is_the_product_with_the_transposed_matrix(self, spec, lead):
        packed, x = pack(spec, 13, 96), samples(*lead, 96)
        assert_close(reference.matmul(mx.array(x), packed), x @ dense(packed).T)

    @by_label
    def test_matmul_without_transposing_is_the_product_with_the_matrix(self, spec):
        packed, x = pack(spec, 13, 96), samples(2, 5, 13)
        assert_close(reference.matmul(mx.array(x), packed, transpose=False), x @ dense(packed))

    @by_label
    def test_matmul_takes_one_matrix_per_head(self, spec):
        packed, x, y = pack(spec, 3, 5, 96), samples(2, 3, 4, 96), samples(2, 3, 4, 5)
        w = dense(packed)
        assert_close(reference.matmul(mx.array(x), packed), np.einsum("bhli,hoi->bhlo", x, w))
        assert_close(reference.matmul(mx.array(y), packed, transpose=False), np.einsum("bhlo,hoi->bhli", y, w))

    @by_label
    @each_gather
    def test_gather_matmul_uses_the_expert_of_each_row(self, spec, shape, indices, is_sorted):
        packed, x, indices = pack(spec, 7, 5, 96), samples(*shape), np.array(indices)
        found = reference.gather_matmul(mx.array(x), packed, mx.array(indices), is_sorted)
        assert_close(found, naive_gather(x, dense(packed), indices))

    @pytest.mark.parametrize(("indices", "decoded"), [([[6, 2]], 2), ([[0, 1, 2], [3, 4, 5], [6, 0, 1]], 7)])
    def test_gather_matmul_decodes_no_more_experts_than_it_needs(self, monkeypatch, indices, decoded):
        shapes = []
        monkeypatch.setattr(
            reference,
            "decode_rotated",
            lambda packed, dtype: shapes.append(packed.shape) or decode_rotated(packed, dtype),
        )
        x = mx.array(samples(len(indices), 1, 1, 96))
        reference.gather_matmul(x, pack(CODED[0], 7, 5, 96), mx.array(indices))
        assert shapes == [(decoded, 5, 96)]

    @by_label
    @pytest.mark.parametrize("ids", [3, [0, 10, 3, 3], [[1, 2, 3], [10, 9, 8]]])
    def test_embed_gives_the_rows_of_the_ids(self, spec, ids):
        packed = pack(spec, 11, 96)
        assert_close(reference.embed(mx.array(ids), packed, mx.float32), dense(packed)[np.array(ids)], 1e-6)

    @by_label
    def test_a_dense_weight_in_memory_changes_nothing(self, spec):
        packed, x, ids = pack(spec, 11, 96), mx.array(samples(4, 96)), mx.array([[5, 0]])
        experts = pack(spec, 7, 5, 96)
        assert_close(reference.matmul(x, held(packed)), reference.matmul(x, packed))
        assert_close(reference.embed(ids, held(packed), mx.float32), reference.embed(ids, packed, mx.float32))
        for shape, indices, is_sorted in GATHERS.values():
            arguments = mx.array(samples(*shape)), mx.array(indices), is_sorted
            found, expected = (
                reference.gather_matmul(arguments[0], weight, *arguments[1:]) for weight in (held(experts), experts)
            )
            assert_close(found, expected)

    @by_label
    @pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
    def test_results_have_the_type_of_the_activation(self, spec, dtype):
        packed, experts, x = pack(spec, 5, 96), pack(spec, 3, 5, 96), mx.array(samples(2, 96)).astype(dtype)
        for weight in (packed, held(packed)):
            assert reference.matmul(x, weight).dtype == dtype
            assert reference.embed(mx.array([1]), weight, dtype).dtype == dtype
        for weight in (experts, held(experts)):
            assert reference.gather_matmul(x[:, None], weight, mx.array([0, 2])).dtype == dtype


class TestMLX:
    @affine_by_label
    def test_matmul_is_that_of_the_reference(self, spec):
        packed = pack(spec, 24, 128)
        for x in (samples(1, 128), samples(3, 5, 128)):
            assert_close(native.matmul(mx.array(x), packed), reference.matmul(mx.array(x), packed))
        y = mx.array(samples(3, 24))
        assert_close(native.matmul(y, packed, transpose=False), reference.matmul(y, packed, transpose=False))

    @affine_by_label
    def test_matmul_takes_one_matrix_per_head(self, spec):
        packed, x = pack(spec, 3, 8, 128), mx.array(samples(2, 3, 4, 128))
        assert_close(native.matmul(x, packed), reference.matmul(x, packed))

    @affine_by_label
    @each_gather
    def test_gather_matmul_is_that_of_the_reference(self, spec, shape, indices, is_sorted):
        packed, x, indices = pack(spec, 7, 8, 128), mx.array(samples(*shape[:-1], 128)), mx.array(indices)
        found = native.gather_matmul(x, packed, indices, is_sorted)
        assert_close(found, reference.gather_matmul(x, packed, indices, is_sorted))

    @affine_by_label
    @pytest.mark.parametrize("ids", [3, [[1, 2, 3], [10, 9, 8]]])
    def test_embed_is_that_of_the_reference(self, spec, ids):
        packed, ids = pack(spec, 11, 128), mx.array(ids)
        assert_close(native.embed(ids, packed, mx.float32), reference.embed(ids, packed, mx.float32), 1e-6)

    @pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
    def test_results_have_the_type_of_the_activation(self, dtype):
        spec = QuantSpec("affine", 4, 32)
        packed, experts, x = pack(spec, 8, 96), pack(spec, 3, 8, 96), mx.array(samples(2, 96)).astype(dtype)
        assert native.matmul(x, packed).dtype == dtype
        assert native.embed(mx.array([1]), packed, dtype).dtype == dtype
        assert native.gather_matmul(x[:, None], experts, mx.array([0, 2])).dtype == dtype

    @pytest.mark.parametrize("op", ops.OPS)
    def test_other_codes_and_decoded_weights_are_declined_with_the_reason(self, op):
        affine = pack(QuantSpec("affine", 4), 8, 64)
        assert native.supports(op, affine, mx.float32) is None
        assert native.supports(op, held(affine), mx.float32) == "the weights are already decoded"
        assert native.supports(op, pack(QuantSpec(), 8, 64), mx.float32) == "MLX has no kernel for lloyd-max codes"


@pytest.fixture(params=[None, "there is no compiler"], ids=["kernels", "no kernels"])
def kernels(request, monkeypatch):
    """Whether the CPU kernels are there; if not, the reason."""
    monkeypatch.setattr(cpu, "unavailable", lambda: request.param)
    return request.param is None


class TestChoice:
    affine, coded = QuantSpec("affine", 4, 32), QuantSpec("lloyd-max", 3, 32)

    def chosen(self, spec, op="matmul"):
        return ops.select(op, pack(spec, 8, 96), mx.float32).name

    @pytest.mark.parametrize("value", ["auto", "", None])
    def test_the_first_backend_that_supports_the_codes_runs_them(self, monkeypatch, kernels, value):
        if value is not None:
            monkeypatch.setenv("TQ_BACKEND", value)
        assert self.chosen(self.affine) == ("cpu" if kernels else "mlx")
        assert self.chosen(self.coded) == ("cpu" if kernels else "reference")
        assert ops.select("matmul", held(pack(self.affine, 8, 96)), mx.float32) is reference

    def test_a_forced_backend_runs_what_another_would(self, monkeypatch, kernels):
        for name in ("mlx", "reference"):
            monkeypatch.setenv("TQ_BACKEND", name)
            assert self.chosen(self.affine) == name

    @pytest.mark.parametrize("op", ops.OPS)
    @pytest.mark.parametrize(
        ("name", "reason"), [("mlx", "MLX has no kernel for lloyd-max codes"), ("cpu", "there is no compiler")]
    )
    def test_a_forced_backend_that_declines_is_an_error_with_its_reason(self, monkeypatch, op, name, reason):
        monkeypatch.setattr(cpu, "unavailable", lambda: "there is no compiler")
        monkeypatch.setenv("TQ_BACKEND", name)
        with pytest.raises(TQError) as error:
            self.chosen(self.coded, op)
        message = f"no backend runs {op} on lloyd-max 3-bit g32 ({name}: {reason})"
        assert (error.value.message, error.value.hint) == (message, "unset TQ_BACKEND")

    def test_an_unknown_backend_is_refused_with_the_valid_names(self, monkeypatch):
        monkeypatch.setenv("TQ_BACKEND", "cuda")
        with pytest.raises(UsageError, match="TQ_BACKEND=cuda is not one of auto, cpu, metal, mlx, reference"):
            self.chosen(self.affine)

    @pytest.mark.parametrize("forced", ["auto", "reference"])
    def test_what_was_prepared_for_a_backend_runs_there(self, monkeypatch, forced):
        monkeypatch.setenv("TQ_BACKEND", forced)
        assert ops.select("matmul", replace(pack(self.coded, 8, 96), prepared=object()), mx.float32) is cpu

    def test_each_backend_is_asked_about_the_matrix_at_hand(self, monkeypatch):
        asked = []

        def supports(op, packed, dtype):
            asked.append((op, packed.spec, packed.shape, packed.decoded is not None, dtype))
            return "it is a picky one"

        monkeypatch.setattr(ops, "BACKENDS", (SimpleNamespace(name="picky", supports=supports), reference))
        packed = pack(self.coded, 8, 96)
        assert ops.select("matmul", packed, mx.float16) is reference
        assert ops.select("embed", held(packed), mx.float32) is reference
        assert asked == [
            ("matmul", self.coded, (8, 96), False, mx.float16),
            ("embed", self.coded, (8, 96), True, mx.float32),
        ]
        monkeypatch.setenv("TQ_BACKEND", "picky")
        with pytest.raises(TQError, match=r"\(picky: it is a picky one\)"):
            ops.select("matmul", packed, mx.float16)

    def test_operations_run_on_the_chosen_backend(self, monkeypatch):
        calls = []

        def record(name):
            return lambda *arguments: calls.append((name, *arguments)) or mx.zeros(1)

        backend = SimpleNamespace(name="recorder", supports=lambda *_: None, **{op: record(op) for op in ops.OPS})
        monkeypatch.setattr(ops, "BACKENDS", (backend, reference))
        packed, x, ids = pack(self.coded, 8, 96), mx.zeros((1, 96)), mx.array([0])
        ops.matmul(x, packed, False)
        ops.gather_matmul(x, packed, ids, True)
        ops.embed(ids, packed, mx.float16)
        assert [call[0] for call in calls] == list(ops.OPS)
        assert calls[0][1:] == (x, packed, False, None)
        assert calls[1][1:] == (x, packed, ids, True, None)
        assert calls[2][1:] == (ids, packed, mx.float16)


def test_explain_tells_who_runs_an_operation_and_why_others_do_not(kernels):
    for codec, bits in (("lloyd-max", 3), ("ternary", 0), ("affine", 4)):
        backend, declined = ops.explain("matmul", PackedTensor(QuantSpec(codec, bits), (64, 128), {}), mx.float32)
        assert backend.name == ("cpu" if kernels else "mlx" if codec == "affine" else "reference")
        expected = {} if kernels else {"cpu": "there is no compiler", "metal": "there is no Metal GPU"}
        if not kernels and codec != "affine":
            expected["mlx"] = f"MLX has no kernel for {codec} codes"
        assert declined == expected
