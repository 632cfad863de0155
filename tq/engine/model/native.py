"""What the CPU kernels run of a loaded model beyond single matrices, as far as its architecture has it."""

import mlx.nn as nn

from tq.engine import ops
from tq.engine.model import native_attention, native_experts, native_proof


def accelerate(model: nn.Module) -> None:
    """Let kernels run experts, attention and whole layers, if ``cpu`` is here and TQ_BACKEND leaves it a choice."""
    if ops.forced_backend() in ("auto", ops.cpu.name) and ops.cpu.unavailable() is None:
        native_experts.fuse(model)
        native_attention.install(model)
        native_proof.install(model)
