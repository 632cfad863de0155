"""The gated feed-forward network of experts against float64 NumPy, which decodes the same codes."""

import math

import numpy as np
import pytest
from hadamard import Rotation
from packed_matrix import PackedMatrix, operate, relative_error

from tq.cpu import library

SILU, GELU_TANH, GELU, RELU, RELU2, SWIGLU_OAI = range(6)
ALPHA, LIMIT = 1.702, 1.5


def activate(activation: int, gate: np.ndarray, up: np.ndarray) -> np.ndarray:
    if activation == SWIGLU_OAI:
        gate, up = np.minimum(gate, LIMIT), np.clip(up, -LIMIT, LIMIT)
        return gate / (1 + np.exp(-ALPHA * gate)) * (up + 1)
    relu = np.maximum(gate, 0)
    return up * {
        SILU: gate / (1 + np.exp(-gate)),
        GELU_TANH: gate / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3))),
        GELU: gate / 2 * (1 + np.vectorize(math.erf)(gate / math.sqrt(2))),
        RELU: relu,
        RELU2: relu**2,
    }.get(activation)


class Experts:
    """Random experts; `__call__` is what they compute in float64."""

    def __init__(self, inputs: int, hidden: int, *, experts: int = 5, bits: int = 4, group: int = 64, **more):
        self.activation = more.pop("activation", SILU)
        self.rotations = [Rotation(n) for n in (inputs, hidden)] if more.pop("rotated", True) else None
        kind = {"group": group, "experts": experts, **more}
        self.gate = PackedMatrix(hidden, inputs, bits, **kind, seed=1)
        self.up = PackedMatrix(hidden, inputs, bits, **kind, seed=2)
        self.down = PackedMatrix(inputs, hidden, max(bits - 1, 1), **kind, seed=3)

    def params(self, *, exact: bool) -> library.ExpertsParams:
        into, hidden = (r.rotation for r in self.rotations) if self.rotations else (library.Rotation(),) * 2
        return library.ExpertsParams(
            self.gate.matrix, self.up.matrix, self.down.matrix, into, hidden, self.activation, ALPHA, LIMIT, exact
        )

    def run(self, x: np.ndarray, expert: np.ndarray, *, exact: bool = True, weight: np.ndarray | None = None):
        inputs = [x, expert.astype(np.uint32)] + ([] if weight is None else [weight])
        lead = expert.shape if weight is None else expert.shape[:1]
        return operate(library.library().tq_experts, self.params(exact=exact), inputs, (*lead, self.down.rows))

    def __call__(self, x: np.ndarray, expert: np.ndarray) -> np.ndarray:
        """(tokens, k, out)."""

        def product(matrix: PackedMatrix, e: int, rows: np.ndarray) -> np.ndarray:
            return rows @ matrix.dense[e].T + (0 if matrix.bias is None else matrix.bias[e])

        y = np.empty((*expert.shape, self.down.rows))
        x = x.astype(np.float64)
        if self.rotations:
            x = x @ self.rotations[0].dense.T
        for t, i in np.ndindex(*expert.shape):
            e = expert[t, i]
            h = activate(self.activation, product(self.gate, e, x[t]), product(self.up, e, x[t]))
            y[t, i] = product(self.down, e, h @ self.rotations[1].dense.T if self.rotations else h)
        return y


def tokens_of(network: Experts, tokens: int, k: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    x = (random.standard_normal((tokens, network.gate.columns)) / math.sqrt(network.gate.columns)).astype(np.float32)
    expert = np.stack([random.permutation(network.gate.experts)[:k] for _ in range(tokens)])
    return x, expert, random.uniform(0, 1, (tokens, k)).astype(np.float32)


@pytest.mark.parametrize("tokens", [1, 2, 3, 16, 40])
@pytest.mark.parametrize(("inputs", "hidden"), [(64, 32), (96, 100), (192, 320)])
def test_numbers_of_tokens_and_odd_shapes(tokens, inputs, hidden):
    network = Experts(inputs, hidden)
    x, expert, weight = tokens_of(network, tokens, 3)
    expected = network(x, expert)
    assert relative_error(network.run(x, expert), expected) < 1e-5
    assert relative_error(network.run(x, expert, exact=False), expected) < 0.02
    summed = (expected * weight[..., None]).sum(axis=1)
    assert relative_error(network.run(x, expert, weight=weight), summed) < 1e-5


@pytest.mark.parametrize("activation", [SILU, GELU_TANH, GELU, RELU, RELU2, SWIGLU_OAI])
@pytest.mark.parametrize("tokens", [1, 7])
def test_activations(activation, tokens):
    network = Experts(96, 160, activation=activation, bias=True)
    x, expert, _ = tokens_of(network, tokens, 2)
    assert relative_error(network.run(x, expert), network(x, expert)) < 1e-5


@pytest.mark.parametrize(
    "kind",
    [
        {"bits": 3, "group": 0},
        {"bits": 4, "group": 32, "affine": True},
        {"bits": 8, "group": 128, "low": True},
        {"bits": 4, "rotated": False},
    ],
    ids=str,
)
def test_kinds_of_matrices(kind):
    network = Experts(128, 192, **kind)
    for tokens in (1, 9):
        x, expert, _ = tokens_of(network, tokens, 4)
        assert relative_error(network.run(x, expert), network(x, expert)) < 1e-5


def test_one_expert_may_get_all_tokens_or_be_named_twice():
    network = Experts(64, 96)
    x, _, _ = tokens_of(network, 20, 1)
    for expert in (np.full((20, 1), 4), np.tile([2, 2], (20, 1))):
        assert relative_error(network.run(x, expert), network(x, expert)) < 1e-5
    assert relative_error(network.run(x[:1], np.array([[3, 3]])), network(x[:1], np.array([[3, 3]]))) < 1e-5


def test_long_prompts_go_in_chunks():
    network = Experts(64, 4096, experts=2, rotated=False)
    tokens = 2 * (64 << 20) // (4 * 2 * 4096 * 2) + 5  # rows of gate and up that fill two chunks, and some more
    x, expert, weight = tokens_of(network, tokens, 2)
    together = network.run(x, expert, exact=False)
    some = [0, 1023, 1024, 1025, tokens // 2, tokens - 1]
    assert relative_error(together[some], network(x[some], expert[some])) < 0.02
    assert np.isfinite(together).all()
    summed = network.run(x, expert, exact=False, weight=weight)
    assert relative_error(summed, (together * weight[..., None]).sum(axis=1)) < 1e-5


def test_nan_stays_with_its_token():
    network = Experts(96, 100)
    for tokens in (1, 4):
        x, expert, _ = tokens_of(network, tokens, 2)
        x[-1, 5] = np.nan
        for exact in (True, False):
            y = network.run(x, expert, exact=exact)
            assert np.isnan(y[-1]).all()
            assert np.isfinite(y[:-1]).all()


def test_any_number_of_threads():
    loaded = library.library()
    before = loaded.tq_get_threads()
    network = Experts(320, 576)
    x, expert, weight = tokens_of(network, 33, 3)
    expected = (network(x, expert) * weight[..., None]).sum(axis=1)
    try:
        for threads in (1, 2, 3, 7):
            loaded.tq_set_threads(threads)
            for tokens in (1, 33):
                y = network.run(x[:tokens], expert[:tokens], weight=weight[:tokens])
                assert relative_error(y, expected[:tokens]) < 1e-5
    finally:
        loaded.tq_set_threads(before)
