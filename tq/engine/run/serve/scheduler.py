"""Scheduler: requests from many threads to one model, and the thread that runs it."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from collections import deque
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import mlx.nn as nn
import psutil
from mlx.utils import tree_flatten

from tq.engine.cache.prompts import PromptCache
from tq.engine.cache.settings import KVSettings
from tq.engine.run import memory
from tq.engine.run.generate import open_context, packing_notes, prompt_notes
from tq.engine.run.sampling import GenerateOptions
from tq.engine.run.serve.batching import Mode
from tq.engine.run.serve.prefixes import memory_is_short
from tq.engine.run.serve.prompting import Prompter
from tq.engine.run.serve.requests import Busy, ModelFacts, Request, Stats
from tq.engine.run.serve.sequence import Sequence
from tq.engine.run.serve.stream import Stream
from tq.engine.run.serve.worker import Worker
from tq.errors import TQError, UsageError

if TYPE_CHECKING:
    from tq.engine.model.load import LoadedModel

# Tokens of a prompt that are read between two tokens of an answer. A GPU needs many to be fast; a CPU reads 128 at a
# time as fast as 512, and others wait a quarter of the time.
PREFILL_STEP, CPU_PREFILL_STEP = 512, 128
PREFIX_SHARE = 1 / 8  # of the machine's memory, for contexts


class Scheduler:
    """Answers requests, several at once.

    Attributes:
        facts: What can be asked.
        default_options: For requests that leave options open.

    Args:
        loaded: Loaded by the thread that makes the scheduler.
        kv: How keys and values are packed; None: they are not.
        max_batch: Requests that are worked on at once.
        max_queue: Requests that may wait beyond that.
        prefill_step: Tokens of a prompt that are read at once; None: 512, on a CPU 128.
        prefix_bytes: Of memory, for the contexts of running requests and those kept for prompts to come; None: an
            eighth of the machine's. Kept ones give way to running ones.
        prompts: Where the beginnings of conversations are stored on disk; None: nowhere.
        mode: How sequences run; None: what is faster here (batching.py).

    Raises:
        UsageError: A number is out of range, or the model cannot run in this mode.
        TQError: No cache of this model can be packed.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        kv: KVSettings | None,
        *,
        max_batch: int = 8,
        max_queue: int = 64,
        prefill_step: int | None = None,
        prefix_bytes: int | None = None,
        prompts: PromptCache | None = None,
        default_options: GenerateOptions | None = None,
        mode: Mode | None = None,
    ):
        if prefill_step is None:
            prefill_step = PREFILL_STEP if memory.on_gpu() else CPU_PREFILL_STEP
        for name, value, least in (
            ("max_batch", max_batch, 1), ("max_queue", max_queue, 0), ("prefill_step", prefill_step, 1),
            ("prefix_bytes", prefix_bytes or 0, 0),
        ):  # fmt: skip
            if value < least:
                raise UsageError(f"{name} must be {least} or more, not {value}")
        if prefix_bytes is None:
            prefix_bytes = int(psutil.virtual_memory().total * PREFIX_SHARE)
        self.default_options = default_options or GenerateOptions()
        _evaluate(loaded.model)
        needs_marks = open_context(loaded.model, kv).needs_marks
        self._prompter = Prompter(loaded, self.default_options, needs_marks)
        self._max_batch, self._most = max_batch, max_batch + max_queue
        self._worker = Worker(loaded, kv, prefill_step, prefix_bytes, prompts)
        self._queue: deque[Sequence] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._notes = [*loaded.notes, *(n.message for n in prompt_notes(loaded.tokenizer))]
        self._notes += [note.message for note in packing_notes(loaded.model, kv)]
        self._ready: Future[None] = Future()
        self._thread = threading.Thread(target=self._run, args=(mode,), name="tq-serve-model", daemon=True)
        self._thread.start()
        try:
            self._ready.result()
        except BaseException:  # of the thread, or Ctrl-C in this one
            self.close()
            raise
        self._notes += self.take_notes()
        self.facts: ModelFacts = dataclasses.replace(self._prompter.facts, notes=tuple(self._notes))

    def submit(self, request: Request) -> Stream:
        """Take a request on. Any thread may call this.

        Raises:
            UsageError: It asks for what this model, or any, cannot do.
            Busy: Too many wait already.
            TQError: The chat template refuses it, or the scheduler is closed.
        """
        self._check_room()  # before the work on a prompt that may be long
        prompt = self._prompter.make(request)
        stream = Stream()
        with self._changed:
            self._check_room()
            self._queue.append(Sequence(request, prompt, stream))
            self._changed.notify()
        return stream

    def stats(self) -> Stats:
        """Figures of now. Any thread may call this."""
        worker, prefixes = self._worker, self._worker.prefixes
        return Stats(
            running=len(worker.running),
            queued=len(self._queue),
            finished=worker.finished,
            cancelled=worker.cancelled,
            failed=worker.failed,
            prompt_tokens=worker.prompt_tokens,
            cached_tokens=worker.cached_tokens,
            completion_tokens=worker.completion_tokens,
            kv_bytes=worker.in_use_bytes,
            prefix_entries=len(prefixes),
            prefix_bytes=prefixes.nbytes,
            prefix_budget_bytes=prefixes.budget_bytes,
            mode=worker.mode,
        )

    def take_notes(self) -> list[str]:
        """What a person should know since the last call."""
        notes, self._worker.notes = self._worker.notes, []
        return notes

    def close(self) -> None:
        """Cancel all requests, and wait until the model stands still. Later requests are refused."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _check_room(self) -> None:
        if self._closed:
            raise TQError("the server is stopping")
        waiting = len(self._queue)
        if len(self._worker.running) + waiting >= self._most:
            raise Busy(f"{waiting} requests wait already, and no more may", hint="try again later")

    # --- the thread that runs the model ---

    def _run(self, mode: Mode | None) -> None:
        from mlx_lm.utils import maybe_set_recommended_wired_limit

        wired_limit = maybe_set_recommended_wired_limit()
        with contextlib.ExitStack() as last:
            if wired_limit is not None:
                last.callback(mx.set_wired_limit, wired_limit)
            try:
                self._worker.prepare(mode)
            except Exception as error:
                self._ready.set_exception(error)
                return
            self._ready.set_result(None)
            last.callback(self._drain)
            last.callback(self._worker.stop)
            while self._wait():
                self._advance()

    def _wait(self) -> bool:
        """Return when there is something to do. False: the end."""
        if not self._worker.running and not self._queue and not self._closed:
            self._worker.rest()
        with self._changed:
            while not self._worker.running and not self._queue and not self._closed:
                self._changed.wait()
            return not self._closed

    def _advance(self) -> None:
        """Begin with what waits, as far as there is room, and go one round on."""
        worker = self._worker
        try:
            for sequence in [s for s in list(self._queue) if s.stream.cancelled]:
                self._queue.remove(sequence)
                worker.cancelled += 1
                sequence.done(cancelled=True)
            while self._queue and len(worker.running) < self._max_batch:
                if worker.running and memory_is_short():
                    break  # those that run will leave room
                worker.admit(self._queue.popleft())
            worker.round()
        except Exception as error:  # nothing a request can cause, but no reason to leave the others waiting for ever
            worker.fail_all(error)

    def _drain(self) -> None:
        """Nobody is left to answer what waits, and what may come."""
        with self._changed:
            self._closed = True
            while self._queue:
                self._queue.popleft().done(cancelled=True)


def _evaluate(model: nn.Module) -> None:
    """Compute what a model has left for later: MLX computes an array in the thread that asked for it only."""
    found: Any = tree_flatten(model)
    mx.eval([array for _, array in found if isinstance(array, mx.array)])
