"""What a calibration will take, from headers alone: memory, and time by the matrix products that it is made of."""

import time
from dataclasses import dataclass
from math import prod

import mlx.core as mx

from tq.engine.model.load import activation_dtype
from tq.engine.model.plan import BASE_MEMORY, ENCODER_COPIES, Plan
from tq.engine.model.roles import Matrix, Role
from tq.engine.quantize.codecs import ENCODE_VALUES
from tq.engine.quantize.moments import has_own_moments
from tq.engine.run.calibrate.collect import calibrated_matrices
from tq.engine.run.weights import active_experts

# Copies of activations that live at once: the residual stream, its norm; three of the widest place (gate, up, both).
NARROW_COPIES, WIDE_COPIES, SCORE_COPIES = 3, 3, 2
# Copies of moments: float32, as they are and rotated; float64 while the factor is made.
MOMENTS_BYTES = 2 * 4 + 3 * 8
# Flops of a factor per n^3: Cholesky 1/3 and the inverse of a triangle 1/3, each at float64's half rate.
FACTOR_FLOPS = 4 / 3
PROBE = 1024


@dataclass(frozen=True)
class Estimate:
    """Attributes:
    peak_memory_bytes: Of the process.
    seconds: Of the pass, at the speed of matrix products measured just now; other work comes on top.
    """

    peak_memory_bytes: int
    seconds: float


def estimate(plan: Plan, tokens: int, seq_len: int, *, encodes: bool) -> Estimate:
    """What a pass over so many tokens takes.

    Args:
        plan: Names the matrices.
        tokens: Of the text.
        seq_len: Of a window.
        encodes: Matrices are encoded in the same pass.
    """
    dtype, _ = activation_dtype(getattr(mx, plan.dtype))
    matrices = [m for m in plan.outline.matrices.values() if m.quantizable]
    inner = [m for m in matrices if m.role not in (Role.EMBEDDING, Role.HEAD)] or matrices
    active = active_experts(plan.source.config) or 1
    hidden = min(m.shape[-1] for m in matrices)
    wide = max(max(m.shape[-2:]) * (active if m.kind == "switch" else 1) for m in inner)
    narrow, wide = (tokens * dtype.size * width for width in (hidden, wide))
    calibrated = calibrated_matrices(plan) or inner
    scores = 0
    if not mx.metal.is_available():  # elsewhere, MLX computes all attention scores of a layer at once
        scores = tokens * seq_len * (plan.source.config.get("num_attention_heads") or 1) * 4
    encoding = wide  # the inputs of the matrix
    encoding += max(
        MOMENTS_BYTES * m.shape[-1] ** 2 + _own_bytes(m) + 2 * dtype.size * prod(m.shape) for m in calibrated
    )
    encoding += 4 * ENCODER_COPIES * ENCODE_VALUES if encodes else 0
    # Not at the same time: attention, the feed-forward layer, and a matrix that is encoded.
    memory = BASE_MEMORY + NARROW_COPIES * narrow + max(SCORE_COPIES * scores, WIDE_COPIES * wide, encoding)
    return Estimate(memory, _flops(calibrated, tokens, active, encodes) / _flops_per_second())


def _own_bytes(matrix: Matrix) -> int:
    """Of the moments of experts, and of their means."""
    experts, n = matrix.shape[0], matrix.shape[-1]
    return 8 * experts * n**2 if matrix.kind == "switch" and has_own_moments(experts, n) else 0


def _flops(matrices: list[Matrix], tokens: int, active: int, encodes: bool) -> float:
    total = 0.0
    for matrix in matrices:
        n, rows = matrix.shape[-1], prod(matrix.shape[:-1])
        experts = matrix.shape[0] if matrix.kind == "switch" else 1
        rows_run = rows * (active / experts if experts > 1 else 1)
        total += 2.0 * tokens * n * (rows_run if matrix.role not in (Role.EMBEDDING, Role.HEAD) else 0)
        # Moments: half of the matrices read what another one reads.
        total += tokens * n**2 * (active if experts > 1 else 1)
        if encodes:
            factors = experts if experts > 1 and has_own_moments(experts, n) else 1
            total += FACTOR_FLOPS * n**3 * factors + float(rows) * n**2
    return total


def _flops_per_second() -> float:
    """Of a float32 matrix product here, the better of three."""
    a = mx.random.normal((PROBE, PROBE))
    mx.eval(a, a @ a)
    best = float("inf")
    for _ in range(3):
        started = time.perf_counter()
        mx.eval(a @ a)
        best = min(best, time.perf_counter() - started)
    return 2.0 * PROBE**3 / best
