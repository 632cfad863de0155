"""Worker: what the one thread does that runs the model. Prompts are read in chunks between tokens of answers."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from time import perf_counter
from typing import TYPE_CHECKING

import mlx.core as mx

from tq.engine.cache.prompts import LEAST_TOKENS, PromptCache, common_prefix
from tq.engine.cache.settings import KVSettings
from tq.engine.run import decode
from tq.engine.run.context import Context
from tq.engine.run.generate import open_context
from tq.engine.run.serve import batching
from tq.engine.run.serve.batching import Mode
from tq.engine.run.serve.prefixes import Prefixes, beginning
from tq.engine.run.serve.rows import Chosen, Row, Rows
from tq.engine.run.serve.sequence import Sequence

if TYPE_CHECKING:
    from tq.engine.model.load import LoadedModel

TIDY_ROUNDS = 64  # rounds between two looks at the memory that caches take


class Worker:
    """Sequences at work. All but the constructor is for one thread, in which MLX keeps what it computes.

    Attributes:
        running: In the order in which they came.
        prefixes: Contexts of earlier requests.
        in_use_bytes: Of the contexts of running requests, when they were last counted.
        notes: What a person should know, until somebody takes it.
        finished, cancelled, failed: Requests so far.
        prompt_tokens, cached_tokens, completion_tokens: Of those that ended.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        kv: KVSettings | None,
        prefill_step: int,
        prefix_bytes: int,
        prompts: PromptCache | None,
    ):
        self._loaded, self._kv, self._step, self._prompts = loaded, kv, prefill_step, prompts
        self.running: list[Sequence] = []
        self.prefixes = Prefixes(prefix_bytes)
        self.notes: list[str] = []
        self.finished = self.cancelled = self.failed = 0
        self.prompt_tokens = self.cached_tokens = self.completion_tokens = 0
        self.mode: Mode = "turns"
        self._rows: Rows = batching.make("turns", loaded.model)
        self._of_row: dict[Row, Sequence] = {}
        self._last_read: Sequence | None = None
        self._debt = 0.0  # seconds of reading that answers have not had yet
        self._rounds = 0
        self.in_use_bytes = 0
        self._beginnings: list[list[int]] = []  # of system messages that are to be stored

    def prepare(self, asked: Mode | None) -> None:
        """Find out how sequences run.

        Raises:
            UsageError: They cannot run as asked.
        """
        self.mode, why = batching.choose(self._loaded.model, self._kv, asked)
        self._rows = batching.make(self.mode, self._loaded.model)
        self.notes.append(why)

    def _make_room(self) -> None:
        """Count what running requests take, and let kept contexts give way."""
        reading = [s.context for s in self.running if s.context is not None and s.row is None]
        self.in_use_bytes = self._rows.nbytes + sum(context.nbytes + context.mark_bytes for context in reading)
        self.prefixes.make_room(self.in_use_bytes)

    def admit(self, sequence: Sequence) -> None:
        """Begin with a request."""
        sequence.begin()
        self.running.append(sequence)
        self._guarded(sequence, self._find_context)

    def round(self) -> None:
        """A chunk of one prompt, if it is its time, and a token for every answer.

        Reading takes half of the time at most while there are answers: they go on twice as slowly as without it, and
        no slower for longer than one chunk takes.
        """
        for sequence in [s for s in self.running if s.stream.cancelled]:
            self._end(sequence, cancelled=True)
        for sequence in [s for s in self.running if s.waits_for is not None]:
            self._guarded(sequence, self._follow)
        start = perf_counter()
        reading = [s for s in self.running if s.row is None and s.waits_for is None]
        waiting = bool(self._rows.rows)
        if reading and (self._debt <= 0 or not waiting):
            self._read(self._next_reader(reading))
            self._debt = perf_counter() - start if waiting else 0.0
            start = perf_counter()
        if self._rows.rows:
            self._decode()
            self._debt -= perf_counter() - start
        self._rounds += 1
        if self._rounds % TIDY_ROUNDS == 0:
            self._make_room()
            mx.clear_cache()

    def stop(self) -> None:
        """End everything and let go of what is held."""
        for sequence in list(self.running):
            self._end(sequence, cancelled=True)
        self.rest()
        self.prefixes.clear()
        mx.synchronize()
        mx.clear_cache()

    def rest(self) -> None:
        """There is nothing to do: store the beginnings that other prompts are likely to have too."""
        beginnings, self._beginnings = self._beginnings, []
        try:
            for tokens in beginnings:
                self._store(tokens)
        except Exception as error:
            self._note(f"the beginning of a prompt is not stored: {error}")
        self._take_notes()
        mx.clear_cache()

    def _store(self, tokens: list[int]) -> None:
        if self._prompts is None or self.prefixes.reach(tokens) < len(tokens):
            return
        context = self.prefixes.take(tokens)
        if context is not None:
            self._prompts.save(context.tokens, context.caches)
            self.prefixes.add(context)

    def fail_all(self, error: Exception) -> None:
        """Something went wrong that concerns every request."""
        for sequence in list(self.running):
            self._fail(sequence, error)
        self._rows = batching.make(self.mode, self._loaded.model)
        self._of_row = {}

    # --- where a prompt begins ---

    def _find_context(self, sequence: Sequence) -> None:
        """Let it go on from what was read before: by others, now or earlier, or by another process."""
        wanted = sequence.wanted
        kept = self.prefixes.reach(wanted)
        for other in self.running:
            if other is not sequence and other.row is None and other.waits_for is None and other.context is not None:
                shared = common_prefix(other.wanted, wanted)
                if shared >= max(kept, sequence.shared) + LEAST_TOKENS:
                    sequence.waits_for, sequence.shared = other, shared
        if sequence.waits_for is not None:
            other = sequence.waits_for
            assert other.context is not None
            if len(other.context.tokens) < sequence.shared and other.context.needs_marks:
                other.places.add(sequence.shared)
            self._follow(sequence)
            return
        context = self._copy_of_running(wanted, kept) or self.prefixes.take(wanted)
        if context is None:
            context = open_context(self._loaded.model, self._kv)
        if self._prompts is not None and len(context.tokens) < min(sequence.prompt.beginning, len(wanted)):
            context.load(self._prompts, sequence.prompt.tokens, worth=LEAST_TOKENS)
            self._take_notes()
        self._start(sequence, context)

    def _follow(self, sequence: Sequence) -> None:
        """Go on from what another one has read, when it has."""
        other = sequence.waits_for
        assert other is not None
        if other not in self.running or other.row is not None or other.context is None:
            sequence.waits_for, sequence.shared = None, 0
            self._find_context(sequence)
        elif len(other.context.tokens) >= sequence.shared:
            try:
                context = beginning(other.context, sequence.wanted)
            except ValueError:
                context = open_context(self._loaded.model, self._kv)
            self._start(sequence, context)

    def _copy_of_running(self, wanted: list[int], kept: int) -> Context | None:
        """A copy of an answer's context, if that spares more than what is kept."""
        found = [(common_prefix(row.context.tokens, wanted), n) for n, row in enumerate(self._rows.rows)]
        most, n = max(found, default=(0, 0))
        if most < kept + LEAST_TOKENS:
            return None
        with contextlib.suppress(ValueError):
            row = self._rows.rows[n]
            copied = beginning(row.context, wanted, self._rows.caches(row))
            if len(copied.tokens) > kept:
                return copied
        return None

    def _start(self, sequence: Sequence, context: Context) -> None:
        sequence.start(context)
        if sequence.is_read:
            self._open(sequence)

    # --- reading ---

    def _next_reader(self, reading: list[Sequence]) -> Sequence:
        """Prompts are read in turn, so that a short one is not kept waiting by a long one."""
        after = reading.index(self._last_read) + 1 if self._last_read in reading else 0
        return reading[after % len(reading)]

    def _read(self, sequence: Sequence) -> None:
        self._last_read = sequence
        self._guarded(sequence, self._read_chunk)
        for other in [s for s in self.running if s.waits_for is sequence]:  # before it is in a batch
            self._guarded(other, self._follow)
        if sequence in self.running and sequence.is_read:
            self._guarded(sequence, self._open)

    def _read_chunk(self, sequence: Sequence) -> None:
        context = sequence.context
        assert context is not None
        chunk = sequence.next_chunk(self._step)
        for _ in decode.prefill(self._loaded.model, context, chunk, self._step):
            pass
        if len(context.tokens) in sequence.places:
            context.mark()
        sequence.report()
        self._make_room()

    def _open(self, sequence: Sequence) -> None:
        """The prompt has been read: tokens follow."""
        row = sequence.open_row(self._loaded)
        self._of_row[row] = sequence
        self._rows.add(row)

    # --- answering ---

    def _decode(self) -> None:
        for sequence in [s for s in self.running if s.is_last]:  # nothing goes into the model after it
            if sequence in self.running:  # it has not failed with another one
                self._collect(sequence)
        for row, launched in self._rows.launch() if self._rows.rows else ():
            if row not in self._of_row:
                continue  # it failed with another one
            sequence = self._of_row[row]
            if isinstance(launched, Exception):
                self._fail(sequence, launched)
            elif sequence.pending is None:
                row.context.tokens.append(sequence.prompt.tokens[-1])
                sequence.pending = launched
            else:
                self._collect(sequence, launched)

    def _collect(self, sequence: Sequence, following: Chosen | None = None) -> None:
        """Take the token that was being computed. `following` comes after it, so that the model has read it."""
        chosen, sequence.pending = sequence.pending, following
        assert chosen is not None and sequence.context is not None
        try:
            token_id = int(chosen.token.item())  # type: ignore[arg-type]
        except Exception as error:
            self._fail(sequence, error)
            return
        if following is not None:
            sequence.context.tokens.append(token_id)
        try:
            sequence.say(token_id, chosen)
        except Exception as error:
            self._fail(sequence, error, alone=True)
            return
        if sequence.reason is not None:
            self._end(sequence)

    # --- ends ---

    def _end(self, sequence: Sequence, cancelled: bool = False) -> None:
        """It is over: its context stays for prompts to come, as far as there is room."""
        try:
            self._leave(sequence)
        except Exception as error:
            self._fail(sequence, error)
            return
        self.finished += not cancelled
        self.cancelled += cancelled
        self.prompt_tokens += len(sequence.prompt.tokens)
        self.cached_tokens += sequence.cached
        self.completion_tokens += sequence.count
        try:
            if sequence.context is not None and sequence.context.tokens:
                first = sequence.prompt.tokens[: sequence.prompt.beginning]
                if self._prompts is not None and len(first) >= LEAST_TOKENS and first not in self._beginnings:
                    self._beginnings.append(first)
                self.prefixes.add(sequence.context)
            self._make_room()
        finally:  # it is in no list any more: nobody else would tell who waits for it
            sequence.done(cancelled)

    def _leave(self, sequence: Sequence) -> None:
        if sequence.row is not None:
            self._rows.remove(sequence.row)
            del self._of_row[sequence.row]
        self.running.remove(sequence)

    def _fail(self, sequence: Sequence, error: Exception, alone: bool = False) -> None:
        """It cannot go on. What others share with its computation cannot either, unless it is `alone` with it."""
        failed = [sequence]
        if sequence.row in self._rows.rows:
            if alone:
                with contextlib.suppress(Exception):
                    self._rows.remove(sequence.row)
            if sequence.row in self._rows.rows:
                failed = [self._of_row[row] for row in self._rows.fail(sequence.row)]
        for one in failed:
            if one.row is not None:
                self._of_row.pop(one.row, None)
                one.row = None
            if one in self.running:
                self.running.remove(one)
            self.failed += 1
            one.fail(error)

    def _guarded(self, sequence: Sequence, work: Callable[[Sequence], None]) -> None:
        """Work on one request, whose failure concerns no other."""
        try:
            work(sequence)
        except Exception as error:
            self._fail(sequence, error, alone=True)

    def _take_notes(self) -> None:
        if self._prompts is not None:
            for note in self._prompts.take_notes():
                self._note(note)

    def _note(self, message: str) -> None:
        if message not in self.notes:
            self.notes.append(message)
