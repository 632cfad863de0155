"""Which experts are in slots: the bookkeeping is sound whatever happens, and those go that a policy values least."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tq.engine.stream.residency import EMPTY, HALF_LIFE, POLICIES, Policy, Residency
from tq.errors import UsageError

LAYERS, EXPERTS = 3, 6
CALLS = st.lists(
    st.tuples(st.integers(0, LAYERS - 1), st.sets(st.integers(0, EXPERTS - 1), min_size=1, max_size=4)), max_size=40
)


def array(experts) -> np.ndarray:
    return np.array(sorted(experts), np.int64)


def value(name: str, uses: list[int], now_behind: bool) -> float:
    """Of an expert with uses in these passes, by the definition: larger stays."""
    ahead = 0 if now_behind else 1
    if name == "lru":
        return uses[-1] + ahead
    if name == "lfu":
        return len(uses)
    return sum(2.0 ** ((t + ahead) / HALF_LIFE) for t in uses)


@pytest.mark.parametrize("name", POLICIES)
@given(calls=CALLS, n_slots=st.integers(1, 10), pinned=st.sets(st.integers(0, LAYERS * EXPERTS - 1), max_size=3))
@settings(max_examples=60, deadline=None)
def test_the_least_valued_go_and_nothing_that_is_needed(name, calls, n_slots, pinned):
    residency = Residency(LAYERS, EXPERTS, n_slots, Policy.named(name), frozenset(pinned))
    uses: dict[int, list[int]] = {}
    passes, before = 0, LAYERS
    for layer, chosen in calls:
        experts = array(chosen)
        passes += layer <= before
        before = layer
        residency.use(layer, experts)
        keys = layer * EXPERTS + experts
        for key in keys.tolist():
            uses.setdefault(key, []).append(passes)
        held = {int(key) for key in residency.key_of if key != EMPTY}
        missing = residency.missing(layer, experts)
        assert set((layer * EXPERTS + missing).tolist()) == set(keys.tolist()) - held
        slots = residency.place(layer, missing, keys)

        placed = set((layer * EXPERTS + missing[: len(slots)]).tolist())
        kept = held & (set(keys.tolist()) | pinned)
        assert len(placed) == min(len(missing), n_slots - len(kept))
        gone = held - {int(key) for key in residency.key_of if key != EMPTY}
        assert not gone & kept
        assert len(gone) == max(0, len(held) + len(placed) - n_slots)
        if gone and held - gone - kept:
            least = min(value(name, uses[key], key // EXPERTS <= layer) for key in held - gone - kept)
            most = max(value(name, uses[key], key // EXPERTS <= layer) for key in gone)
            assert most <= least * (1 + 1e-9)
        for key, slot in enumerate(residency.slot_of.tolist()):
            assert slot == EMPTY or residency.key_of[slot] == key
        assert np.count_nonzero(residency.key_of != EMPTY) == np.count_nonzero(residency.slot_of != EMPTY)


def test_among_equals_a_layer_that_has_run_gives_way_to_one_that_is_still_to_come():
    residency = Residency(3, 2, 2, Policy.named("lru"))
    for layer in (0, 2):  # both used in pass 1
        residency.use(layer, array({0}))
        residency.place(layer, array({0}), array({0}))
    residency.use(0, array({1}))
    residency.use(1, array({0}))
    residency.place(1, array({0}), array({2}))
    assert residency.slot_of[0] == EMPTY and residency.slot_of[4] != EMPTY


def test_frequency_outlives_a_burst_where_recency_does_not():
    def survives(name):
        residency = Residency(1, 8, 2, Policy.named(name))
        for chosen in [0] * 9 + [1, 2]:
            experts = array({chosen})
            residency.use(0, experts)
            residency.place(0, residency.missing(0, experts), experts)
        return residency.slot_of[0] != EMPTY

    assert survives("lfu") and survives("lrfu") and not survives("lru")


def test_a_dropped_expert_leaves_its_slot_free():
    residency = Residency(1, 4, 2, Policy.named("lru"))
    residency.use(0, array({1, 2}))
    residency.place(0, array({1, 2}), array({1, 2}))
    residency.drop(0, array({1}))
    assert residency.missing(0, array({1, 2})).tolist() == [1]
    residency.place(0, array({3}), array({3}))
    assert residency.missing(0, array({2, 3})).size == 0


def test_an_unknown_policy_is_refused():
    with pytest.raises(UsageError, match="lru, lfu, lrfu"):
        Policy.named("fifo")
