"""Context: a model's caches and the tokens they hold, which can grow, go back, and come from a stored prompt."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tq.engine.cache.prompts import PromptCache, common_prefix
from tq.engine.cache.state import CacheState, can_always_trim, can_restore, capture, kinds, leaves, restore

MARKS = 3  # states that are kept to go back to: each may be as large as a window


@dataclass(frozen=True)
class _Mark:
    """What the caches that cannot always be trimmed held after so many tokens."""

    n_tokens: int
    state: CacheState


class Context:
    """What a model has read.

    Attributes:
        tokens: Whose keys, values or states the caches hold.
        caches: mlx-lm's, one per layer. Whoever runs the model with them appends to `tokens`.

    Args:
        make: Makes the model's caches, without tokens.
        pack: Puts packed ones in the place of its caches, with what they hold. From then on they stay packed.
        start: It is called before the model has read so many tokens.
    """

    def __init__(self, make: Callable[[], list[Any]], pack: Callable[[list[Any]], Any] | None = None, start: int = 0):
        self._make, self._pack, self._start = make, pack, start
        self.clear()

    def clear(self) -> None:
        """Forget everything."""
        self.tokens: list[int] = []
        self.caches = self._make()
        self._marks: list[_Mark] = []
        self._packed = self._pack is None

    def grow_to(self, n_tokens: int) -> None:
        """Whoever runs the model says first how many tokens the caches will hold then: it may be time to pack them."""
        if self._pack is None or not self.is_packed_at(n_tokens):
            return
        before = self._rest()
        self._pack(self.caches)
        self._packed = True
        after = self._rest()
        if len(before) != len(after) or any(a is not b for a, b in zip(before, after, strict=True)):
            self._marks = []  # they are of caches that are gone

    def is_packed_at(self, n_tokens: int) -> bool:
        """Whether `grow_to` would pack the caches now."""
        return not self._packed and n_tokens >= self._start

    @property
    def nbytes(self) -> int:
        """Bytes of memory that the caches take."""
        return sum(cache.nbytes for cache in leaves(self.caches)) if self.tokens else 0

    @property
    def mark_bytes(self) -> int:
        """Bytes of memory that the marks take."""
        return sum(array.nbytes for mark in self._marks for array in mark.state.arrays)

    @property
    def needs_marks(self) -> bool:
        """Whether there are caches that cannot always be trimmed, and can be given back a state."""
        rest = self._rest()
        return bool(rest) and all(can_restore(cache) for cache in rest)

    def mark(self) -> None:
        """Make it possible to come back to here, where caches cannot be trimmed (recurrent states, full windows)."""
        if self.needs_marks and (not self._marks or self._marks[-1].n_tokens < len(self.tokens)):
            # The first one is where a system message ends: every conversation can start there.
            self._marks[1 : max(len(self._marks) - MARKS + 2, 1)] = []
            self._marks.append(_Mark(len(self.tokens), capture(self._rest())))

    def reach(self, tokens: Sequence[int]) -> int:
        """How many of these tokens `keep` would leave, at most: it changes nothing."""
        n = common_prefix(self.tokens, tokens)
        if n == len(self.tokens) or all(cache.is_trimmable() for cache in leaves(self.caches)):
            return n
        return max((mark.n_tokens for mark in self._marks if mark.n_tokens <= n), default=0)

    def copy(self, caches: list[Any] | None = None) -> "Context":
        """Another context of the same tokens, which goes its own way. Arrays are shared until one of them writes.

        Args:
            caches: What holds the tokens, if it is not `self.caches` now.

        Raises:
            ValueError: There is a cache that cannot be given a state.
        """
        made = Context(self._make, self._pack, self._start)
        if self._packed and self._pack is not None:
            made.caches, made._packed = self._make_packed(), True
        restore(capture(leaves(self.caches if caches is None else caches)), leaves(made.caches))
        made.tokens, made._marks = list(self.tokens), list(self._marks)
        return made

    def keep(self, tokens: Sequence[int]) -> int:
        """Go back to where these tokens and those of the context part, or to a mark before that.

        Returns:
            How many of the tokens the context holds: all that it holds.
        """
        n = common_prefix(self.tokens, tokens)
        surplus = len(self.tokens) - n
        if surplus:
            parts = leaves(self.caches)
            if n and all(cache.is_trimmable() for cache in parts):
                if all(cache.trim(surplus) == surplus for cache in parts):
                    self._shorten(n)
                else:
                    self.clear()
            else:
                self._return_to_mark(n)
        return len(self.tokens)

    def load(self, prompts: PromptCache, tokens: Sequence[int], worth: int) -> int:
        """Take a stored prompt over if that spares at least so many more tokens of reading these; how many it did."""
        had = common_prefix(self.tokens, tokens)
        makes = [self._make] if self._pack is None else [self._make, self._make_packed]
        found = prompts.load(tokens, *makes, more_than=had + worth - 1)
        if found is None:
            return 0
        self.tokens, self.caches = found
        self._packed = self._pack is None or kinds(self.caches) != kinds(self._make())
        self._marks = []
        self.mark()
        return self.keep(tokens[:-1]) - had

    def _make_packed(self) -> list[Any]:
        assert self._pack is not None
        caches = self._make()
        self._pack(caches)
        return caches

    def _return_to_mark(self, n: int) -> None:
        marks = [mark for mark in self._marks if mark.n_tokens <= n]
        if not n or not marks:
            return self.clear()
        mark = marks[-1]
        restore(mark.state, self._rest())
        surplus = len(self.tokens) - mark.n_tokens
        if all(cache.trim(surplus) == surplus for cache in leaves(self.caches) if can_always_trim(cache)):
            self._shorten(mark.n_tokens)
        else:
            self.clear()

    def _shorten(self, n: int) -> None:
        del self.tokens[n:]
        self._marks = [mark for mark in self._marks if mark.n_tokens <= n]

    def _rest(self) -> list[Any]:
        """Caches that cannot always be trimmed."""
        return [cache for cache in leaves(self.caches) if not can_always_trim(cache)]
