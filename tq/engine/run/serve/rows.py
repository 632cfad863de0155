"""One more token for every sequence: all of them through the model at once, or one after the other.

`launch` starts the next token of each row while the one before is still to be read, so that the model never waits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import mlx.core as mx
import mlx.nn as nn

from tq.engine.cache.state import kinds, leaves
from tq.engine.run.context import Context
from tq.engine.run.decode import Chooser


@dataclass(frozen=True)
class Chosen:
    """A token that is being computed: (1,), its log-probability (1,), and if asked the likeliest (top,) of each."""

    token: mx.array
    logprob: mx.array
    top_ids: mx.array | None = None
    top_logprobs: mx.array | None = None

    def arrays(self) -> list[mx.array]:
        return [a for a in (self.token, self.logprob, self.top_ids, self.top_logprobs) if a is not None]


class Row:
    """A sequence that goes on token by token.

    Attributes:
        context: What the model has read. Its caches are elsewhere while the row is in a batch.
        input: The token that goes into the model next, (1,).

    Args:
        first: Token that goes into the model first.
        top: How many of the likeliest tokens to report.
    """

    def __init__(self, context: Context, chooser: Chooser, first: int, top: int):
        self.context = context
        self.input = mx.array([first], mx.uint32)
        self._chooser, self._top = chooser, top

    def choose(self, logits: mx.array) -> Chosen:
        """The next token, from logits (1, vocab)."""
        logits = self._chooser.process(logits)
        token, logprob = self._chooser.choose(logits)
        self.input = token.astype(mx.uint32)
        if not self._top:
            return Chosen(token, logprob)
        logits = logits.astype(mx.float32)[0]
        logprobs = logits - mx.logsumexp(logits)
        ids = mx.argpartition(-logprobs, kth=self._top - 1)[: self._top]
        ids = ids[mx.argsort(-logprobs[ids])]
        return Chosen(token, logprob, ids, logprobs[ids])


class Rows(Protocol):
    """Rows that take their steps together or in turn."""

    @property
    def rows(self) -> list[Row]: ...

    @property
    def nbytes(self) -> int:
        """Of their caches."""
        ...

    def add(self, row: Row) -> None: ...

    def remove(self, row: Row) -> None:
        """Let a row go; its context has its caches again."""
        ...

    def fail(self, row: Row) -> list[Row]:
        """Drop a row whose computation failed, and those that were computed with it: all of them are returned."""
        ...

    def launch(self) -> list[tuple[Row, Chosen | Exception]]:
        """Start computing the next token of each row."""
        ...

    def caches(self, row: Row) -> list[Any]:
        """A row's caches, to be copied."""
        ...


class Turns:
    """Rows that go through the model one after the other, each with its own caches."""

    def __init__(self, model: nn.Module):
        self._model = model
        self.rows: list[Row] = []

    @property
    def nbytes(self) -> int:
        return sum(row.context.nbytes for row in self.rows)

    def add(self, row: Row) -> None:
        self.rows.append(row)

    def remove(self, row: Row) -> None:
        self.rows.remove(row)

    def fail(self, row: Row) -> list[Row]:
        self.rows.remove(row)
        return [row]

    def launch(self) -> list[tuple[Row, Chosen | Exception]]:
        return [(row, self._step(row)) for row in self.rows]

    def _step(self, row: Row) -> Chosen | Exception:
        try:
            row.context.grow_to(len(row.context.tokens) + 1)
            logits = self._model(row.input[None], cache=row.context.caches)[:, -1, :]
            chosen = row.choose(logits)
            mx.async_eval(*chosen.arrays())
        except Exception as error:  # whatever it is, the others go on
            return error
        return chosen

    def caches(self, row: Row) -> list[Any]:
        return row.context.caches


class Batch:
    """Rows of one kind of caches that go through the model together."""

    def __init__(self, model: nn.Module):
        self._model = model
        self.rows: list[Row] = []
        self.caches: list[Any] = []

    def add(self, row: Row) -> None:
        made = [cache.merge([cache]) for cache in row.context.caches]
        if self.rows:
            for mine, new in zip(self.caches, made, strict=True):
                mine.extend(new)
        else:
            self.caches = made
        row.context.caches = []
        self.rows.append(row)

    def remove(self, row: Row) -> None:
        n = self.rows.index(row)
        row.context.caches = self.extract(n)
        del self.rows[n]
        if not self.rows:
            self.caches = []
            return
        for cache in self.caches:
            cache.filter([i for i in range(len(self.rows) + 1) if i != n])
        mx.eval([cache.state for cache in self.caches])

    def launch(self) -> list[tuple[Row, Chosen | Exception]]:
        try:
            inputs = mx.concatenate([row.input for row in self.rows])
            logits = self._model(inputs[:, None], cache=self.caches)[:, -1, :]
            found = [row.choose(logits[n : n + 1]) for n, row in enumerate(self.rows)]
            mx.async_eval(*(array for chosen in found for array in chosen.arrays()))
        except Exception as error:  # whatever it is, other batches go on
            return [(row, error) for row in self.rows]
        return list(zip(self.rows, found, strict=True))

    def extract(self, n: int) -> list[Any]:
        """The caches of one row."""
        caches = [cache.extract(n) for cache in self.caches]
        mx.eval([cache.state for cache in caches])  # or they would hold the arrays of the whole batch
        return caches


class Batches:
    """A batch for each kind of caches: a context that is packed from some length on may have others."""

    def __init__(self, model: nn.Module):
        self._model = model
        self._of: dict[tuple[str, ...], Batch] = {}

    @property
    def rows(self) -> list[Row]:
        return [row for batch in self._of.values() for row in batch.rows]

    @property
    def nbytes(self) -> int:
        return sum(cache.nbytes for batch in self._of.values() for cache in leaves(batch.caches))

    def add(self, row: Row) -> None:
        row.context.grow_to(len(row.context.tokens) + 1)
        self._of.setdefault(tuple(kinds(row.context.caches)), Batch(self._model)).add(row)

    def remove(self, row: Row) -> None:
        self._batch(row).remove(row)
        self._of = {kind: batch for kind, batch in self._of.items() if batch.rows}

    def fail(self, row: Row) -> list[Row]:
        failed = self._batch(row)
        self._of = {kind: batch for kind, batch in self._of.items() if batch is not failed}
        return failed.rows

    def launch(self) -> list[tuple[Row, Chosen | Exception]]:
        for row in self.rows:
            if row.context.is_packed_at(len(row.context.tokens) + 1):  # in a batch caches stay what they are
                self.remove(row)
                self.add(row)
        return [pair for batch in list(self._of.values()) for pair in batch.launch()]

    def caches(self, row: Row) -> list[Any]:
        batch = self._batch(row)
        return batch.extract(batch.rows.index(row))

    def _batch(self, row: Row) -> Batch:
        return next(batch for batch in self._of.values() if row in batch.rows)
