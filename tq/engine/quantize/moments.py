"""Second moments E[x x^T] of the inputs of matrices, and what the experts of a layer share of them."""

from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from tq.engine.quantize.feedback import Feedback

ROWS = 4096  # summed by one matrix product: float32 adds so many squares without harm
# Experts have moments of their own where those of all experts of a matrix take no more than this, else common ones.
OWN_MOMENTS_BYTES = 1 << 30


@dataclass
class Moments:
    """Sums over the inputs that one activation had.

    Attributes:
        total: float32 (n, n), the sum of x x^T.
        count: How many x.
        own: float32 (experts, n, n), the sum for each expert, or None.
        counts: int64 (experts,), how many x each expert had, or None for a matrix without experts.
    """

    total: np.ndarray
    count: int
    own: np.ndarray | None = None
    counts: np.ndarray | None = None

    def mean(self) -> np.ndarray:
        """E[x x^T], float32 (n, n); zeros if there were no inputs."""
        return self.total / np.float32(max(self.count, 1))

    def feedback(self) -> Feedback | list[Feedback]:
        """For the encoder: one for the matrix, or one for each expert.

        An expert that saw few inputs takes part of its moments from all experts together: as if it had seen n more
        of the common ones, since c inputs determine the moments of n dimensions with a relative error of about n/c.
        """
        if self.own is None or self.counts is None:
            return Feedback(self.mean())
        n = self.total.shape[-1]
        common = self.mean() * np.float32(n)
        return [
            Feedback((own + common) / np.float32(count + n)) for own, count in zip(self.own, self.counts, strict=True)
        ]


def has_own_moments(n_experts: int, features: int) -> bool:
    """Whether each of so many experts gets moments of its own."""
    return 4 * n_experts * features**2 <= OWN_MOMENTS_BYTES


def moments_of(x: mx.array) -> Moments:
    """The moments of inputs (..., n)."""
    rows = x.reshape(-1, x.shape[-1])
    return Moments(_sum(rows), len(rows))


def expert_moments_of(x: mx.array, indices: mx.array, n_experts: int) -> Moments:
    """The moments of inputs of experts.

    Args:
        x: (..., 1, n), as mlx-lm's SwitchLinear gets it.
        indices: Experts; of a shape that broadcasts with (...).
        n_experts: How many there are.
    """
    n = x.shape[-1]
    rows = x.squeeze(-2)
    # gather_mm lets the rows of one token serve several experts, or one list of experts serve all tokens.
    shape = np.broadcast_shapes(rows.shape[:-1], indices.shape)
    experts = np.broadcast_to(np.array(indices), shape).reshape(-1)
    counts = np.bincount(experts, minlength=n_experts)
    if not has_own_moments(n_experts, n):
        return Moments(_sum(rows.reshape(-1, n)), rows.size // n, None, counts)
    rows = mx.broadcast_to(rows, (*shape, n)).reshape(-1, n)
    order = np.argsort(experts, kind="stable")
    ends = np.cumsum(counts)
    own = np.zeros((n_experts, n, n), np.float32)
    for expert, (count, end) in enumerate(zip(counts, ends, strict=True)):
        if count:
            own[expert] = _sum(rows[mx.array(order[end - count : end])])
    return Moments(own.sum(axis=0, dtype=np.float64).astype(np.float32), len(experts), own, counts)


def _sum(rows: mx.array) -> np.ndarray:
    """The sum of x x^T over rows (count, n), float32."""
    n = rows.shape[-1]
    parts = (rows[start : start + ROWS].astype(mx.float32) for start in range(0, len(rows), ROWS))
    if mx.default_device() == mx.Device(mx.cpu):
        total = np.zeros((n, n), np.float32)
        for block in map(np.array, parts):
            total += block.T @ block  # NumPy sees that the product is symmetric, and does half of the work
        return total
    on_device = mx.zeros((n, n))
    for part in parts:
        on_device = on_device + part.T @ part
        mx.eval(on_device)
    return np.array(on_device)
