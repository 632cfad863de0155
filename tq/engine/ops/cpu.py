"""tq's own kernels for Linux CPUs (tq/cpu/kernels), on matrices in their memory order. See docs/kernels.md.

Activations are quantized to 8 bits on the way, in blocks of 64, unless TQ_CPU_EXACT was set when a model was loaded.
"""

import ctypes
from dataclasses import replace
from typing import cast

import mlx.core as mx

from tq.cpu import lazy, library
from tq.engine.ops.prepared import Prepared, PreparedRotation, prepare_rotation
from tq.engine.ops.prepared import prepare as to_memory_order
from tq.engine.ops.reference import add_bias, expert_bias, in_pairs
from tq.engine.quantize import PackedTensor
from tq.engine.quantize.spec import FOREIGN_GROUP_SIZE

__all__ = ["embed", "gather_matmul", "matmul", "name", "prepare", "prepare_rotation", "rotate", "supports", "unrotate"]

name = "cpu"


def unavailable() -> str | None:
    """None, or the reason why no operation runs here."""
    if mx.default_device() != mx.Device(mx.cpu):
        return "the GPU is the device that runs models"
    state = library.state()
    return None if state.active else state.reason


def supports(op: str, packed: PackedTensor, dtype: mx.Dtype) -> str | None:
    """None, or the reason why the kernels cannot run ``op`` on ``packed``."""
    reason = unavailable()
    if reason is not None:
        return reason
    if packed.spec.qjl:
        return "there is no kernel for qjl"
    if packed.spec.group_size == FOREIGN_GROUP_SIZE:
        return f"there is no kernel for groups of {FOREIGN_GROUP_SIZE}"
    if packed.decoded is not None:
        return "the weights are already decoded"
    return None


def prepare(packed: PackedTensor, bias: mx.array | None = None) -> PackedTensor:
    """The same matrix in the kernels' memory order alone: without the stored arrays of its own."""
    shared = {k: v for k, v in packed.arrays.items() if k not in packed.per_matrix_arrays}
    return replace(packed, arrays=shared, prepared=to_memory_order(packed, bias))


def matmul(x: mx.array, packed: PackedTensor, transpose: bool = True, bias: mx.array | None = None) -> mx.array:
    """See ``reference.matmul``. A bias that a matrix was prepared with is in the product already."""
    return add_bias(_matmul(x, packed, transpose), bias)


def _matmul(x: mx.array, packed: PackedTensor, transpose: bool) -> mx.array:
    matrix = _prepared(packed)
    *lead, rows, _ = packed.shape
    if not transpose:
        # No layer does this while it generates: mlx-lm's latent attention does, for a prompt.
        return x @ matrix.decode().astype(x.dtype)
    if lead:
        return _per_head(x, packed, matrix)
    return _call("tq_matmul", matrix.matmul, [_float(x)], (*x.shape[:-1], rows), matrix.pinned).astype(x.dtype)


def gather_matmul(
    x: mx.array,
    packed: PackedTensor,
    indices: mx.array,
    sorted_indices: bool = False,
    bias: mx.array | None = None,
) -> mx.array:
    x, indices = in_pairs(x, indices)
    y = _gather(x, indices, _prepared(packed), (*indices.shape, 1, packed.shape[1])).astype(x.dtype)
    return add_bias(y, expert_bias(bias, indices))


def embed(ids: mx.array, packed: PackedTensor, dtype: mx.Dtype) -> mx.array:
    return _prepared(packed).rows(ids).astype(dtype)


def rotate(x: mx.array, rotation: PreparedRotation) -> mx.array:
    """As ``rotation.rotate`` of tq.engine.quantize."""
    return _rotate(x, rotation, rotation.forward)


def unrotate(y: mx.array, rotation: PreparedRotation) -> mx.array:
    """As ``rotation.unrotate`` of tq.engine.quantize."""
    return _rotate(y, rotation, rotation.inverse)


def _rotate(x: mx.array, rotation: PreparedRotation, params: ctypes.Structure) -> mx.array:
    return _call("tq_rotate", params, [_float(x)], x.shape, rotation.pinned).astype(x.dtype)


def _per_head(x: mx.array, packed: PackedTensor, matrix: Prepared) -> mx.array:
    """x (..., heads, L, in) times the transposed matrix of each head; one x or one matrix serves all heads."""
    heads, rows, _ = packed.shape
    *batch, x_heads, length, _ = x.shape if x.ndim > 2 else (1, *x.shape)
    expert = mx.arange(heads, dtype=mx.uint32)
    if x_heads == 1:
        # Heads go behind tokens, so that the kernel repeats rows of x.
        order = (*batch, length, heads)
        y = _gather(x, mx.broadcast_to(expert, order), matrix, (*order, rows))
        return y.swapaxes(-2, -3).astype(x.dtype)
    order = (*batch, x_heads, length)
    return _gather(x, mx.broadcast_to(expert[:, None], order), matrix, (*order, rows)).astype(x.dtype)


def _gather(x: mx.array, indices: mx.array, matrix: Prepared, shape: tuple[int, ...]) -> mx.array:
    inputs = [_float(x), indices if indices.dtype == mx.uint32 else indices.astype(mx.uint32)]
    return _call("tq_gather_matmul", matrix.gather, inputs, shape, matrix.pinned)


def _float(x: mx.array) -> mx.array:
    return x if x.dtype == mx.float32 else x.astype(mx.float32)


def _call(
    operation: str, params: ctypes.Structure, inputs: list[mx.array], shape: tuple[int, ...], keep: lazy.Pinned
) -> mx.array:
    if 0 in shape:
        return mx.zeros(shape)
    return lazy.call(operation, params, inputs, [(shape, mx.float32)], keep=keep)[0]


def _prepared(packed: PackedTensor) -> Prepared:
    return to_memory_order(packed) if packed.prepared is None else cast(Prepared, packed.prepared)
