"""Bringing experts into slots: they hold what the file holds, whatever came before; failures are forgotten."""

import threading

import mlx.core as mx
import numpy as np
import pytest

from tq.engine.model.safetensors import read_headers
from tq.engine.quantize import QuantSpec
from tq.engine.stream.pager import Arena, Pager, StoredLayer, StoredMatrix
from tq.engine.stream.residency import Policy
from tq.engine.stream.slots import Form
from tq.engine.stream.store import Piece, Store
from tq.errors import TQError

LAYERS, EXPERTS = 3, 9
FORM = Form(QuantSpec(bits=4, group_size=32), 2, 32, None, 32)


class PlainSlots:
    """Slots that hold the stored bytes; scales go there through ``fill``."""

    slot_bytes = 2 * 4 * 4 + 2 * 2

    def allocate(self, n):
        self.weight, self.scales = np.zeros((n, 32), np.uint8), np.zeros((n, 4), np.uint8)

    def target(self, piece, slot):
        return memoryview(self.weight[slot]) if piece.name == "weight" else None

    def fill(self, slot, pieces):
        assert set(pieces) == {"scales"}
        self.scales[slot] = pieces["scales"][1]


class CountingStore(Store):
    """Counts reads, may fail, and may be held up."""

    def __init__(self):
        super().__init__()
        self.reads, self.broken = [], set()
        self.gate = threading.Event()
        self.gate.set()

    def read(self, piece, first, buffers):
        self.gate.wait(10)
        self.reads.append((piece.name, first, len(buffers)))
        if first in self.broken:
            raise TQError("the disk is gone")
        return super().read(piece, first, buffers)


@pytest.fixture
def setup(tmp_path):
    """(pager of n slots and workers, its store, the values by layer and name)."""
    rng = np.random.default_rng(0)
    values = {
        f"{layer}.{matrix}.{name}": mx.array(array)
        for layer in range(LAYERS)
        for matrix in ("up", "down")
        for name, array in (
            ("weight", rng.integers(0, 2**32, (EXPERTS, 2, 4), np.uint32)),
            ("scales", rng.standard_normal((EXPERTS, 2, 1)).astype(np.float16)),
        )
    }
    path = tmp_path / "model.safetensors"
    mx.save_safetensors(str(path), values)
    headers = read_headers(path)[0]

    def make(n_slots, workers=3, prefetch="off"):
        layers = []
        for layer in range(LAYERS):
            matrices = {
                matrix: StoredMatrix(
                    FORM, tuple(Piece.of(n, headers[f"{layer}.{matrix}.{n}"]) for n in ("weight", "scales"))
                )
                for matrix in ("up", "down")
            }
            layers.append(StoredLayer(f"layers.{layer}", EXPERTS, matrices))
        arena = Arena({"up": PlainSlots(), "down": PlainSlots()}, LAYERS, EXPERTS, n_slots, Policy.named("lru"))
        store = CountingStore()
        return Pager([(layer, arena, i) for i, layer in enumerate(layers)], store, workers, prefetch), store

    def check(pager, layer, experts):
        arena = pager.layers[layer].arena
        for expert in experts:
            slot = pager.table(layer)[expert]
            assert slot >= 0
            for matrix, slots in arena.slots.items():
                for name, memory in (("weight", slots.weight), ("scales", slots.scales)):
                    stored = np.array(values[f"{layer}.{matrix}.{name}"])[expert]
                    assert memory[slot].tobytes() == stored.tobytes()

    return make, check


def array(*experts) -> np.ndarray:
    return np.array(sorted(experts))


@pytest.mark.parametrize("n_slots", [4, 7, LAYERS * EXPERTS])
@pytest.mark.parametrize("workers", [1, 3])
def test_slots_hold_what_the_file_holds(setup, n_slots, workers):
    make, check = setup
    pager, _ = make(n_slots, workers)
    rng = np.random.default_rng(n_slots)
    for _ in range(20):
        for layer in range(LAYERS):
            experts = np.sort(rng.choice(EXPERTS, rng.integers(1, 4), replace=False))
            pager.use(layer, experts, n_tokens=1)
            pager.bring(layer, experts)
            check(pager, layer, experts)
            guess = np.sort(rng.choice(EXPERTS, rng.integers(1, 4), replace=False))
            if layer + 1 < LAYERS:
                pager.ahead(layer + 1, guess, layer, experts)
                check(pager, layer, experts)  # nobody took their slots
    report = pager.report()
    assert report.early >= report.early_used > 0
    pager.close()


def test_neighbours_are_one_read_as_long_as_all_workers_read(setup):
    make, check = setup
    pager, store = make(9, workers=2)
    pager.bring(0, array(0, 1, 2, 3, 6, 7))
    check(pager, 0, [0, 1, 2, 3, 6, 7])
    assert sorted(store.reads) == sorted(
        (name, first, n) for name in ("scales", "weight") for first, n in ((0, 3), (3, 1), (6, 2)) for _ in "ab"
    )


def test_what_is_there_is_not_read_again(setup):
    make, _ = setup
    pager, store = make(6)
    pager.bring(0, array(1, 5))
    store.reads.clear()
    pager.use(0, array(1, 5), 1)
    pager.bring(0, array(1, 5))
    assert store.reads == []
    pager.bring(0, array(1, 4))
    assert {first for _, first, _ in store.reads} == {4}


def test_numbers_are_those_of_the_prompt_and_of_the_answer(setup):
    make, _ = setup
    pager, _ = make(4)
    for layer, experts, n_tokens in ((0, array(0, 1, 2), 5), (1, array(3), 5), (0, array(0, 4), 1), (1, array(3), 1)):
        pager.use(layer, experts, n_tokens)
        pager.bring(layer, experts)
    report = pager.report()
    one = 2 * PlainSlots.slot_bytes
    assert (report.prompt_hit_rate, report.prompt_read_bytes) == (0.0, 4 * one)
    assert (report.hit_rate, report.read_bytes_per_token) == (2 / 3, one)
    assert (report.budget_bytes, report.experts_bytes) == (4 * one, LAYERS * EXPERTS * one)


def test_a_read_that_fails_is_an_error_and_is_tried_again(setup):
    make, check = setup
    pager, store = make(4)
    store.broken = {2}
    with pytest.raises(TQError, match="the disk is gone"):
        pager.bring(1, array(0, 2))
    store.broken = set()
    pager.bring(1, array(0, 2))
    check(pager, 1, [0, 2])


def test_a_guess_that_fails_matters_only_to_who_wants_it(setup):
    make, check = setup
    pager, store = make(6)
    store.broken = {7}
    pager.bring(0, array(0))
    pager.ahead(1, array(7), 0, array(0))
    pager.bring(1, array(3))
    check(pager, 1, [3])
    with pytest.raises(TQError, match="the disk is gone"):
        pager.bring(1, array(7))


def test_an_expert_on_its_way_is_waited_for_and_keeps_its_slot(setup):
    make, check = setup
    pager, store = make(3)
    pager.bring(0, array(0))
    store.gate.clear()
    pager.ahead(1, array(4, 5), 0, array(0))
    threading.Timer(0.05, store.gate.set).start()
    pager.bring(1, array(4, 5))
    check(pager, 1, [4, 5])


def test_guesses_give_way_where_there_is_no_room(setup):
    make, check = setup
    pager, _ = make(3)
    pager.bring(0, array(0, 1))
    pager.ahead(1, array(4, 5, 6), 0, array(0, 1))  # room for one
    check(pager, 0, [0, 1])
    pager.bring(1, array(0, 1, 2))
    check(pager, 1, [0, 1, 2])


def test_an_interrupted_wait_leaves_nothing_half_read(setup, monkeypatch):
    make, check = setup
    pager, store = make(4)
    store.gate.clear()
    from concurrent.futures import Future

    def interrupted(self, timeout=None):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Future, "exception", interrupted)
        with pytest.raises(KeyboardInterrupt):
            pager.bring(0, array(2, 3))
    threading.Timer(0.05, store.gate.set).start()
    pager.bring(0, array(2, 3))
    check(pager, 0, [2, 3])


@pytest.mark.parametrize("submitted", [0, 1, 3])
def test_an_interrupt_while_reads_are_being_asked_for_leaves_nothing_half_read(setup, monkeypatch, submitted):
    make, check = setup
    pager, store = make(4)
    pager.bring(0, array(7, 8))
    real, calls = pager._pool.submit, []

    def submit(*task):
        calls.append(task)
        if len(calls) > submitted:
            raise KeyboardInterrupt
        return real(*task)

    monkeypatch.setattr(pager._pool, "submit", submit)
    store.gate.clear()
    with pytest.raises(KeyboardInterrupt):
        pager.bring(0, array(2, 5))
    monkeypatch.setattr(pager._pool, "submit", real)
    threading.Timer(0.05, store.gate.set).start()
    pager.bring(1, array(4))
    pager.bring(0, array(2, 5, 8))
    check(pager, 0, [2, 5, 8])
    check(pager, 1, [4])


def test_a_guess_that_fails_does_not_matter_when_its_slot_is_needed(setup):
    make, check = setup
    pager, store = make(3)
    store.broken = {7}
    pager.bring(0, array(0))
    pager.ahead(1, array(7), 0, array(0))
    pager.bring(1, array(1, 2, 3))
    check(pager, 1, [1, 2, 3])


def test_closing_after_a_guess_that_failed_closes_the_files(setup):
    make, _ = setup
    pager, store = make(6)
    store.broken = {7}
    pager.bring(0, array(0))
    pager.ahead(1, array(7), 0, array(0))
    pager.close()
    assert store._files == {}
    with pytest.raises(RuntimeError):
        pager._pool.submit(print)


def test_one_read_is_no_longer_than_what_a_thread_should_keep(setup, monkeypatch):
    make, check = setup
    monkeypatch.setattr("tq.engine.stream.pager.RUN_BYTES", 2 * 32)
    pager, store = make(9, workers=1)
    pager.bring(0, array(0, 1, 2, 3, 4))
    check(pager, 0, range(5))
    assert {(first, n) for _, first, n in store.reads} == {(0, 2), (2, 2), (4, 1)}
