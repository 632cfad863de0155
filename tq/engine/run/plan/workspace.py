"""How much memory reading a chunk of a prompt takes beside weights and caches: the model's own graph, played through.

Scores of attention, hidden states of feed-forward layers, masks and copies of growing caches are in it as far as the
model makes them, for any architecture, and what operations in flight still hold. What measured peaks say to that is in
docs/plan.md. Not in it is what a rotation keeps for the matrices that share it: the caller adds that.
"""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import cached_property
from typing import Any

import mlx.core as mx

from tq.engine.cache.state import leaves
from tq.engine.run.plan.caches import fill, grows_alone, has_keys
from tq.engine.run.plan.graph import CPU, GPU, Graph, peak_bytes, trace
from tq.engine.run.plan.skeleton import Skeleton, as_on_gpu, blank
from tq.errors import TQError

LOOP_TOKENS = 16  # a chunk that stands for a longer one where a model goes from token to token
FAR_CHUNKS = 4


class WorkspaceModel:
    """The workspace of a prompt's chunks.

    Args:
        skeleton: The model without weights.
        gpu: Whether attention runs as on a GPU of Apple.
    """

    def __init__(self, skeleton: Skeleton, *, gpu: bool):
        self.skeleton, self._gpu = skeleton, gpu
        self._known: dict[tuple[int, int], int] = {}

    def size_bytes(self, context: int, step: int) -> int:
        """The most that a chunk of a prompt of so many tokens takes, if `step` of them are read at once.

        Played through for the first chunk of a long prompt and for a later one: what scores add is proportional to the
        tokens before, and a shorter chunk takes its share.

        Raises:
            TQError: The model's graph cannot be listed.
        """
        prompt = max(context - 1, 1)
        first = self.chunk_bytes(step, 0)
        if prompt <= step:
            return first * prompt // step
        before = (FAR_CHUNKS - 1) * step
        later = self.chunk_bytes(step, before)
        return max(first, first + (later - first) * (prompt - step) // before)

    def chunk_bytes(self, n_tokens: int, before: int) -> int:
        """What a chunk with so many tokens before it takes, beside the caches."""
        key = n_tokens, before
        if key not in self._known:
            if n_tokens > 2 * LOOP_TOKENS and self._loops:
                # Every token has operations of its own: a whole chunk's would take minutes to list.
                short, long = (self._play(n, before) for n in (LOOP_TOKENS, 2 * LOOP_TOKENS))
                self._known[key] = max(long, short + (long - short) * (n_tokens - LOOP_TOKENS) // LOOP_TOKENS)
            else:
                self._known[key] = self._play(n_tokens, before)
        return self._known[key]

    @cached_property
    def _loops(self) -> bool:
        """Whether every token of a chunk adds operations."""
        short, long = (len(self._graph(n, self._primed(0)).nodes) for n in (LOOP_TOKENS, 2 * LOOP_TOKENS))
        return long - short >= LOOP_TOKENS

    def _play(self, n_tokens: int, before: int) -> int:
        caches = self._primed(before)
        held = sum(len(_arrays(cache)) for cache in leaves(caches))
        graph = self._graph(n_tokens, caches)
        peak = peak_bytes(graph, list(graph.inputs)[:held], GPU if self._gpu else CPU)
        return max(peak - sum(graph.outputs.values()), 0)

    def _graph(self, n_tokens: int, caches: list[Any]) -> Graph:
        """Of reading a chunk: from the arrays of caches and the parameters to the arrays of caches."""
        parameters = list(self.skeleton.arrays.values())
        arrays = [array for cache in leaves(caches) for array in _arrays(cache)]

        def read(*arguments: mx.array) -> list[mx.array]:
            given = iter(arguments)
            for cache in leaves(caches):
                _replace(cache, given)
            self.skeleton.set(list(given))
            self.skeleton(n_tokens, caches)
            return [array for cache in leaves(caches) for array in _arrays(cache)]

        try:
            with as_on_gpu() if self._gpu else nullcontext():
                return trace(read, [*arrays, *parameters])
        except ValueError as error:
            raise TQError(f"what a prompt takes cannot be found out: {str(error).splitlines()[0]}") from error
        finally:
            self.skeleton.set(parameters)

    def _primed(self, tokens: int) -> list[Any]:
        """Caches that hold so many tokens, in arrays that take no memory."""
        caches = self.skeleton.caches()
        filled = leaves(self.skeleton.filled())
        if tokens and any(grows_alone(like) for like in filled):
            self.skeleton(tokens, caches)
        elif tokens:
            for cache, like in zip(leaves(caches), filled, strict=True):
                if has_keys(like):
                    fill(cache, like, tokens)
                else:
                    cache.cache = list(like.cache)
        for cache in leaves(caches):
            _replace(cache, iter([blank(array.shape, array.dtype) for array in _arrays(cache)]))
        return caches


def _arrays(cache: Any) -> list[mx.array]:
    """All arrays of a cache."""
    found: list[mx.array] = []

    def note(array: mx.array) -> mx.array:
        found.append(array)
        return array

    _walk(vars(cache), note)
    return found


def _replace(cache: Any, arrays: Iterator[mx.array]) -> None:
    """Others in their place, in the order of `_arrays`."""
    vars(cache).update(_walk(vars(cache), lambda _: next(arrays)))


def _walk(value: Any, change: Callable[[mx.array], mx.array]) -> Any:
    if isinstance(value, mx.array):
        return change(value)
    if isinstance(value, dict):
        return {key: _walk(item, change) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_walk(item, change) for item in value)
    return value
