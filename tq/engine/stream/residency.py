"""Which experts are in which slots, and which one goes when another comes: pure bookkeeping, without a byte of them.

An expert is known by its key, layer * experts + expert. What decides is its priority, which grows with each use:

    lru:   P = t                                  t: the number of the pass through the model in which it was used last
    lfu:   P = log2 sum_i 1                       over its uses i
    lrfu:  P = log2 sum_i 2^(t_i / half_life)     Lee et al., 2001: between the two, and the same order at all times

Layers come in turn, so that an expert of a layer behind the current one has had one chance more to be used in this pass
than one of a layer ahead, and its next one is farther off: among equals it goes first.
"""

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from tq.errors import UsageError

PolicyName = Literal["lru", "lfu", "lrfu"]
POLICIES: tuple[PolicyName, ...] = get_args(PolicyName)
HALF_LIFE = 64.0  # passes, of lrfu
EMPTY = -1


@dataclass(frozen=True)
class Policy:
    """How priorities grow.

    Attributes:
        half_life: Passes in which a use loses half its weight: 0 only the last counts, infinite all count alike.
    """

    half_life: float

    @classmethod
    def named(cls, name: str) -> "Policy":
        """Raises UsageError for an unknown name."""
        if name not in POLICIES:
            raise UsageError(f"the policy {name!r} is not one of {', '.join(POLICIES)}")
        return cls({"lru": 0.0, "lfu": float("inf"), "lrfu": HALF_LIFE}[name])

    @property
    def pass_weight(self) -> float:
        """What one pass adds to the priority of a use."""
        return 1.0 / self.half_life if self.half_life else 1.0

    def used(self, priorities: np.ndarray, t: int) -> np.ndarray:
        """Priorities after a use in pass ``t``."""
        now = t * self.pass_weight
        return np.full_like(priorities, now) if self.half_life == 0 else np.logaddexp2(priorities, now)


class Residency:
    """The slots of one arena.

    Args:
        n_layers, n_experts: Of the layers that share it.
        n_slots: At most one expert each.
        policy: Which experts go first.
        pinned: Keys that never go once they are there.

    Attributes:
        slot_of: int32 (n_layers * n_experts): the slot of each key, or EMPTY.
        key_of: int32 (n_slots): the key in each slot, or EMPTY.
    """

    def __init__(
        self, n_layers: int, n_experts: int, n_slots: int, policy: Policy, pinned: frozenset[int] = frozenset()
    ):
        self.n_experts, self.n_slots, self.policy = n_experts, n_slots, policy
        self.slot_of = np.full(n_layers * n_experts, EMPTY, np.int32)
        self.key_of = np.full(n_slots, EMPTY, np.int32)
        self.passes = 0
        self._priority = np.full(n_layers * n_experts, -np.inf)
        self._kept = np.zeros(n_layers * n_experts, bool)
        self._kept[list(pinned)] = True
        self._n_free = n_slots
        self._layer = n_layers

    def use(self, layer: int, experts: np.ndarray) -> None:
        """Note that a layer runs these experts (distinct) now, whether they are there or not."""
        if layer <= self._layer:
            self.passes += 1
        self._layer = layer
        keys = layer * self.n_experts + experts
        self._priority[keys] = self.policy.used(self._priority[keys], self.passes)

    def missing(self, layer: int, experts: np.ndarray) -> np.ndarray:
        """Those of the experts that are in no slot."""
        return experts[self.slot_of[layer * self.n_experts + experts] == EMPTY]

    def room_for(self, needed: np.ndarray) -> int:
        """How many slots can be had without taking one from a pinned key or from ``needed`` ones."""
        return self.n_slots - int(np.count_nonzero(self._kept_slots(needed)))

    def place(self, layer: int, experts: np.ndarray, needed: np.ndarray) -> np.ndarray:
        """Give slots to experts (distinct) that have none; others lose theirs.

        Args:
            needed: Keys that must stay.

        Returns:
            The slot of each expert, fewer than asked for if there is no more room: the first ones.
        """
        experts = experts[: self.room_for(needed)]
        keys = layer * self.n_experts + experts
        n_taken = len(keys) - min(len(keys), self._n_free)
        slots = np.flatnonzero(self.key_of == EMPTY)[: len(keys) - n_taken] if self._n_free else np.zeros(0, np.int64)
        if n_taken:
            slots = np.concatenate([slots, self._least(n_taken, needed)])
            self.slot_of[self.key_of[slots[-n_taken:]]] = EMPTY
        self._n_free -= len(keys) - n_taken
        self.key_of[slots] = keys
        self.slot_of[keys] = slots
        return slots

    def drop(self, layer: int, experts: np.ndarray) -> None:
        """Forget experts that are in slots: what is there is not what it should be."""
        keys = layer * self.n_experts + experts
        slots = self.slot_of[keys]
        self.key_of[slots], self.slot_of[keys] = EMPTY, EMPTY
        self._n_free += len(slots)

    def clear(self) -> None:
        """Forget all that is in slots, but not how often it was used."""
        self.slot_of[:], self.key_of[:] = EMPTY, EMPTY
        self._n_free = self.n_slots

    def _least(self, n: int, needed: np.ndarray) -> np.ndarray:
        """The slots of the n keys that are worth least."""
        worth = self._priority[self.key_of] + self.policy.pass_weight * (self.key_of // self.n_experts > self._layer)
        worth[(self.key_of == EMPTY) | self._kept_slots(needed)] = np.inf
        return np.argpartition(worth, n - 1)[:n]

    def _kept_slots(self, needed: np.ndarray) -> np.ndarray:
        """bool (n_slots): which must stay. An empty slot has the key -1, the last one, and is none of them."""
        kept = self._kept[self.key_of] & (self.key_of != EMPTY)
        kept[self.slot_of[needed][self.slot_of[needed] != EMPTY]] = True
        return kept
