"""What budgets and policies would bring a streamed model: its choices for a text, recorded once and replayed for each.

Predicted speeds add what computing a token takes at the bandwidth of memory and what reading the missing experts takes
at that of the disk: as if nothing were read while something is computed.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from time import perf_counter
from typing import Any

import mlx.core as mx
import numpy as np

from tq.engine.events import Progress
from tq.engine.model.load import LoadedModel
from tq.engine.run.evaluate import cut_windows
from tq.engine.run.generate import prompt_cache
from tq.engine.stream.pager import Pager
from tq.engine.stream.replay import OPTIMAL, replay
from tq.engine.stream.residency import POLICIES
from tq.engine.stream.store import Piece, Store
from tq.engine.stream.trace import Trace

STEP = 64  # tokens that are read at once
DISK_BYTES = 256 << 20  # read to find out how fast the disk is


@dataclass(frozen=True)
class CacheRow:
    """One policy with one budget.

    Attributes:
        share: Of all experts that fit.
        tokens_per_second: Predicted.
    """

    policy: str
    share: float
    budget_bytes: int
    hit_rate: float
    read_bytes_per_token: float
    tokens_per_second: float

    def to_dict(self) -> dict[str, Any]:
        """The fields, ready for JSON."""
        return asdict(self)


def record(loaded: LoadedModel, pager: Pager, text: str, n_tokens: int) -> Iterator[Progress | Trace]:
    """Let a model read the first tokens of a text, and give what its layers chose at last.

    Raises:
        UsageError: The text is too short.
    """
    window = cut_windows(loaded.tokenizer, text, n_tokens)[0, :n_tokens]
    caches = prompt_cache(loaded.model, None)
    recorder = pager.record()
    try:
        for start in range(0, n_tokens, STEP):
            yield Progress(start, n_tokens, "tokens", "reading")
            mx.eval(loaded.model(mx.array(window[start : start + STEP])[None], cache=caches))
        yield Progress(n_tokens, n_tokens, "tokens", "reading")
    finally:
        pager.recorder = None
    yield recorder.trace()


def compare(
    trace: Trace, shares: list[float], other_bytes: int, disk_gb_s: float, memory_gb_s: float
) -> Iterator[Progress | CacheRow]:
    """Every policy, and the best that there could be, with every budget.

    Args:
        shares: Budgets, as shares of all experts.
        other_bytes: What a token reads of the model beside experts.
        disk_gb_s, memory_gb_s: Bandwidths.
    """
    seconds = (trace.active_bytes + other_bytes) / (memory_gb_s * 1e9)
    todo = [(share, policy) for share in shares for policy in (*POLICIES, OPTIMAL)]
    for done, (share, policy) in enumerate(todo):
        yield Progress(done, len(todo), "replays", policy)
        found = replay(trace, policy, int(share * trace.experts_bytes))
        speed = found.tokens_per_second(seconds, disk_gb_s)
        yield CacheRow(policy, share, found.budget_bytes, found.hit_rate, found.missed_bytes_per_token, speed)
    yield Progress(len(todo), len(todo), "replays", "")


def disk_bandwidth(pager: Pager) -> float:
    """GB/s at which experts are read that no cache of the system holds, with as many readers as the pager has."""
    store = Store(cached=False)
    experts = [(layer.stored, expert) for layer in pager.layers for expert in range(layer.stored.n_experts)]
    tasks: list[tuple[Piece, int]] = []
    size = 0
    for i in np.random.default_rng(0).permutation(len(experts)):
        if size > DISK_BYTES:
            break
        stored, expert = experts[i]
        tasks += [(piece, expert) for matrix in stored.matrices.values() for piece in matrix.pieces]
        size += stored.expert_bytes
    store.forget({piece.path for piece, _ in tasks})
    with ThreadPoolExecutor(pager.workers) as readers:
        start = perf_counter()
        read = sum(readers.map(lambda task: _read(store, *task), tasks))
        seconds = perf_counter() - start
    store.close()
    return read / seconds / 1e9


def _read(store: Store, piece: Piece, expert: int) -> int:
    return store.read(piece, expert, [memoryview(bytearray(piece.size_bytes))])
