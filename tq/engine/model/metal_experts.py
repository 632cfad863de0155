"""Experts of a layer on Metal: gate, up and the activation of mlx-lm's SwitchGLU as one kernel for a few tokens."""

from typing import Any

import mlx.core as mx
import mlx.nn as nn

from tq.engine import ops
from tq.engine.model.layers import QuantSwitchLinear
from tq.engine.model.native_experts import GELU_TANH, SILU, SWIGLU_OAI, activation_of, matrices, replace
from tq.metal.experts import Activation

ACTIVATIONS: dict[int, Activation] = {SILU: "silu", GELU_TANH: "gelu_tanh", SWIGLU_OAI: "swiglu_oai"}
SORTED_FROM = 64  # pairs of a token and an expert from which SwitchGLU sorts them, to read each expert once


class MetalExperts(nn.Module):
    """``down(act(gate(x)) * up(x))`` for the chosen experts of each token.

    Its children are those of the module that it replaces, and so are their paths.
    """

    def __init__(self, original: Any):
        super().__init__()
        self.gate_proj: QuantSwitchLinear = original.gate_proj
        self.up_proj: QuantSwitchLinear = original.up_proj
        self.down_proj: QuantSwitchLinear = original.down_proj
        self.activation = original.activation
        self.original = [original]  # in a list, so that it is no child
        kind = activation_of(original)
        assert kind is not None
        self.kind = ACTIVATIONS[kind]

    def __call__(self, x: mx.array, indices: mx.array) -> mx.array:
        """x: (..., in), indices: (..., k) -> (..., k, out)."""
        if indices.size >= SORTED_FROM or indices.size == 0 or x.shape[:-1] != indices.shape[:-1]:
            return self.original[0](x, indices)
        gate, up, down = self.gate_proj, self.up_proj, self.down_proj
        limits = {"alpha": self.activation._alpha, "limit": self.activation._limit} if self.kind == "swiglu_oai" else {}
        hidden = ops.metal.gate_up(
            gate.rotate(x), gate.packed, up.packed, indices, self.kind, gate.added_bias, up.added_bias, **limits
        )
        return down(hidden, indices).squeeze(-2)


def fuse(model: nn.Module) -> int:
    """Replace the SwitchGLUs of ``model`` that Metal kernels run. Returns how many."""
    return replace(model, _fits, MetalExperts)


def _fits(module: Any) -> bool:
    gate, up, down = matrices(module)
    if gate.spec != up.spec or (gate.added_bias is None) != (up.added_bias is None):
        return False
    return ops.metal.supports("gate_up", gate.packed, mx.float32) is None
