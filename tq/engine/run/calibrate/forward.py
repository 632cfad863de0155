"""A model whose matrices read their weight when they are called, and forget it afterwards.

All of a text goes through the model at once, so each weight is read once, and the activations of one place are all
that is in memory beside it. mlx-lm's own code runs unchanged: only the modules that hold matrices are replaced.
"""

from typing import Protocol

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

from tq.engine.model.architecture import Outline, outline
from tq.engine.model.plan import Plan
from tq.engine.model.roles import Matrix, Role
from tq.engine.model.sources import Source
from tq.engine.quantize.feedback import Feedback
from tq.engine.quantize.moments import Moments, expert_moments_of, moments_of

CODES_OF_HALVES = ("F16", "BF16")


class Visitor(Protocol):
    """What happens at the matrices."""

    def visit(self, matrix: Matrix, x: mx.array, indices: mx.array | None) -> mx.array:
        """A matrix is called with ``x`` (..., in), which is evaluated. Returns the weight to multiply with.

        Args:
            matrix: Which one.
            x: Its inputs; those of ``SwitchLinear`` have a last axis but one of 1.
            indices: The expert of each row, or None.
        """

    def weight(self, matrix: Matrix) -> mx.array:
        """The weight of a matrix that is used in another way than by multiplying inputs with it."""


def is_calibrated(matrix: Matrix, tied_head: bool) -> bool:
    """Whether inputs are multiplied with a matrix in a way whose moments help to encode it.

    Not those of embeddings, in which rows are looked up, unless they are the head too; and not those of experts that
    are modules of their own, which mlx-lm calls token by token.
    """
    if matrix.kind == "embedding":
        return matrix.quantizable and tied_head
    separate = matrix.kind == "linear" and matrix.role in (Role.EXPERT, Role.EXPERT_DOWN)
    return matrix.quantizable and not separate


class Weights:
    """The weights of a source by parameter, each read when it is taken."""

    def __init__(self, source: Source, trust_remote_code: bool = False):
        self.source = source
        self._trust_remote_code = trust_remote_code
        self._lazy: dict[str, mx.array] = {}

    def outline(self) -> Outline:
        """The model, and its lazy weights from here on."""
        found = outline(self.source, self._trust_remote_code)
        self._lazy = found.weights
        return found

    def take(self, parameter: str) -> mx.array:
        """A lazy array that nothing else refers to."""
        if parameter not in self._lazy:  # taken before: arrays that were evaluated stay in memory, so begin anew
            self.outline()
        return self.source.materialize(self._lazy.pop(parameter))


def visited_model(plan: Plan, weights: Weights, dtype: mx.Dtype, visitor: Visitor) -> nn.Module:
    """The model of a plan's source, in which every matrix that can be quantized asks ``visitor`` for its weight.

    All else is loaded, in the types in which the converted model would have it.

    Args:
        plan: Names the tensors.
        weights: Where they come from.
        dtype: Of the activations.
        visitor: Called at each matrix, in the order in which the model reads them.
    """
    found = weights.outline()
    model = found.model
    visited = {path: matrix for path, matrix in found.matrices.items() if matrix.quantizable}
    loaded = []
    for tensor in plan.tensors:
        if tensor.name.removesuffix(".weight") not in visited or not tensor.parameter.endswith(".weight"):
            code = tensor.stored[0][1]
            array = weights.take(tensor.parameter)
            halves = code in CODES_OF_HALVES
            loaded.append((tensor.parameter, array.astype(dtype) if halves else array))
    model.load_weights(loaded, strict=False)
    modules = dict(model.named_modules())
    replaced = []
    for path, matrix in visited.items():
        module = _KINDS[matrix.kind](matrix, visitor)
        if (bias := modules[path].get("bias")) is not None:
            module.bias = bias
        replaced.append((path, module))
    model.update_modules(tree_unflatten(replaced))
    model.eval()
    mx.eval(model.parameters())
    return model


class _Hidden:
    """What a module must not list among its children."""

    def __init__(self, matrix: Matrix, visitor: Visitor):
        self.matrix, self.visitor = matrix, visitor


class _Visited(nn.Module):
    def __init__(self, matrix: Matrix, visitor: Visitor):
        super().__init__()
        self.hidden = _Hidden(matrix, visitor)

    @property
    def dense_shape(self) -> tuple[int, ...]:
        return self.hidden.matrix.shape

    def visit(self, x: mx.array, indices: mx.array | None = None) -> mx.array:
        mx.eval(x, *([] if indices is None else [indices]))
        return self.hidden.visitor.visit(self.hidden.matrix, x, indices)


class _Linear(_Visited):
    def __call__(self, x: mx.array) -> mx.array:
        y = x @ self.visit(x).T
        return y + self.bias if "bias" in self else y


class _Embedding(_Visited):
    def __call__(self, ids: mx.array) -> mx.array:
        y = self.hidden.visitor.weight(self.hidden.matrix)[ids]
        mx.eval(y)  # so that the table is forgotten
        return y

    def as_linear(self, x: mx.array) -> mx.array:
        return x @ self.visit(x).T


class _SwitchLinear(_Visited):
    @property
    def input_dims(self) -> int:
        return self.dense_shape[2]

    @property
    def output_dims(self) -> int:
        return self.dense_shape[1]

    @property
    def num_experts(self) -> int:
        return self.dense_shape[0]

    def __call__(self, x: mx.array, indices: mx.array, sorted_indices: bool = False) -> mx.array:
        weight = self.visit(x, indices).swapaxes(-1, -2)
        y = mx.gather_mm(x, weight, rhs_indices=indices, sorted_indices=sorted_indices)
        if "bias" in self:
            y = y + mx.expand_dims(self.bias[indices], -2)
        mx.eval(y)  # gate, up and down of all experts together are too large to be in memory at once
        return y


class _MultiLinear(_Visited):
    def __call__(self, x: mx.array, transpose: bool = True) -> mx.array:
        # The other way round, the moments of x say nothing about errors in the rows of the weight.
        return x @ (self.visit(x).swapaxes(-1, -2) if transpose else self.hidden.visitor.weight(self.hidden.matrix))


_KINDS: dict[str, type[_Visited]] = {
    "linear": _Linear,
    "embedding": _Embedding,
    "switch": _SwitchLinear,
    "multi": _MultiLinear,
}


class Inputs:
    """The moments of what matrices read: q, k and v (or gate and up) are called with one array, summed once."""

    def __init__(self) -> None:
        self._last: tuple[mx.array, mx.array | None] | None = None
        self._moments: Moments | None = None
        self._feedback: Feedback | list[Feedback] | None = None

    def seen(self, x: mx.array, indices: mx.array | None) -> bool:
        """Whether the last matrix read the same."""
        return self._last is not None and self._last[0] is x and self._last[1] is indices

    def moments(self, matrix: Matrix, x: mx.array, indices: mx.array | None) -> Moments:
        """The moments of the inputs of a matrix."""
        if self._moments is None or not self.seen(x, indices):
            self._moments = self._feedback = None  # before new ones are made
            self._last = (x, indices)
            self._moments = moments_of(x) if indices is None else expert_moments_of(x, indices, matrix.shape[0])
        return self._moments

    def skip(self, x: mx.array, indices: mx.array | None) -> None:
        """A matrix reads what needs no moments any more."""
        self._last, self._moments, self._feedback = (x, indices), None, None

    def feedback(self, matrix: Matrix, x: mx.array, indices: mx.array | None) -> Feedback | list[Feedback]:
        """The same for the encoder."""
        if self._feedback is None or not self.seen(x, indices):
            self._feedback = self.moments(matrix, x, indices).feedback()
            self._moments = None  # as large, and needed no more
        return self._feedback
