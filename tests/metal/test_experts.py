"""The kernels of experts against float64: repeated, absent and sorted experts, shared rows of x, slots with gaps."""

import mlx.core as mx
import numpy as np
import pytest
from metal.emulator import device_requested, emulated

from tq.engine.quantize.codebooks import stored_codebook
from tq.metal import experts
from tq.metal.expert_variants import Layer, activated, variants
from tq.metal.experts import gate_up
from tq.metal.variants import Codes, random_matrix, random_rows

pytestmark = pytest.mark.usefixtures("metal")

LIMIT = {mx.float16: 2e-3, mx.bfloat16: 3e-3, mx.float32: 1e-5}
ONE_TOKEN = (2, 0, 3)  # expert 1 has no rows
REPEATED = (1, 1, 4, 0, 4, 1, 1, 2, 4)
ALL_ONE = (2,) * 6
SORTED = tuple(sorted(np.random.default_rng(4).integers(0, 4, 70)))


def lloyd_max(bits: int, group: int) -> Codes:
    return Codes(bits, group, stored_codebook("lloyd-max" if bits else "ternary", bits))


def check(layer: Layer, kernel: str, containing: str = "", but_not: str = "none") -> None:
    tried = [v for v in variants(layer) if v.kernel == kernel and containing in v.label and but_not not in v.label]
    assert tried
    limit = LIMIT[layer.dtype] * (1.5 if kernel == "gate_up" else 1)  # it has the errors of two products
    for variant in tried:
        assert variant.prepare(np.random.default_rng(1)).error() < limit, variant.label


LAYERS = {
    "trits": Layer(lloyd_max(0, 0), mx.float16, (4, 5, 90), ONE_TOKEN, 3),
    "trits in groups": Layer(lloyd_max(0, 64), mx.float32, (5, 9, 192), REPEATED, 1, True, True),
    "1 bit": Layer(lloyd_max(1, 0), mx.bfloat16, (5, 10, 40), REPEATED, 3, True),
    # Arrays of fewer than 8 elements are in constant memory.
    "trits, one row": Layer(lloyd_max(0, 0), mx.float32, (4, 1, 20), ONE_TOKEN, 3),
    "3 bits": Layer(lloyd_max(3, 64), mx.float16, (4, 13, 256), ONE_TOKEN, 3, True, True),
    "4 bits": Layer(lloyd_max(4, 64), mx.float16, (5, 17, 512), REPEATED, 3, True),
    "8 bits, one row": Layer(lloyd_max(8, 0), mx.bfloat16, (3, 1, 45), ALL_ONE, 1),
}


@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)
def test_each_pair_is_multiplied_with_its_expert(layer):
    check(layer, "gather_matvec", but_not="neighbours")


@pytest.mark.parametrize("name", ["trits in groups", "4 bits", "8 bits, one row"])
def test_neighbours_of_one_expert_share_decoded_weights(name):
    check(LAYERS[name], "gather_matvec", "neighbours")


@pytest.mark.parametrize(
    ("name", "activation"),
    [
        ("trits, one row", "silu"),
        ("3 bits", "silu"),
        ("3 bits", "gelu_tanh"),
        ("3 bits", "oai"),
        ("8 bits, one row", "oai"),
    ],
)
def test_gate_and_up_are_multiplied_and_activated(name, activation):
    check(LAYERS[name], "gate_up", activation)


@pytest.mark.parametrize(
    "layer",
    [
        Layer(lloyd_max(0, 32), mx.float16, (5, 5, 160), SORTED),
        Layer(lloyd_max(3, 64), mx.bfloat16, (5, 70, 128), SORTED, bias=True, slots=True),
        Layer(lloyd_max(4, 64), mx.float16, (4, 34, 192), (3,) * 70),
        Layer(lloyd_max(4, 0), mx.float32, (5, 33, 45), REPEATED, slots=True),
    ],
    ids=["trits", "sorted", "one expert", "not sorted"],
)
def test_tiles_end_where_an_expert_does(layer):
    check(layer, "gather_matmul")


def test_many_pairs_of_an_expert_go_to_tiles(monkeypatch):
    layer = Layer(lloyd_max(4, 32), mx.float16, (2, 3, 64), (0,) * 13 + (1,) * 11, 2)
    monkeypatch.delattr(experts, "GATHER")
    check(layer, "gather_matvec", "neighbours")


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_large_values_stay_finite_through_activations(activation):
    rng = np.random.default_rng(0)
    gate, up = (random_matrix(rng, lloyd_max(2, 0), (1, 8, 32)) for _ in range(2))
    x, exact = random_rows(rng, (1, 32), mx.float32)
    y = gate_up(x * 1e5, gate.stored[:3], up.stored[:3], mx.zeros(1, mx.uint32), 2, 0, activation)
    expected = activated(activation, *(1e5 * exact @ m.dense[0].T for m in (gate, up)), 1.702, 7.0)
    assert np.linalg.norm(np.array(y) - expected) < 1e-5 * np.linalg.norm(expected)


@pytest.mark.skipif(device_requested(), reason="an emulator puts arrays where it likes")
@pytest.mark.parametrize(
    ("kernel", "containing"), [("gather_matvec", "neighbours"), ("gate_up", "oai"), ("gather_matmul", "")]
)
def test_inputs_need_no_alignment(kernel, containing):
    with emulated(misalign=1):
        check(LAYERS["3 bits"], kernel, containing)
