"""Brings experts into slots: what a layer needs now is read by several threads at once, and what comes next ahead.

Slots of layers whose experts look alike are one arena, so that layers share the budget. One thread asks; the slots that
it was given stay as they are until its next request, at which all that reads them must have run.
"""

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from tq.engine.stream.residency import Policy, Residency
from tq.engine.stream.slots import Form, Slots
from tq.engine.stream.stats import Stats, StreamReport, report
from tq.engine.stream.store import Piece, Store
from tq.engine.stream.trace import Recorder
from tq.engine.stream.trial import Trial

RUN_BYTES = 16 << 20  # of one piece in one read: longer ones are no faster, and a thread keeps as much to reorder codes


@dataclass(frozen=True)
class StoredMatrix:
    """One matrix of all experts of a layer, in a checkpoint."""

    form: Form
    pieces: tuple[Piece, ...]


@dataclass(frozen=True)
class StoredLayer:
    """The experts of one layer, in a checkpoint.

    Attributes:
        path: Of the module that runs them.
        matrices: By their names in that module, in the order in which they run.
    """

    path: str
    n_experts: int
    matrices: dict[str, StoredMatrix]

    @property
    def expert_bytes(self) -> int:
        """What one expert takes on the disk."""
        return sum(piece.size_bytes for matrix in self.matrices.values() for piece in matrix.pieces)


class Arena:
    """Slots for experts that look alike.

    Args:
        slots: By the name of the matrix.
        n_layers, n_experts: That share them; experts of the layer with the most.

    Attributes:
        settled: False while slots change hands: after an interrupt there, nobody knows what is in them.
    """

    def __init__(self, slots: dict[str, Slots], n_layers: int, n_experts: int, n_slots: int, policy: Policy):
        self.slots = slots
        self.residency = Residency(n_layers, n_experts, n_slots, policy)
        self.settled = True
        for each in slots.values():
            each.allocate(n_slots)

    @property
    def size_bytes(self) -> int:
        return self.residency.n_slots * sum(each.slot_bytes for each in self.slots.values())


@dataclass
class _Layer:
    stored: StoredLayer
    arena: Arena
    index: int  # among the layers of the arena


@dataclass(eq=False)
class _Arrival:
    """Reads of experts of a layer that are going on."""

    layer: int
    experts: np.ndarray
    futures: list[Future]
    keys: set[int]


class Pager:
    """All experts of a model.

    Args:
        layers: In the order in which they run, each with its arena and its number there.
        workers: Reads at the same time.
        prefetch: on, off or auto: whether layers should guess what the next one needs.
    """

    def __init__(self, layers: Sequence[tuple[StoredLayer, Arena, int]], store: Store, workers: int, prefetch: str):
        self.layers = [_Layer(*layer) for layer in layers]
        self.store = store
        self.workers = workers
        self.prompt, self.answer = Stats(), Stats()
        self.stats = self.prompt  # of the phase that it is in
        self.guessing = Trial(prefetch)
        self._pool = ThreadPoolExecutor(workers, "experts")
        self.recorder: Recorder | None = None  # told what layers choose
        self._began: float | None = None  # this pass, if it is one of an answer
        self._arrivals: list[_Arrival] = []
        self._early: set[tuple[int, int]] = set()
        self._staging = threading.local()

    @property
    def arenas(self) -> list[Arena]:
        return list({id(layer.arena): layer.arena for layer in self.layers}.values())

    @property
    def budget_bytes(self) -> int:
        """What all slots take."""
        return sum(arena.size_bytes for arena in self.arenas)

    def most(self, layer: int) -> int:
        """The experts of a layer that can be in memory at once."""
        return self.layers[layer].arena.residency.n_slots

    def table(self, layer: int) -> np.ndarray:
        """int32 (experts): the slot of each expert of a layer, for those that the last ``bring`` asked for."""
        at = self.layers[layer]
        residency = at.arena.residency
        return residency.slot_of[at.index * residency.n_experts : (at.index + 1) * residency.n_experts]

    def use(self, layer: int, experts: np.ndarray, n_tokens: int) -> None:
        """Note that a layer runs these experts (distinct, ascending) for so many tokens in this pass."""
        at = self.layers[layer]
        if layer == 0:
            self._begin_pass(n_tokens)
        self.stats.asked += len(experts)
        self.stats.hits += len(experts) - len(at.arena.residency.missing(at.index, experts))
        at.arena.residency.use(at.index, experts)
        if self._early:
            used = self._early & {(layer, int(expert)) for expert in experts}
            self.stats.early_used += len(used)
            self._early -= used

    def _begin_pass(self, n_tokens: int) -> None:
        now = time.perf_counter()
        if self._began is not None:
            self.guessing.passed(now - self._began)
        self._began = now if n_tokens == 1 else None
        self.stats = self.prompt if n_tokens > 1 else self.answer
        self.stats.passes += 1

    def guesses(self, layer: int) -> bool:
        """Whether ``ahead`` is wanted of the layer before ``layer`` now."""
        if not self.guessing.active or layer >= len(self.layers):
            return False
        at = self.layers[layer]
        return bool((self.table(layer)[: at.stored.n_experts] < 0).any())

    def bring(self, layer: int, experts: np.ndarray) -> None:
        """Have at most ``most`` experts (distinct, ascending) of a layer in their slots.

        Raises:
            TQError: They cannot be read.
        """
        at = self.layers[layer]
        residency = at.arena.residency
        self._settle(at.arena)
        start = time.perf_counter()
        missing = residency.missing(at.index, experts)
        keys = at.index * residency.n_experts + experts
        wanted = set(keys.tolist())
        if len(missing) > residency.room_for(np.concatenate([keys, self._arriving(at.arena)])):
            self._finish(lambda arrival: self.layers[arrival.layer].arena is at.arena, wanted)
        if len(missing):
            arrived = self._read(layer, missing, np.concatenate([keys, self._arriving(at.arena)]))
            assert len(arrived) == len(missing), "more experts than slots"
        if self._arrivals:
            self._finish(lambda other: other.layer == layer and bool(other.keys & wanted), wanted)
            self.stats.waited_seconds += time.perf_counter() - start

    def ahead(self, layer: int, experts: np.ndarray, needed_layer: int, needed: np.ndarray) -> None:
        """Begin to read experts (distinct, ascending) of a layer that will probably ask for them.

        Args:
            needed: Experts of ``needed_layer``, the current one, whose slots must stay as they are.
        """
        at, now = self.layers[layer], self.layers[needed_layer]
        residency = at.arena.residency
        self._settle(at.arena)
        missing = residency.missing(at.index, experts)
        if not len(missing):
            return
        kept = self._arriving(at.arena)
        if now.arena is at.arena:
            kept = np.concatenate([kept, now.index * residency.n_experts + needed])
        # What is there already and will be wanted must not go for what is not.
        kept = np.concatenate([kept, at.index * residency.n_experts + experts])
        coming = self._read(layer, missing, kept)
        self.stats.early += len(coming)
        self._early |= {(layer, int(expert)) for expert in coming}

    def record(self) -> Recorder:
        """From now on, write down what layers choose."""
        stored = [layer.stored for layer in self.layers]
        self.recorder = Recorder([layer.n_experts for layer in stored], [layer.expert_bytes for layer in stored])
        return self.recorder

    def close(self) -> None:
        """End the threads and close the files."""
        self._pool.shutdown(cancel_futures=True)
        self._arrivals.clear()
        self.store.close()

    def clear_stats(self) -> None:
        """Count from here on."""
        self.prompt, self.answer = Stats(), Stats()
        self.stats = self.prompt

    def report(self) -> StreamReport:
        """The numbers so far."""
        size = sum(layer.stored.n_experts * layer.stored.expert_bytes for layer in self.layers)
        return report(self.prompt, self.answer, self.budget_bytes, size, self.guessing.verdict)

    def _arriving(self, arena: Arena) -> np.ndarray:
        keys = [key for each in self._arrivals if self.layers[each.layer].arena is arena for key in each.keys]
        return np.array(keys, np.int64)

    def _settle(self, arena: Arena) -> None:
        """If Ctrl-C came while slots changed hands: let all reads end, and forget what is there."""
        if arena.settled:
            return
        self._pool.shutdown()  # knows also of a read that no arrival has been told of yet
        self._pool = ThreadPoolExecutor(self.workers, "experts")
        self._arrivals = [arrival for arrival in self._arrivals if self.layers[arrival.layer].arena is not arena]
        arena.residency.clear()
        arena.settled = True

    def _finish(self, which: Callable[[_Arrival], bool], wanted: set[int]) -> None:
        """Wait for arrivals of one arena. Those that fail are forgotten; the first error of a wanted one is raised."""
        failure: BaseException | None = None
        for arrival in [arrival for arrival in self._arrivals if which(arrival)]:
            errors = [error for future in arrival.futures if (error := future.exception()) is not None]
            self._arrivals.remove(arrival)  # not before it is complete: Ctrl-C may come while waiting
            if errors:
                failure = failure or (errors[0] if arrival.keys & wanted else None)
                at = self.layers[arrival.layer]
                at.arena.residency.drop(at.index, arrival.experts)
        if failure is not None:
            raise failure

    def _read(self, layer: int, experts: np.ndarray, needed: np.ndarray) -> np.ndarray:
        """Give slots to experts, as many as have room, and begin to read these. Returns them."""
        at = self.layers[layer]
        residency = at.arena.residency
        at.arena.settled = False
        slots = residency.place(at.index, experts, needed)
        experts = experts[: len(slots)]
        arrival = _Arrival(layer, experts, [], set((at.index * residency.n_experts + experts).tolist()))
        self._arrivals.append(arrival)
        # Neighbours are read at once, as far as all threads have something to do.
        widest = max(piece.size_bytes for matrix in at.stored.matrices.values() for piece in matrix.pieces)
        longest = min(-(-len(experts) // self.workers), max(RUN_BYTES // widest, 1))
        for first, end in _runs(experts, longest):
            for name, matrix in at.stored.matrices.items():
                task = self._pool.submit(self._bring, at, matrix, name, int(experts[first]), slots[first:end])
                arrival.futures.append(task)
        at.arena.settled = True
        return experts

    def _bring(self, at: _Layer, matrix: StoredMatrix, name: str, first: int, slots: np.ndarray) -> None:
        """Read one matrix of consecutive experts into their slots."""
        there = at.arena.slots[name]
        staged: dict[str, tuple[Piece, np.ndarray]] = {}
        size, stats = 0, self.stats
        stats.begin_read()
        try:
            for piece in matrix.pieces:
                buffers = [target for slot in slots if (target := there.target(piece, int(slot))) is not None]
                if not buffers:
                    memory = self._stage(piece, len(slots))
                    staged[piece.name] = piece, memory
                    buffers = [memoryview(row) for row in memory]
                size += self.store.read(piece, first, buffers)
        finally:
            stats.end_read(size)
        for i, slot in enumerate(slots if staged else ()):
            there.fill(int(slot), {name: (piece, memory[i]) for name, (piece, memory) in staged.items()})

    def _stage(self, piece: Piece, n: int) -> np.ndarray:
        """uint8 (n, size_bytes) of this thread, until it asks for the same name again."""
        kept: dict[str, np.ndarray] = vars(self._staging)
        size = n * piece.size_bytes
        if piece.name not in kept or kept[piece.name].size < size:
            kept[piece.name] = np.empty(size, np.uint8)
        return kept[piece.name][:size].reshape(n, piece.size_bytes)


def _runs(experts: np.ndarray, longest: int) -> list[tuple[int, int]]:
    """(first, end) of consecutive numbers in ascending ones, at most ``longest`` at once."""
    runs: list[tuple[int, int]] = []
    first = 0
    for i in range(1, len(experts) + 1):
        if i == len(experts) or experts[i] != experts[i - 1] + 1 or i - first == longest:
            runs.append((first, i))
            first = i
    return runs
