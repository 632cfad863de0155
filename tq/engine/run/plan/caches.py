"""How many bytes a model's caches take after so many tokens: asked of the caches themselves, on arrays without data.

No architecture has code here. A token goes through the model without weights, and each cache then has the heads, sizes
and type of a real one. A cache of keys and values is filled with as many such tokens as asked for, in the chunks that a
prompt is read in, so that its steps, windows and packed blocks are its own and not a formula's.
"""

import copy
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import mlx.core as mx

from tq.engine.cache.convert import summary, upgrade_cache
from tq.engine.cache.settings import BLOCK, KVSettings
from tq.engine.cache.state import leaves
from tq.engine.run.plan.skeleton import Skeleton, blank
from tq.errors import UsageError


@dataclass(frozen=True)
class Usage:
    """What caches take at a context.

    Attributes:
        size_bytes: Once the prompt is read, and its last token answered.
        peak_bytes: The most while it is read: a window also holds the chunk that is being read.
        read_bytes: What the next token reads of them: the room for later tokens is not read.
    """

    size_bytes: int
    peak_bytes: int
    read_bytes: int


@dataclass(frozen=True)
class Kind:
    """Caches that are alike.

    Attributes:
        name: "all tokens", "window of 512", "latent", "recurrent state" ...
        caches: How many: a layer may have several, or none.
        shape: Heads and numbers of a key and a value, "8 x 128"; empty for a state.
        token_bytes: What each further token adds, all of these caches together; 0 where nothing grows.
        size_bytes: At the context asked for.
    """

    name: str
    caches: int
    shape: str
    token_bytes: int
    size_bytes: int


@dataclass
class _Group:
    """Caches that take the same bytes.

    Attributes:
        empty: One of them, without tokens.
        filled: The same after one token through the model.
        count: How many there are.
    """

    empty: Any
    filled: Any
    count: int


class CacheModel:
    """The caches of a model, packed or not.

    Args:
        skeleton: The model without weights.
        settings: How keys and values are packed; None: not at all.
        step: Tokens of a prompt that are read at once.
        gpu: Whether they will be on a GPU of Apple: packed tokens have another layout there than on a CPU.

    Attributes:
        notes: What stays unpacked, and why.

    Raises:
        UsageError: Packing was asked for, and none of the caches can be packed.
    """

    def __init__(self, skeleton: Skeleton, settings: KVSettings | None = None, *, step: int, gpu: bool):
        self.skeleton, self.settings, self.step, self._gpu = skeleton, settings, step, gpu
        self.notes: list[str] = []
        self._known: dict[int, tuple[list[list[int]], list[int]]] = {}
        self._plain = self._groups(skeleton.caches())
        self._packed = self._plain if settings is None else self._groups(self._pack(skeleton.caches()))

    def _pack(self, caches: list[Any]) -> list[Any]:
        with self._layout():
            events = upgrade_cache(caches, self.settings, model_family=self.skeleton.model.model_type)
        if not any(event.action == "packed" for event in events):
            reasons = list(dict.fromkeys(event.reason for event in events))
            raise UsageError(f"no cache of this model can be packed: {'; '.join(reasons)}", "leave --kv-bits out")
        self.notes = summary(events)
        return caches

    def _layout(self) -> Any:
        """Packed tokens on a GPU are arrays of the reference, whatever machine plans."""
        return _backend("reference") if self._gpu else nullcontext()

    def _groups(self, caches: list[Any]) -> list[_Group]:
        groups: dict[tuple, _Group] = {}
        for empty, filled in zip(leaves(caches), leaves(self.skeleton.filled()), strict=True):
            key = _signature(empty, filled)
            if key in groups:
                groups[key].count += 1
            else:
                groups[key] = _Group(empty, filled, 1)
        return list(groups.values())

    def usage(self, context: int) -> Usage:
        """What the caches take once a prompt and its answer fill a context of so many tokens."""
        groups = self._at(context)
        history, read = self._simulated(context)
        sums = [
            sum(group.count * sizes[min(i, len(sizes) - 1)] for group, sizes in zip(groups, history, strict=True))
            for i in range(max(map(len, history), default=0))
        ] or [0]
        return Usage(sums[-1], max(sums), sum(g.count * n for g, n in zip(groups, read, strict=True)))

    def kinds(self, context: int) -> list[Kind]:
        """The same by kind of cache, the largest first."""
        groups = self._at(context)
        history, _ = self._simulated(context)
        found = [
            Kind(
                *_describe(group),
                token_bytes=group.count * _token_bytes(self, group),
                size_bytes=group.count * sizes[-1],
            )
            for group, sizes in zip(groups, history, strict=True)
        ]
        merged: dict[tuple[str, str], Kind] = {}
        for kind in found:
            same = merged.get((kind.name, kind.shape))
            if same is not None:
                kind = replace(
                    kind,
                    caches=kind.caches + same.caches,
                    token_bytes=kind.token_bytes + same.token_bytes,
                    size_bytes=kind.size_bytes + same.size_bytes,
                )
            merged[kind.name, kind.shape] = kind
        return sorted(merged.values(), key=lambda kind: -kind.size_bytes)

    def _at(self, context: int) -> list[_Group]:
        return self._packed if self.settings is not None and context >= self.settings.start else self._plain

    def _simulated(self, context: int) -> tuple[list[list[int]], list[int]]:
        """Of each group, the bytes of a cache after every chunk and the last token, and what that token reads."""
        if context not in self._known:
            with self._layout():
                self._known[context] = self._simulate(self._at(context), context)
        return self._known[context]

    def _simulate(self, groups: list[_Group], context: int) -> tuple[list[list[int]], list[int]]:
        chunks = list(_chunks(context, self.step))
        own = self._grown_by_model(chunks) if any(grows_alone(group.filled) for group in groups) else {}
        history, read = [], []
        for group in groups:
            if grows_alone(group.filled):
                history.append(own[id(group.filled)])
                read.append(history[-1][-1])
            elif not has_keys(group.filled):
                history.append([group.filled.nbytes])
                read.append(group.filled.nbytes)
            else:
                cache = copy.deepcopy(group.empty)
                history.append([fill(cache, group.filled, n) for n in chunks])
                read.append(_used(cache))
        return history, read

    def _grown_by_model(self, chunks: list[int]) -> dict[int, list[int]]:
        """Caches that only their model knows how to fill: the bytes of each after every chunk."""
        caches = self.skeleton.caches()
        sizes: dict[int, list[int]] = {id(filled): [] for filled in leaves(self.skeleton.filled())}
        for n in chunks:
            self.skeleton(n, caches)
            for key, cache in zip(sizes, leaves(caches), strict=True):
                sizes[key].append(_nbytes(cache))
        return sizes


def _chunks(context: int, step: int) -> Iterator[int]:
    """How a prompt that fills a context is read: in chunks, the last token alone."""
    for start in range(0, context - 1, step):
        yield min(step, context - 1 - start)
    yield 1


def fill(cache: Any, like: Any, n_tokens: int) -> int:
    """Add tokens of the form of another cache's; the bytes it takes then."""
    if like.keys is not None:  # a layer without attention has an empty cache
        keys, values = (
            blank((x.shape[0], x.shape[1], n_tokens, x.shape[3]), x.dtype) for x in (like.keys, like.values)
        )
        if hasattr(cache, "maybe_trim_front"):  # chunked attention: its models call that before every chunk
            cache.maybe_trim_front()
        cache.update_and_fetch(keys, values)
    return _nbytes(cache)


def _nbytes(cache: Any) -> int:
    empty = getattr(cache, "empty", None)
    return 0 if empty is not None and empty() else cache.nbytes


def has_keys(cache: Any) -> bool:
    return hasattr(cache, "keys") and hasattr(cache, "values") and hasattr(cache, "update_and_fetch")


def grows_alone(filled: Any) -> bool:
    """Whether only the model itself knows how a cache grows: neither keys and values, nor a state of fixed size."""
    return not has_keys(filled) and type(filled).__name__ != "ArraysCache"


def _used(cache: Any) -> int:
    """Bytes of the tokens that a cache holds, without its room for more."""
    size = _nbytes(cache)
    if not size or getattr(cache, "settings", None) is not None:  # packed ones have little room
        return size
    rows = cache.keys.shape[2]
    return size * min(cache.size(), rows) // rows


def _signature(empty: Any, filled: Any) -> tuple:
    """Equal for caches that take the same bytes whatever is asked of them."""
    limits = tuple(getattr(empty, name, None) for name in ("max_size", "keep", "chunk_size"))
    if has_keys(filled):
        shapes = None if filled.keys is None else tuple(_form(x) for x in (filled.keys, filled.values))
        return type(empty).__name__, limits, getattr(empty, "settings", None), shapes
    if type(filled).__name__ == "ArraysCache":
        return "ArraysCache", filled.nbytes
    return type(filled).__name__, id(filled)


def _form(x: mx.array) -> tuple:
    return x.shape[1], x.shape[3], x.dtype


def _describe(group: _Group) -> tuple[str, int, str]:
    """Name, number, shape."""
    cache, filled = group.empty, group.filled
    if not has_keys(filled):
        fixed = type(filled).__name__ == "ArraysCache"
        return ("recurrent state" if fixed else type(filled).__name__), group.count, ""
    if filled.keys is None:
        return "no attention", group.count, ""
    heads, key_dim, value_dim = filled.keys.shape[1], filled.keys.shape[3], filled.values.shape[3]
    window = next((size for size in (getattr(cache, n, None) for n in ("max_size", "chunk_size")) if size), None)
    if window is not None:
        name = f"window of {window}"
    else:
        name = "latent" if heads == 1 and key_dim != value_dim else "all tokens"
    settings = getattr(cache, "settings", None)
    if settings is not None:
        name += f", {settings.label()}"
    dims = f"{key_dim}" if key_dim == value_dim else f"{key_dim} + {value_dim}"
    return name, group.count, f"{heads} x {dims}"


def _token_bytes(model: CacheModel, group: _Group) -> int:
    """What a token adds to one cache, far from its beginning."""
    filled = group.filled
    if grows_alone(group.filled):
        far = 8 * model.step
        sizes = [model._grown_by_model(list(_chunks(n, model.step)))[id(filled)][-1] for n in (far, 2 * far)]
        return (sizes[1] - sizes[0]) // far
    if not has_keys(filled) or filled.keys is None or getattr(group.empty, "max_size", None):
        return 0
    if getattr(group.empty, "chunk_size", None):
        return 0
    if getattr(group.empty, "settings", None) is None:
        return sum(prod(_form(x)[:2]) * x.dtype.size for x in (filled.keys, filled.values))
    cache = copy.deepcopy(group.empty)
    with model._layout():
        fill(cache, filled, cache.sink + cache.settings.window + BLOCK)
    packed = cache.arrays[2:-2]
    tokens = max(array.shape[2] for array in packed)  # codes may be in blocks, scales never are
    return sum(array.nbytes for array in packed) // tokens


@contextmanager
def _backend(name: str) -> Iterator[None]:
    """TQ_BACKEND for a while."""
    before = os.environ.get("TQ_BACKEND")
    os.environ["TQ_BACKEND"] = name
    try:
        yield
    finally:
        os.environ.pop("TQ_BACKEND")
        if before is not None:
            os.environ["TQ_BACKEND"] = before
