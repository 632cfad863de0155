"""Finding out by trying: what is faster stays, what is not is switched off, and things may change."""

import pytest

from tq.engine.stream.trial import HELD, ROUND, ROUNDS, Trial

TRIAL = 2 * ROUND * (ROUNDS + 1)  # passes after which there is a verdict, and some


def after(trial: Trial, with_it: float, without: float, passes: int = TRIAL) -> Trial:
    for n in range(passes):
        noise = 1 + 0.01 * (n % 3)
        trial.passed((with_it if trial.active else without) * noise)
    return trial


@pytest.mark.parametrize(("with_it", "without", "pays"), [(1.0, 1.5, True), (1.5, 1.0, False), (1.0, 1.0, False)])
def test_the_faster_way_is_kept(with_it, without, pays):
    trial = after(Trial("auto"), with_it, without)
    assert (trial.verdict, trial.active) == (pays, pays)


def test_both_ways_are_tried_first():
    trial, seen = Trial("auto"), []
    for _ in range(2 * ROUND):
        seen.append(trial.active)
        trial.passed(1.0)
    assert seen == [False] * ROUND + [True] * ROUND


def test_a_verdict_is_tried_again():
    trial = after(Trial("auto"), 1.0, 1.5)
    after(trial, 1.5, 1.0, HELD + TRIAL)
    assert trial.verdict is False and not trial.active


def test_a_stall_does_not_decide():
    trial = Trial("auto")
    for n in range(TRIAL):
        stalled = trial.active and n % (2 * ROUND) == ROUND + 2
        trial.passed(50.0 if stalled else 1.0 if trial.active else 1.5)
    assert trial.verdict is True


@pytest.mark.parametrize(("mode", "active"), [("on", True), ("off", False)])
def test_a_person_may_decide(mode, active):
    trial = after(Trial(mode), 1.0, 2.0 if not active else 0.5)
    assert trial.active is active and trial.verdict is None
