"""BatchPackedKVCache: packed caches of several sequences that a model runs at once, in place of mlx-lm's batch caches.

Each sequence has a cache of its own, which holds none of the padding: with sink, window and blocks where its tokens
begin. What the model sees is padded: the tokens that were there before, ending in one column, then the new ones.
"""

import json
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from tq.engine.cache.native import Native, View
from tq.engine.cache.packed import Fetched, PackedKVCache, form_of


@dataclass(frozen=True)
class Row:
    """One sequence in the columns of one forward pass: its tokens are those from `start` to `stop`."""

    keys: mx.array | None  # None: no new tokens, so that nobody wants what it attends to
    values: mx.array | None
    start: int
    stop: int


class BatchPackedKVCache:
    """In place of BatchKVCache and BatchRotatingKVCache.

    Attributes:
        rows: The cache of each sequence.
        skip: Columns of padding that each sequence still begins with.
        remaining: Columns that are tokens, the others at the end being padding, where a prompt is padded there.
    """

    def __init__(self, rows: list[PackedKVCache], left_padding: list[int] | None = None):
        self.rows = rows
        self.skip = list(left_padding or [0] * len(rows))
        self.remaining: list[int] | None = None
        self._fetched = Fetched()

    @property
    def offset(self) -> mx.array:
        """The position of the next column in each sequence, (B,): negative in padding."""
        return mx.array([row.offset - skip for row, skip in zip(self.rows, self.skip, strict=True)])

    def _spans(self, n: int) -> list[tuple[int, int]]:
        """Which of n new columns are tokens of each sequence."""
        spans = []
        for b, skip in enumerate(self.skip):
            first = min(skip, n)
            spans.append((first, n if self.remaining is None else max(min(n, self.remaining[b]), first)))
        return spans

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """As `PackedKVCache.update_and_fetch`, with zeros where a sequence has no token: `make_mask` hides them."""
        n = keys.shape[2]
        before = max(row.previous() for row in self.rows)
        native = self._native(keys, values)
        if native is not None:
            return self._update_at_once(native, keys, values, before)
        view = []
        for b, (row, (first, last)) in enumerate(zip(self.rows, self._spans(n), strict=True)):
            stop = before + last
            if first == last:
                view.append(Row(None, None, stop, stop))
            else:
                new = [side[b : b + 1, :, first:last] for side in (keys, values)]
                k, v = row.update_and_fetch(*new)
                view.append(Row(k, v, stop - k.shape[2], stop))
            self.skip[b] -= first
            if self.remaining is not None:
                self.remaining[b] -= last - first
        columns = before + n
        padded = [mx.concatenate([_padded(r.keys, r, keys, columns) for r in view]),
                  mx.concatenate([_padded(r.values, r, values, columns) for r in view])]  # fmt: skip
        return self._fetched.remember(padded[0], padded[1], view)

    def _native(self, keys: mx.array, values: mx.array) -> Native | None:
        """The storage of all rows, if it is one and can take them in one call."""
        form = form_of(keys, values)._replace(batch=1)
        first, *others = (row.open(form) for row in self.rows)
        if any(row.centres for row in self.rows):
            return None  # each takes a centre of its own from its keys
        return first if isinstance(first, Native) and all(other is first for other in others) else None

    def _update_at_once(
        self, storage: Native, keys: mx.array, values: mx.array, before: int
    ) -> tuple[mx.array, mx.array]:
        """`update_and_fetch` for all sequences in one call of the kernels."""
        spans = self._spans(keys.shape[2])
        for row, (first, last) in zip(self.rows, spans, strict=True):
            if last > first:
                row.make_room(last - first)
        storage.append_each(self.rows, keys, values, spans)
        views, starts = [], []
        for b, (row, (first, last)) in enumerate(zip(self.rows, spans, strict=True)):
            view = row.seen_of(storage.view(row)) if last > first else None
            views.append(view)
            starts.append(0 if view is None else before + last - view.columns)
            self.skip[b] -= first
            if self.remaining is not None:
                self.remaining[b] -= last - first
        joined = storage.joined(views, starts, before + keys.shape[2])
        return self._fetched.remember(*storage.decoded(joined, keys.dtype), joined)

    def attend(
        self,
        queries: mx.array,
        keys: mx.array,
        values: mx.array,
        scale: float,
        mask: mx.array | str | None = None,
        sinks: mx.array | None = None,
        softcap: float = 0.0,
    ) -> mx.array | None:
        """As `PackedKVCache.attend`: all sequences in one call of the kernels, or one by one."""
        found = self._fetched.take(keys, values)
        if found is None or isinstance(mask, str):
            return None
        view, values_are_keys = found
        if isinstance(view, View):
            storage = self.rows[0].storage
            assert storage is not None
            return storage.attend(view, queries, scale, mask, sinks, softcap, values_are_keys)
        outputs = []
        for b, row in enumerate(view):
            query = queries[b : b + 1]
            if row.keys is None:
                outputs.append(mx.zeros((1, *queries.shape[1:3], values.shape[3]), queries.dtype))
                continue
            part = None if mask is None else _columns(mask, b, row.start, row.stop)
            output = self.rows[b].attend(
                query, row.keys, row.keys if values_are_keys else row.values,
                scale=scale, mask=part, sinks=sinks, softcap=softcap,
            )  # fmt: skip
            if output is None:
                return None
            outputs.append(output)
        return mx.concatenate(outputs)

    def make_mask(self, N: int, return_array: bool = False, window_size: int | None = None) -> mx.array:
        """Bool (B, 1, N, columns): own tokens up to the query's, the last `window_size` of them."""
        previous = [row.previous() for row in self.rows]
        before = max(previous)
        window = window_size or getattr(self.rows[0], "max_size", None)
        column, query = mx.arange(before + N), mx.arange(before, before + N)[:, None]
        visible = column <= query
        if window is not None:
            visible = visible & (column > query - window)
        spans = self._spans(N)
        starts = [before - old + first for old, (first, _) in zip(previous, spans, strict=True)]
        stops = [before + last for _, last in spans]
        own = (column >= mx.array(starts)[:, None]) & (column < mx.array(stops)[:, None])
        return own[:, None, None] & visible

    # --- what mlx-lm's batch generator does with it ---

    def prepare(
        self,
        *,
        left_padding: list[int] | None = None,
        lengths: list[int] | None = None,
        right_padding: list[int] | None = None,
    ) -> None:
        """Say which columns to come are padding: at the beginning, or, with `lengths`, at the end."""
        if left_padding is not None:
            if not self.empty():
                raise ValueError("left padding can only be added to an empty cache")
            self.skip = [skip + more for skip, more in zip(self.skip, left_padding, strict=True)]
        if right_padding is not None and max(right_padding) > 0:
            assert lengths is not None
            self.remaining = list(lengths)

    def finalize(self) -> None:
        """The padded prompt is over."""
        self.remaining = None

    def filter(self, batch_indices: Any) -> None:
        """Keep these sequences only."""
        keep = [int(i) for i in batch_indices]
        self.rows, self.skip = [self.rows[i] for i in keep], [self.skip[i] for i in keep]
        if self.remaining is not None:
            self.remaining = [self.remaining[i] for i in keep]

    def extend(self, other: "BatchPackedKVCache") -> None:
        """Add the sequences of another cache."""
        self.rows = self.rows + [row.copy() for row in other.rows]
        self.skip = self.skip + other.skip

    def extract(self, idx: int) -> PackedKVCache:
        """The cache of one sequence."""
        return self.rows[idx].copy()

    @classmethod
    def merge(cls, caches: list[PackedKVCache]) -> "BatchPackedKVCache":
        """The caches of single sequences as one."""
        sizes = {getattr(cache, "max_size", None) for cache in caches}
        if len(sizes) > 1:
            raise ValueError(f"caches of one batch have the same window, not {', '.join(map(str, sizes))}")
        return cls([cache.copy() for cache in caches])

    # --- what mlx-lm asks of a cache ---

    def size(self) -> int:
        return max(row.size() for row in self.rows)

    def empty(self) -> bool:
        return all(row.empty() for row in self.rows)

    @property
    def nbytes(self) -> int:
        return sum(row.nbytes for row in self.rows)

    def is_trimmable(self) -> bool:
        return all(row.is_trimmable() for row in self.rows)

    def trim(self, n: int) -> int:
        """Forget the last n tokens of each sequence."""
        return max((row.trim(n) for row in self.rows), default=0) if self.is_trimmable() else 0

    @property
    def state(self) -> Any:
        header = {"rows": [type(row).__name__ for row in self.rows], "skip": self.skip, "remaining": self.remaining}
        return json.dumps(header), [row.state for row in self.rows]

    @state.setter
    def state(self, state: Any) -> None:
        from tq.engine.cache.files import CLASSES

        header = json.loads(state[0])
        rows = [CLASSES[name].from_state(row) for name, row in zip(header["rows"], state[1], strict=True)]
        self.__init__(rows, header["skip"])  # type: ignore[misc]
        self.remaining = header["remaining"]

    @property
    def meta_state(self) -> str:
        """Nothing: `state` has it all."""
        return ""

    @classmethod
    def from_state(cls, state: Any, meta_state: str = "") -> "BatchPackedKVCache":
        made = cls.__new__(cls)
        made.state = state
        return made


def _padded(found: mx.array | None, row: Row, new: mx.array, columns: int) -> mx.array:
    """The keys or values of one sequence in all columns, (1, heads, columns, dim)."""
    if found is None:
        return mx.zeros((1, new.shape[1], columns, new.shape[3]), new.dtype)
    return mx.pad(found, [(0, 0), (0, 0), (row.start, columns - row.stop), (0, 0)])


def _columns(mask: mx.array, b: int, start: int, stop: int) -> mx.array:
    """What a mask that broadcasts to (B, heads, L, columns) says of these columns of sequence b."""
    mask = mask.reshape(*(1,) * (4 - mask.ndim), *mask.shape)
    mask = mask[b : b + 1] if mask.shape[0] > 1 else mask
    return mask if mask.shape[3] == 1 else mask[..., start:stop]
