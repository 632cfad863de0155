"""What a person can say about streaming, checked."""

from dataclasses import dataclass
from typing import Literal, cast, get_args

from tq import settings
from tq.engine.stream.residency import Policy
from tq.errors import UsageError

Prefetch = Literal["auto", "on", "off"]
MOST_WORKERS = 64
AUTO = "auto"


@dataclass(frozen=True)
class StreamSettings:
    """How experts are streamed.

    Attributes:
        budget_bytes: Memory for experts; None: what is free.
        workers: Reads at the same time.
        policy: Which experts go first: lru, lfu or lrfu.
        prefetch: Whether experts are read before their layer asks for them; auto: where that turns out to be faster.
        max_active_experts: Run at most so many experts of a token, its best ones: other output. None: all.

    Raises:
        UsageError: A value is not valid.
    """

    budget_bytes: int | None = None
    workers: int = 8
    policy: str = "lrfu"
    prefetch: Prefetch = "auto"
    max_active_experts: int | None = None

    def __post_init__(self) -> None:
        if self.budget_bytes is not None and self.budget_bytes <= 0:
            raise UsageError("the budget for experts must be more than 0 bytes")
        if not 1 <= self.workers <= MOST_WORKERS:
            raise UsageError(f"the number of workers is {self.workers}: it must be from 1 to {MOST_WORKERS}")
        Policy.named(self.policy)
        if self.prefetch not in get_args(Prefetch):
            raise UsageError(f"prefetch {self.prefetch!r} is not one of {', '.join(get_args(Prefetch))}")
        if self.max_active_experts is not None and self.max_active_experts < 1:
            raise UsageError("at least 1 expert must be active")

    @classmethod
    def from_options(
        cls, budget: str, workers: int, policy: str, prefetch: str, max_active_experts: int | None
    ) -> "StreamSettings":
        """The same from what a person types. ``budget``: a size such as 4GB, or auto."""
        size = None if budget == AUTO else settings.size_bytes(budget)
        return cls(size, workers, policy, cast(Prefetch, prefetch), max_active_experts)
