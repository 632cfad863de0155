"""Prefixes: contexts that requests have left behind, kept in memory for prompts that begin alike."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import psutil

from tq.engine.run import memory
from tq.engine.run.context import Context

LEAST_TOKENS = 16  # fewer are read again in no more time than bookkeeping takes
# Kept contexts give way when less of the machine's memory than this is available, whatever their budget is.
LEAST_AVAILABLE = 1 / 16
MOST_OF_WIRED = 0.95  # the same for what macOS lets a GPU have


class Prefixes:
    """Contexts, the one that was used longest ago first. One thread may use it.

    Attributes:
        nbytes: What they take.

    Args:
        budget_bytes: Of memory, for kept contexts and those of running requests together: kept ones give way.
    """

    def __init__(self, budget_bytes: int):
        self.budget_bytes = budget_bytes
        self.nbytes = 0
        self._kept: list[Context] = []

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def contexts(self) -> list[Context]:
        """The one that was used longest ago first."""
        return list(self._kept)

    def reach(self, tokens: Sequence[int]) -> int:
        """How many of these tokens `take` would spare."""
        return self._best(tokens)[0]

    def take(self, tokens: Sequence[int]) -> Context | None:
        """A context that holds a beginning of these tokens, as much as any does, and nothing else; None: none does.

        One that holds more than that stays here, and a copy is given away.
        """
        best, n = self._best(tokens)
        if not best:
            return None
        context = self._kept.pop(n)
        if len(context.tokens) > best:
            with contextlib.suppress(ValueError):
                copied = beginning(context, tokens)
                self._kept.append(context)
                return copied
        self._count()
        return context if context.keep(tokens) else None

    def add(self, context: Context) -> None:
        """Keep a context, unless another one can stand in for it. Those that it can stand in for are dropped."""
        if len(context.tokens) < LEAST_TOKENS:
            return
        for n, one in enumerate(self._kept):
            if one.reach(context.tokens) == len(context.tokens):
                self._kept.append(self._kept.pop(n))
                return
        self._kept = [one for one in self._kept if context.reach(one.tokens) < len(one.tokens)]
        self._kept.append(context)
        self._count()

    def make_room(self, in_use_bytes: int) -> None:
        """Drop what the budget, or the memory of the machine, has no room for."""
        self._count()
        dropped = False
        while self._kept and (self.nbytes + in_use_bytes > self.budget_bytes or memory_is_short()):
            self._kept.pop(0)
            self._count()
            mx.clear_cache()
            dropped = True
        if dropped:
            memory.settle()

    def clear(self) -> None:
        self._kept = []
        self._count()

    def _best(self, tokens: Sequence[int]) -> tuple[int, int]:
        """How many of these tokens a kept context has at most, and which: (0, -1) if none is worth it."""
        best, n = max(((context.reach(tokens), n) for n, context in enumerate(self._kept)), default=(0, -1))
        return (best, n) if best >= LEAST_TOKENS else (0, -1)

    def _count(self) -> None:
        self.nbytes = sum(context.nbytes + context.mark_bytes for context in self._kept)


def beginning(context: Context, tokens: Sequence[int], caches: list[Any] | None = None) -> Context:
    """A copy of what a context holds of these tokens.

    Args:
        caches: What holds the context's tokens, if it is not `context.caches` now.

    Raises:
        ValueError: It cannot be copied.
    """
    copied = context.copy(caches)
    copied.keep(tokens)
    return copied.copy()  # this one without the arrays of what has just been left out


def memory_is_short() -> bool:
    """Whether the machine, or what its GPU may have of it, is almost full."""
    if mx.metal.is_available():
        limit = mx.device_info().get("max_recommended_working_set_size", 0)
        if limit and mx.get_active_memory() > MOST_OF_WIRED * int(limit):
            return True
    found = psutil.virtual_memory()
    return found.available < LEAST_AVAILABLE * found.total
