"""What kernels run of a loaded model beyond single matrices, as far as its architecture has it."""

import mlx.nn as nn

from tq.engine import ops
from tq.engine.model import metal_experts, native_attention, native_experts, native_proof


def accelerate(model: nn.Module) -> None:
    """Let kernels run experts, on a CPU attention and whole layers too, if TQ_BACKEND leaves it a choice."""
    forced = ops.forced_backend()
    if forced in ("auto", ops.cpu.name) and ops.cpu.unavailable() is None:
        native_experts.fuse(model)
        native_attention.install(model)
        native_proof.install(model)
    elif forced in ("auto", ops.metal.name) and ops.metal.unavailable() is None:
        metal_experts.fuse(model)
