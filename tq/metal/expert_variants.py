"""Variants of the kernels of experts: layers of random experts, and what they compute in float64."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import mlx.core as mx
import numpy as np

from tq.metal.experts import ACTIVATIONS, Activation, gate_up, gather, gather_tiles
from tq.metal.variants import Case, Codes, Matrix, Variant, random_matrix, random_rows, type_name

ALPHA, LIMIT = 0.5, 20.0  # of GPT-OSS's activation: products of random rows are about 15, and few are clipped


@dataclass(frozen=True)
class Layer:
    """What a launch works on.

    Attributes:
        codes: Of all matrices.
        dtype: Of activations and biases.
        shape: (experts, out, in), with ``in`` a multiple of the groups.
        chosen: The expert of each pair.
        pairs_per_x: Pairs that share a row of x.
        bias: Whether matrices have one.
        slots: Whether experts go by other numbers, most of which have no slot.
    """

    codes: Codes
    dtype: mx.Dtype
    shape: tuple[int, int, int]
    chosen: Sequence[int]
    pairs_per_x: int = 1
    bias: bool = False
    slots: bool = False

    @property
    def label(self) -> str:
        experts, rows, columns = self.shape
        parts = [self.codes.label, type_name(self.dtype), f"{len(self.chosen)} pairs of {experts}x{rows}x{columns}"]
        if self.pairs_per_x > 1:
            parts.append(f"{self.pairs_per_x} per row")
        return ", ".join(parts + ["bias"] * self.bias + ["slots"] * self.slots)


def variants(layer: Layer) -> Iterator[Variant]:
    """All that can run a layer; tiles with a row of x for each pair."""
    for neighbours in (False, True):
        label = f"{layer.label}{', neighbours' * neighbours}"
        launch = partial(gather, neighbours=neighbours)
        yield Variant("gather_matvec", label, layer.dtype, partial(_product, layer, launch))
    for activation in ACTIVATIONS:
        label = f"{activation}, {layer.label}"
        yield Variant("gate_up", label, layer.dtype, partial(_gate_up, layer, activation))
    alone = replace(layer, pairs_per_x=1)
    yield Variant("gather_matmul", alone.label, layer.dtype, partial(_product, alone, gather_tiles))


class _Data:
    """The inputs of a launch, and products with matrices of experts in float64."""

    def __init__(self, rng: np.random.Generator, layer: Layer):
        self.rng, self.layer, self.chosen = rng, layer, np.asarray(layer.chosen)
        n_experts, _, columns = layer.shape
        self.x, exact = random_rows(rng, (len(self.chosen) // layer.pairs_per_x, columns), layer.dtype)
        self.rows = np.repeat(exact, layer.pairs_per_x, axis=0)
        self.experts, self.slots = mx.array(self.chosen.astype(np.uint32)), None
        if layer.slots:
            numbers = rng.permutation(3 * n_experts)[:n_experts]
            table = np.full(3 * n_experts, 2**32 - 1, np.uint32)
            table[numbers] = np.arange(n_experts)
            self.experts, self.slots = mx.array(numbers[self.chosen].astype(np.uint32)), mx.array(table)

    def matrix(self) -> tuple[Matrix, mx.array | None, np.ndarray]:
        """Random experts, their biases, and what they make of x: (pairs, out)."""
        matrix = random_matrix(self.rng, self.layer.codes, self.layer.shape)
        y = np.einsum("pi,poi->po", self.rows, matrix.dense[self.chosen])
        if not self.layer.bias:
            return matrix, None, y
        bias, exact = random_rows(self.rng, self.layer.shape[:2], self.layer.dtype)
        return matrix, bias, y + exact[self.chosen]

    def size_bytes(self, matrices: Sequence[Matrix]) -> int:
        """Read and written at least, with one output."""
        used = len(set(self.layer.chosen)) / self.layer.shape[0]
        output = len(self.chosen) * self.layer.shape[1] * self.layer.dtype.size
        return int(used * sum(matrix.size_bytes for matrix in matrices)) + self.x.nbytes + output


def _product(layer: Layer, launch: Callable[..., mx.array], rng: np.random.Generator) -> Case:
    data = _Data(rng, layer)
    matrix, bias, expected = data.matrix()
    arrays, how = matrix.stored[:3], matrix.stored[3:]
    return Case(
        lambda: launch(data.x, *arrays, data.experts, *how, bias, data.slots), expected, data.size_bytes([matrix])
    )


def _gate_up(layer: Layer, activation: Activation, rng: np.random.Generator) -> Case:
    data = _Data(rng, layer)
    (gate, gate_bias, gate_y), (up, up_bias, up_y) = data.matrix(), data.matrix()
    arrays, how = (gate.stored[:3], up.stored[:3], data.experts), gate.stored[3:]
    return Case(
        lambda: gate_up(data.x, *arrays, *how, activation, ALPHA, LIMIT, gate_bias, up_bias, data.slots),
        activated(activation, gate_y, up_y, ALPHA, LIMIT),
        data.size_bytes([gate, up]),
    )


def activated(activation: Activation, gate: np.ndarray, up: np.ndarray, alpha: float, limit: float) -> np.ndarray:
    """The activations in float64."""
    if activation == "silu":
        return gate * _sigmoid(gate) * up
    if activation == "gelu_tanh":
        return 0.5 * gate * (1 + np.tanh(np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3))) * up
    gate = np.minimum(gate, limit)
    return (np.clip(up, -limit, limit) + 1) * gate * _sigmoid(alpha * gate)


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 0.5 * (1 + np.tanh(0.5 * x))
