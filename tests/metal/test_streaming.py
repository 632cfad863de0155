"""Models whose experts lie in slots, on Metal kernels: the same bits as resident ones."""

import mlx.core as mx
import numpy as np
from metal.test_models import backend, converted, logits, uncompiled  # noqa: F401 (fixtures)

from tq.engine.model.load import load_packed, load_streamed
from tq.engine.stream.settings import StreamSettings

STEPS = 18  # of test_models.STEPS


def test_slots_are_experts_to_the_kernels(tmp_path, backend):  # noqa: F811
    folder = converted(tmp_path, "gpt_oss", 4)
    tokens = np.random.default_rng(0).integers(3, 90, STEPS)
    expected = logits(load_packed(folder)[0], tokens)
    _, _, pager = load_streamed(folder, StreamSettings(budget_bytes=10**9))
    one = sum(arena.size_bytes // arena.residency.n_slots for arena in pager.arenas)
    model, _, pager = load_streamed(folder, StreamSettings(budget_bytes=3 * one))
    assert np.array_equal(logits(model, tokens), expected)
    assert pager.report().prompt_read_bytes > 0


def test_many_sorted_pairs_take_the_kernel_that_they_take_in_memory(metal):
    """Slots of many layers are not experts among which the pairs of one are spread."""
    from tq.engine import ops
    from tq.engine.quantize import PackedTensor, QuantSpec, encode

    rng = np.random.default_rng(0)
    packed = encode(mx.array(rng.standard_normal((2, 32, 64)).astype(np.float32)), QuantSpec(bits=4, group_size=32))
    x = mx.array(rng.standard_normal((48, 1, 64)).astype(np.float32))
    experts = mx.array(np.sort(rng.integers(0, 2, 48)).astype(np.uint32))
    expected = ops.metal.gather_matmul(x, packed, experts, sorted_indices=True)
    many = {name: mx.concatenate([packed.arrays[name]] * 20) for name in packed.per_matrix_arrays}
    slots = PackedTensor(packed.spec, packed.shape, packed.arrays | many)
    got = ops.metal.gather_matmul(x, slots, experts + 6, sorted_indices=True)
    assert mx.array_equal(got, expected)
