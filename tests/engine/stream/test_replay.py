"""Recorded choices replayed: the numbers of a cache that is simple enough to be right, and an optimum that is one."""

from itertools import product

import numpy as np
import pytest

from tq.engine.stream.replay import OPTIMAL, WARM_UP, replay, shares
from tq.engine.stream.residency import POLICIES
from tq.engine.stream.trace import Recorder, Trace
from tq.errors import TQError


def random_trace(n_tokens=80, n_layers=3, n_experts=12, k=2, seed=0) -> Trace:
    """Some experts are likelier than others, and the last ones likelier still."""
    rng = np.random.default_rng(seed)
    chosen = []
    for _ in range(n_layers):
        base = rng.dirichlet(np.full(n_experts, 0.5))
        rows, last = [], rng.choice(n_experts, k, replace=False)
        for _ in range(n_tokens):
            weights = base.copy()
            weights[last] += 0.3
            last = rng.choice(n_experts, k, replace=False, p=weights / weights.sum())
            rows.append(last)
        chosen.append(np.array(rows, np.uint16))
    return Trace(tuple(chosen), (n_experts,) * n_layers, (1000,) * n_layers)


def test_one_layer_with_lru_is_a_list_of_the_last_used():
    trace, n_slots = random_trace(n_layers=1), 5
    recent: list[int] = []
    hits = asked = 0
    for t, chosen in enumerate(trace.chosen[0].tolist()):
        wanted = set(chosen)
        if t >= trace.n_tokens * WARM_UP:
            asked += len(wanted)
            hits += len(wanted & set(recent))
        recent = [expert for expert in recent if expert not in wanted] + sorted(wanted)
        recent = recent[-n_slots:]
    found = replay(trace, "lru", n_slots * 1000)
    # Experts of one token are used at the same time: which of two goes first is free, so that rates differ by a little.
    assert found.hit_rate == pytest.approx(hits / asked, abs=0.05)


@pytest.mark.parametrize("n_slots", [3, 6, 14, 20])
def test_nothing_beats_the_optimum_and_all_is_enough(n_slots):
    trace = random_trace()
    rates = {policy: replay(trace, policy, n_slots * 1000).hit_rate for policy in (*POLICIES, OPTIMAL)}
    assert max(rates.values()) == rates[OPTIMAL]
    assert rates[OPTIMAL] > rates["lru"] or n_slots < 6
    whole = replay(trace, "lru", trace.experts_bytes)
    assert whole.hit_rate > 0.98


def test_the_optimum_is_one():
    """Against all that could be evicted, on a trace so short that this can be tried."""
    chosen = np.array([[0], [1], [2], [0], [3], [1], [0], [2]], np.uint16)
    trace = Trace((chosen,), (4,), (10,))

    def least_misses(there: frozenset, t: int) -> int:
        if t == len(chosen):
            return 0
        wanted = int(chosen[t][0])
        counts = t >= len(chosen) * WARM_UP
        if wanted in there:
            return least_misses(there, t + 1)
        after = [there | {wanted}] if len(there) < 2 else [(there - {gone}) | {wanted} for gone in there]
        return counts + min(least_misses(frozenset(each), t + 1) for each in after)

    found = replay(trace, OPTIMAL, 20)
    assert found.missed_bytes_per_token * 6 / 10 == least_misses(frozenset(), 0)


def test_speed_is_computation_and_disk_one_after_the_other():
    found = replay(random_trace(), "lru", 6000)
    missed = found.missed_bytes_per_token
    assert found.tokens_per_second(0.5, 2.0) == pytest.approx(1 / (0.5 + missed / 2e9))


def test_budgets_are_shared_by_size():
    assert shares(100, [(10, 10), (10, 10)]) == [5, 5]
    assert shares(60, [(8, 10), (4, 10)]) == [4, 2]
    assert shares(5, [(10, 10), (10, 20)]) == [1, 1]
    assert shares(10**9, [(10, 10), (10, 20)]) == [10, 10]


def test_a_trace_survives_its_file_and_is_small(tmp_path):
    trace = random_trace(n_tokens=500)
    trace.save(tmp_path / "trace.npz")
    found = Trace.load(tmp_path / "trace.npz")
    assert all(np.array_equal(a, b) for a, b in zip(found.chosen, trace.chosen, strict=True))
    assert (found.n_experts, found.expert_bytes) == (trace.n_experts, trace.expert_bytes)
    assert (tmp_path / "trace.npz").stat().st_size < 500 * 3 * 2 * 2
    (tmp_path / "other").write_bytes(b"PK nothing")
    with pytest.raises(TQError, match="is no trace of experts"):
        Trace.load(tmp_path / "other")


def test_a_recorder_keeps_tokens_that_went_through_all_layers():
    recorder = Recorder([4, 4], [10, 10])
    recorder.add(0, np.array([[[0, 1], [2, 3]]]))
    recorder.add(1, np.array([[[3, 1], [2, 0]]]))
    recorder.add(0, np.array([[[1, 2]]]))
    trace = recorder.trace()
    assert trace.n_tokens == 2 and trace.active_bytes == 40 and trace.experts_bytes == 80
    assert [chosen.tolist() for chosen in trace.chosen] == [[[0, 1], [2, 3]], [[3, 1], [2, 0]]]


@pytest.mark.parametrize(("policy", "n_slots"), list(product((*POLICIES, OPTIMAL), [1, 2])))
def test_fewer_slots_than_a_token_needs_are_no_failure(policy, n_slots):
    assert 0 <= replay(random_trace(n_tokens=20), policy, n_slots * 1000).hit_rate < 1


def test_a_damaged_trace_is_an_error_in_a_sentence(tmp_path):
    path = tmp_path / "trace.npz"
    Trace((np.zeros((50, 2), np.uint16),) * 2, (4, 4), (10, 10)).save(path)
    whole = path.read_bytes()
    damaged = [whole[:cut] for cut in (0, 10, len(whole) // 2, len(whole) - 5)]
    damaged.append(whole[:60] + bytes(b ^ 0xFF for b in whole[60:70]) + whole[70:])
    for data in damaged:
        path.write_bytes(data)
        with pytest.raises(TQError, match="is no trace of experts"):
            Trace.load(path)
    Trace((np.full((5, 2), 4, np.uint16),), (4,), (10,)).save(path)
    with pytest.raises(TQError, match="a layer chose what is no expert of it"):
        Trace.load(path)
