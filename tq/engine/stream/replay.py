"""What a budget and a policy would have done with recorded choices: hit rates, without a model or a disk.

Token after token, as an answer is written. The first tokens only fill the slots.
"""

from dataclasses import dataclass

import numpy as np

from tq.engine.stream.residency import EMPTY, Policy, Residency
from tq.engine.stream.trace import Trace

OPTIMAL = "optimal"  # Belady, 1966: the expert goes that is wanted again last, which only who knows the future can do
WARM_UP = 0.25  # of the tokens


@dataclass(frozen=True)
class Replay:
    """How one policy did with one budget.

    Attributes:
        hit_rate: Of the experts that tokens asked for after the warm-up.
        missed_bytes_per_token: Read from the disk.
    """

    policy: str
    budget_bytes: int
    hit_rate: float
    missed_bytes_per_token: float

    def tokens_per_second(self, compute_seconds: float, disk_gb_s: float) -> float:
        """What this allows if reads and computation follow each other. compute_seconds: of a token with all experts."""
        return 1 / (compute_seconds + self.missed_bytes_per_token / (disk_gb_s * 1e9))


def shares(budget_bytes: int, groups: list[tuple[int, int]]) -> list[int]:
    """Slots for groups of experts that look alike: the budget in proportion to what each takes, at least 1 each.

    Args:
        groups: Of each, how many experts there are, and the bytes of a slot.
    """
    whole = sum(n * size for n, size in groups)
    return [min(max(budget_bytes * n * size // whole // size, 1), n) for n, size in groups]


def replay(trace: Trace, policy: str, budget_bytes: int) -> Replay:
    """Run a trace through the slots that a budget allows.

    Args:
        policy: As in ``Policy.named``, or OPTIMAL.
    """
    groups: dict[tuple[int, int], list[int]] = {}
    for layer, alike in enumerate(zip(trace.n_experts, trace.expert_bytes, strict=True)):
        groups.setdefault(alike, []).append(layer)
    slots = shares(budget_bytes, [(len(layers) * n, size) for (n, size), layers in groups.items()])
    asked = missed = missed_bytes = 0
    first = int(trace.n_tokens * WARM_UP)
    for ((n_experts, size), layers), n_slots in zip(groups.items(), slots, strict=True):
        events = _events(trace, layers)
        run = _optimal if policy == OPTIMAL else _online
        misses = run(events, n_experts, len(layers), n_slots, policy)
        counted = misses[first * len(layers) :]
        asked += sum(len(experts) for _, experts in events[first * len(layers) :])
        missed += int(counted.sum())
        missed_bytes += int(counted.sum()) * size
    tokens = max(trace.n_tokens - first, 1)
    return Replay(policy, budget_bytes, 1 - missed / asked if asked else 0.0, missed_bytes / tokens)


Events = list[tuple[int, np.ndarray]]  # number of the layer in its group, the distinct experts that it runs


def _events(trace: Trace, layers: list[int]) -> Events:
    return [
        (i, np.unique(trace.chosen[layer][token]).astype(np.int64))
        for token in range(trace.n_tokens)
        for i, layer in enumerate(layers)
    ]


def _online(events: Events, n_experts: int, n_layers: int, n_slots: int, policy: str) -> np.ndarray:
    """Misses of each event."""
    residency = Residency(n_layers, n_experts, n_slots, Policy.named(policy))
    misses = np.zeros(len(events), np.int64)
    for i, (layer, experts) in enumerate(events):
        residency.use(layer, experts)
        missing = residency.missing(layer, experts)
        misses[i] = len(missing)
        if len(missing):
            residency.place(layer, missing, layer * n_experts + experts)
    return misses


def _optimal(events: Events, n_experts: int, n_layers: int, n_slots: int, _: str) -> np.ndarray:
    """Misses of each event if those go that are wanted again last."""
    keys = [layer * n_experts + experts for layer, experts in events]
    following = np.full(n_layers * n_experts, len(events))  # the event that wants each key again
    again = []  # of the keys of each event
    for each in reversed(keys):
        again.append(following[each].copy())
        following[each] = len(events) - len(again)
    again.reverse()
    there = np.full(n_slots, EMPTY)
    misses = np.zeros(len(events), np.int64)
    for i, each in enumerate(keys):
        following[each] = again[i]
        new = each[~np.isin(each, there)]
        misses[i] = len(new)
        worth = np.where(there == EMPTY, np.iinfo(np.int64).max, following[there])
        worth[np.isin(there, each)] = -1  # needed now
        places = np.argsort(-worth, kind="stable")[: len(new)]
        places = places[worth[places] >= 0]
        there[places] = new[: len(places)]
    return misses
