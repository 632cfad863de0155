"""Experts of a layer as one kernel: mlx-lm's SwitchGLU over packed matrices, from its input to what its experts say."""

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

from tq.cpu import lazy, library
from tq.engine.model.layers import QuantSwitchLinear

SILU, GELU_TANH, SWIGLU_OAI = 0, 1, 5  # tq_activation

# Activations that the kernel knows, by module and name: others run as mlx-lm wrote them.
ACTIVATIONS = {
    "mlx_lm.models.switch_layers.SwiGLU": SILU,
    "mlx_lm.models.gemma4_text.GeGLU": GELU_TANH,
    "mlx_lm.models.activations.SwigluOAI": SWIGLU_OAI,
}


@dataclass(eq=False)
class _Fused:
    """What ``parameters()`` must not list: the module that is replaced, and the kernel's parameters."""

    original: nn.Module
    params: library.ExpertsParams
    pinned: lazy.Pinned


class FusedExperts(nn.Module):
    """``down(act(gate(x)) * up(x))`` for the chosen experts of each token.

    Its children are those of the module that it replaces, and so are their paths.
    """

    def __init__(self, original: nn.Module):
        super().__init__()
        self.gate_proj: QuantSwitchLinear = original.gate_proj
        self.up_proj: QuantSwitchLinear = original.up_proj
        self.down_proj: QuantSwitchLinear = original.down_proj
        self.activation = original.activation
        self.fused = _fuse(original)

    @property
    def num_experts(self) -> int:
        return self.down_proj.num_experts

    @property
    def output_dims(self) -> int:
        return self.down_proj.output_dims

    def __call__(self, x: mx.array, indices: mx.array) -> mx.array:
        """x: (..., in), indices: (..., k) -> (..., k, out)."""
        if x.shape[:-1] != indices.shape[:-1] or 0 in x.shape:
            return self.fused.original(x, indices)
        tokens, k, columns = prod(x.shape[:-1]), indices.shape[-1], self.down_proj.output_dims
        inputs = [x.reshape(tokens, -1).astype(mx.float32), indices.reshape(tokens, k).astype(mx.uint32)]
        outputs = [((tokens, k, columns), mx.float32)]
        (y,) = lazy.call("tq_experts", self.fused.params, inputs, outputs, keep=self.fused.pinned)
        return y.reshape(*indices.shape, columns).astype(x.dtype)


def fuse(model: nn.Module) -> int:
    """Replace the SwitchGLUs of ``model`` whose matrices the CPU kernels hold. Returns how many."""
    return replace(model, _fits, FusedExperts)


def replace(model: nn.Module, fits: Callable[[Any], bool], fused: Callable[[Any], nn.Module]) -> int:
    """Put ``fused(module)`` in the place of each SwitchGLU over packed experts that ``fits``. Returns how many."""
    from mlx_lm.models.switch_layers import SwitchGLU

    found = {
        path: module
        for path, module in model.named_modules()
        if type(module) is SwitchGLU and _shares_a_rotation(module) and fits(module)
    }
    new = {id(module): fused(module) for module in found.values()}
    for path, module in found.items():
        model.update_modules(tree_unflatten([(path, new[id(module)])]))
    return len(new)


def matrices(module: Any) -> tuple[QuantSwitchLinear, QuantSwitchLinear, QuantSwitchLinear]:
    """Gate, up, down."""
    return module.gate_proj, module.up_proj, module.down_proj


def _shares_a_rotation(module: Any) -> bool:
    packed = all(type(matrix) is QuantSwitchLinear for matrix in matrices(module))
    return packed and activation_of(module) is not None and module.gate_proj.rotation is module.up_proj.rotation


def _fits(module: Any) -> bool:
    return all(matrix.prepared is not None and matrix.added_bias is None for matrix in matrices(module))


def activation_of(module: Any) -> int | None:
    """What a SwitchGLU does between its matrices, or None if no kernel knows it."""
    kind = type(module.activation)
    return ACTIVATIONS.get(f"{kind.__module__}.{kind.__qualname__}")


def _fuse(module: Any) -> _Fused:
    gate, up, down = (m.prepared for m in (module.gate_proj, module.up_proj, module.down_proj))
    rotations = [matrix.rotation and matrix.rotation.prepared for matrix in (module.gate_proj, module.down_proj)]
    activation = activation_of(module)
    params = library.ExpertsParams(
        gate=gate.matrix,
        up=up.matrix,
        down=down.matrix,
        in_rotation=rotations[0].rotation if rotations[0] else library.Rotation(),
        hidden_rotation=rotations[1].rotation if rotations[1] else library.Rotation(),
        activation=activation,
        alpha=module.activation._alpha if activation == SWIGLU_OAI else 0,
        limit=module.activation._limit if activation == SWIGLU_OAI else 0,
        exact=gate.exact,
    )
    also = [part.pinned for part in (gate, up, down, *rotations) if part]
    return _Fused(module, params, lazy.Pinned(also=also))
