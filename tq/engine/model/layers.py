"""Modules over packed arrays: what mlx-lm's Linear, Embedding, SwitchLinear and MultiLinear become. Thin, over ops."""

from typing import cast

import mlx.core as mx
import mlx.nn as nn

from tq.engine import ops
from tq.engine.ops.prepared import Prepared, PreparedRotation
from tq.engine.quantize import PackedTensor, decode_rotated
from tq.engine.quantize.packed import SHARED


class Rotation:
    """The rotation of one activation, shared by the modules that read it.

    q, k and v (or gate and up, or all experts) are called with the same array: it is rotated once. Only the last
    activation is kept, and found by identity. Only an update in place (``x += y``) between two readers could make it
    stale; no model of mlx-lm does that to the input of a matrix.
    """

    def __init__(self, signs: mx.array):
        self.signs = signs
        self.prepared: PreparedRotation | None = None
        self._last: tuple[mx.array, mx.array] | None = None

    def prepare(self) -> None:
        """From now on, rotate by the CPU kernels."""
        if self.prepared is None:
            self.prepared = ops.cpu.prepare_rotation(self.signs)

    def __call__(self, x: mx.array) -> mx.array:
        last = self._last
        if last is None or last[0] is not x:
            last = (x, ops.rotate(x, self.signs, self.prepared))
            self._last = last
        return last[1]

    def inverse(self, y: mx.array) -> mx.array:
        return ops.unrotate(y, self.signs, self.prepared)


class _Hidden:
    """What a module must not list in ``parameters()``: arrays that belong to many modules, and derived ones."""

    def __init__(self, packed: PackedTensor):
        self.shape = tuple(packed.shape)
        self.shared = {k: v for k, v in packed.arrays.items() if k in SHARED}
        self.decoded: mx.array | None = None
        self.prepared: PackedTensor | None = None  # the matrix in the memory order of the CPU kernels
        self.stored: PackedTensor | None = None  # the matrix as the module's arrays were when it was last asked for
        self.has_bias = False  # whether products with it contain the bias


class QuantModule(nn.Module):
    """A module whose weight is a PackedTensor.

    Args:
        packed: The matrix, (..., out, in).
        rotation: The rotation of its inputs, or None. Modules with equal signs should share one.
        bias: (..., out) or None.

    Attributes:
        op: The operation of tq.engine.ops that it is.
    """

    op = "matmul"

    def __init__(self, packed: PackedTensor, rotation: Rotation | None, bias: mx.array | None = None):
        super().__init__()
        self.spec = packed.spec
        self.rotation = rotation
        self.hidden = _Hidden(packed)
        for name in packed.per_matrix_arrays:
            self[name] = packed.arrays[name]
        if bias is not None:
            self.bias = bias
        self.freeze()

    @property
    def packed(self) -> PackedTensor:
        if self.hidden.prepared is not None:
            return self.hidden.prepared
        stored = self.hidden.stored
        if stored is None or stored.decoded is not self.hidden.decoded or self._arrays_changed(stored):
            own = {name: array for name, array in self.items() if name != "bias"}
            stored = PackedTensor(self.spec, self.hidden.shape, own | self.hidden.shared, self.hidden.decoded)
            self.hidden.stored = stored
        return stored

    def _arrays_changed(self, stored: PackedTensor) -> bool:
        """Whether arrays were loaded since, as ``nn.Module.update`` does."""
        return any(array is not stored.arrays[name] for name, array in self.items() if name != "bias")

    @property
    def prepared(self) -> Prepared | None:
        """The matrix in the memory order of the CPU kernels, if ``prepare`` was called."""
        return cast(Prepared | None, self.packed.prepared)

    @property
    def dense_shape(self) -> tuple[int, ...]:
        """(..., out, in)."""
        return self.hidden.shape

    def keep_decoded(self, dtype: mx.Dtype) -> None:
        """Hold the dense weight in memory, for a backend that would decode it for every token."""
        self.hidden.decoded = decode_rotated(self.packed, dtype)

    def prepare(self) -> None:
        """Put the weight into the memory order of the CPU kernels, and release the stored arrays."""
        packed, bias = self.packed, self.get("bias")
        self.hidden.prepared, self.hidden.stored = ops.cpu.prepare(packed, bias), None
        self.hidden.has_bias = bias is not None
        for name in packed.per_matrix_arrays:
            self.pop(name)
        if self.rotation is not None:
            self.rotation.prepare()

    @property
    def added_bias(self) -> mx.array | None:
        """The bias that products with the matrix do not contain already."""
        return None if self.hidden.has_bias else self.get("bias")

    def rotate(self, x: mx.array) -> mx.array:
        return x if self.rotation is None else self.rotation(x)

    def unrotate(self, y: mx.array) -> mx.array:
        return y if self.rotation is None else self.rotation.inverse(y)

    def _extra_repr(self) -> str:
        return f"shape={self.dense_shape}, {self.spec.label()}"


class QuantLinear(QuantModule):
    """``nn.Linear``: x (..., in) -> (..., out)."""

    def __call__(self, x: mx.array) -> mx.array:
        return ops.matmul(self.rotate(x), self.packed, bias=self.added_bias)


class QuantEmbedding(QuantModule):
    """``nn.Embedding``: ids (...) -> (..., in), and as a tied head x (..., in) -> (..., out).

    Args:
        dtype: The type of the activations, which start here.
    """

    def __init__(self, packed: PackedTensor, rotation: Rotation | None, dtype: mx.Dtype):
        super().__init__(packed, rotation)
        self.dtype = dtype

    def __call__(self, ids: mx.array) -> mx.array:
        return self.unrotate(ops.embed(ids, self.packed, self.dtype))

    def as_linear(self, x: mx.array) -> mx.array:
        return ops.matmul(self.rotate(x), self.packed)


class QuantSwitchLinear(QuantModule):
    """mlx-lm's ``SwitchLinear``: x (..., 1, in) and the expert of each row -> (..., 1, out)."""

    op = "gather_matmul"

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
        return ops.gather_matmul(self.rotate(x), self.packed, indices, sorted_indices, self.added_bias)


class QuantMultiLinear(QuantModule):
    """mlx-lm's ``MultiLinear``: one matrix per head, x (..., heads, L, in) -> (..., heads, L, out), or transposed."""

    def __call__(self, x: mx.array, transpose: bool = True) -> mx.array:
        if transpose:
            return ops.matmul(self.rotate(x), self.packed)
        return self.unrotate(ops.matmul(x, self.packed, transpose=False))
