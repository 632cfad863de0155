"""Where a packed cache keeps its tokens: what every storage offers, the one in plain mx, and the choice of one."""

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any, NamedTuple, Protocol

import mlx.core as mx

from tq.engine import ops
from tq.engine.cache import attention, codecs, mirror
from tq.engine.cache.attention import Packed, Plain, Segment
from tq.engine.cache.mirror import Mirror
from tq.engine.cache.settings import BLOCK, KVSettings
from tq.errors import TQError

ENCODE_STEP = 16 * BLOCK  # tokens that are encoded at once
STEP_BLOCKS = 4  # by which packed arrays grow, or by a sixteenth if that is more
STEP = 32  # rows by which arrays of recent tokens grow


class Form(NamedTuple):
    """The shape of what a cache holds."""

    batch: int
    heads: int
    key_dim: int
    value_dim: int
    dtype: str  # of activations, by its name in mx


class Tokens(Protocol):
    """What a storage reads and writes: a cache.

    Attributes:
        sink: First tokens, which are never packed.
        offset: Tokens so far; packed: of them, in packed arrays; dropped: between sink and packed ones, not kept.
        arrays: Keys and values of the sink, (B, heads, sink, dim); packed arrays of keys, then of values; keys and
            values of recent tokens, up to window + 63. Only the front of each is in use.
        fitted: What the codecs took from the first tokens they packed.
        mirror: All tokens decoded, where the storage keeps them so as well.
        windowed: Whether the first tokens leave it.
    """

    settings: KVSettings
    windowed: bool
    sink: int
    offset: int
    packed: int
    dropped: int
    arrays: list[mx.array]
    fitted: tuple[mx.array | None, mx.array | None]
    mirror: Mirror | None

    def packed_after(self, tokens: int) -> int: ...


class Storage(Protocol):
    """A way to keep and read packed tokens. What `append` and `view` return is for `decoded` and `attend`."""

    name: str
    settings: KVSettings

    def empty(self) -> list[mx.array]:
        """The arrays of a cache without tokens."""

    def append(self, cache: Tokens, keys: mx.array, values: mx.array) -> Any:
        """Add tokens (B, heads, n, dim), pack what is due, and return the view that they attend to."""

    def view(self, cache: Tokens) -> Any:
        """All tokens."""

    def newest(self, view: Any, n: int) -> Any:
        """A view without the oldest tokens after the sink, so that `n` in all are left."""

    def drop(self, cache: Tokens, tokens: int) -> None:
        """Forget the first packed tokens, whole blocks."""

    def decoded(self, view: Any, dtype: mx.Dtype) -> tuple[mx.array, mx.array]:
        """Keys and values (B, heads, tokens, dim)."""

    def attend(
        self,
        view: Any,
        queries: mx.array,
        scale: float,
        mask: mx.array | str | None = None,
        sinks: mx.array | None = None,
        softcap: float = 0.0,
        values_are_keys: bool = False,
    ) -> mx.array | None:
        """`attention.attend` over a view, or None if this storage cannot do that."""


def choose(settings: KVSettings, form: Form) -> tuple[Storage, str | None]:
    """The storage of a cache, and why no kernel reads it, if so.

    Raises:
        TQError: No codec packs these vectors, or TQ_BACKEND asks for kernels that decline.
    """
    if form.heads == 1 and form.key_dim != form.value_dim:
        # Latent attention: the latent, which is keys and values, beside the part of the keys with positions.
        codec = "lloyd-max" if settings.key_codec == "qjl" else settings.key_codec
        settings = replace(settings, value_bits=settings.key_bits, value_codec=codec)
    found = _kernels(settings, form)
    if not isinstance(found, str):
        return found, None
    forced = ops.forced_backend()
    if forced in (ops.cpu.name, ops.metal.name):
        raise TQError(f"the {forced} kernels cannot pack this KV cache: {found}", "unset TQ_BACKEND")
    return reference(settings, form), found


def _kernels(settings: KVSettings, form: Form) -> "Storage | str":
    """The storage that kernels read, of those that TQ_BACKEND allows, or why there is none."""
    from tq.engine.cache import metal, native

    forced = ops.forced_backend()
    why = f"TQ_BACKEND={forced}"
    if forced in ("auto", ops.cpu.name):
        declined = native.declines(settings, form)
        if declined is None:
            return native.storage(settings, form)
        why = declined
    if forced in ("auto", ops.metal.name):
        declined = metal.declines(settings, form)
        if declined is None:
            return metal.storage(settings, form)
        if forced == ops.metal.name or ops.metal.unavailable() is None:
            why = declined
    return why


def slow(settings: KVSettings) -> str | None:
    """None, or why no kernel reads caches of these settings, whatever the model: they save memory then, not time."""
    found = _kernels(settings, Form(1, 1, 128, 128, "float32"))
    if not isinstance(found, str):
        return None
    copied = f"; up to {mirror.LIMIT_BYTES >> 20} MB of each layer are kept decoded as well" if mirror.wanted(0) else ""
    return found + copied


def adopted(
    name: str,
    settings: KVSettings,
    form: Form,
    arrays: list[mx.array],
    fitted: tuple[mx.array | None, mx.array | None],
    tokens: tuple[int, int, int],
) -> tuple[Storage, str | None, list[mx.array], tuple[mx.array | None, mx.array | None]]:
    """The storage of this machine for a saved cache, why no kernel reads it, and its arrays and `fitted` there.

    Args:
        name: The storage that it was saved from.
        tokens: All, packed and dropped ones.

    Raises:
        TQError: The arrays are those of another version of tq, or do not hold so many tokens.
    """
    from tq.engine.cache import native_layout

    storage, declined = choose(settings, form)
    if storage.name == name == Reference.name:
        return storage, declined, arrays, fitted
    if name == Reference.name:
        arrays = native_layout.to_native(storage.settings, form, arrays, fitted, tokens[1])
    native_layout.check(storage.settings, form, arrays, tokens)
    if storage.name != Reference.name:
        return storage, declined, arrays, (None, None)
    return storage, declined, *native_layout.to_reference(storage.settings, form, arrays, tokens[1])


@lru_cache(maxsize=256)
def reference(settings: KVSettings, form: Form) -> "Reference":
    return Reference(settings, form)


class Reference:
    """In plain mx, for every device and codec. Sink and recent tokens have the activation type.

    A view is the segments of a cache, or one with all tokens decoded: then attention is for who asked (`mirror`).
    """

    name = "reference"
    mirrors = True  # where it pays

    def __init__(self, settings: KVSettings, form: Form):
        self.settings, self.form = settings, form
        self.dtype = getattr(mx, form.dtype)
        self.codecs = codecs.key_codec(settings, form.key_dim), codecs.value_codec(settings, form.value_dim)
        self.n_arrays = tuple(len(codec.layout) for codec in self.codecs)

    def __deepcopy__(self, memo: dict) -> "Reference":
        return self

    def empty(self) -> list[mx.array]:
        form = self.form
        sink, recent = (
            [mx.zeros((form.batch, form.heads, n, dim), self.dtype) for dim in (form.key_dim, form.value_dim)]
            for n in (self.settings.sink, 0)
        )
        return [*sink, *self._packed(0), *recent]

    def _packed(self, tokens: int) -> list[mx.array]:
        shape = (self.form.batch, self.form.heads, tokens)
        return [mx.zeros((*shape, width), dtype) for codec in self.codecs for dtype, width in codec.layout]

    def append(self, cache: Tokens, keys: mx.array, values: mx.array) -> list[Segment]:
        first, packed = cache.offset, cache.packed
        copied, cache.mirror = self._mirror(cache, first + keys.shape[2]), None
        view = self._append(cache, keys, values)
        if copied is None:
            return view
        copied = mirror.written(copied, (keys, values), first)
        view = [Plain(*copied, cache.offset)]
        if cache.packed > packed:  # what was packed now is read as what is left of it from the next token on
            new = replace(self._packed_tokens(cache), first=packed, count=cache.packed - packed)
            copied = mirror.written(copied, attention.decoded([new], self.dtype), cache.sink + packed)
        cache.mirror = copied
        return view

    def _mirror(self, cache: Tokens, tokens: int) -> Mirror | None:
        """A decoded copy of a cache, with room for so many tokens; None if it is to have none."""
        form = self.form
        numbers = form.batch * form.heads * (form.key_dim + form.value_dim)
        if cache.windowed or not self.mirrors or not mirror.wanted(tokens * numbers * self.dtype.size):
            return None
        found = cache.mirror
        if found is None:
            shapes = [(form.batch, form.heads, 0, dim) for dim in (form.key_dim, form.value_dim)]
            found = Mirror(*(mx.zeros(shape, self.dtype) for shape in shapes))
            if cache.offset:
                found = Mirror(*attention.decoded(self.view(cache), self.dtype))
        return mirror.with_room(found, tokens)

    def _append(self, cache: Tokens, keys: mx.array, values: mx.array) -> list[Segment]:
        n = keys.shape[2]
        new = [keys.astype(self.dtype), values.astype(self.dtype)]
        arrays, offset = cache.arrays, cache.offset
        if offset < cache.sink:
            taken = min(cache.sink - offset, n)
            for side in (0, 1):
                arrays[side] = _write(arrays[side], new[side][:, :, :taken], offset)
                new[side] = new[side][:, :, taken:]
        begin = max(offset - cache.sink - cache.dropped - cache.packed, 0)  # of new tokens among recent ones
        count = begin + new[0].shape[2]
        packed = cache.packed_after(offset + n)
        due = packed - cache.packed
        cache.offset = offset + n
        if due == 0:
            for side in (0, 1):
                arrays[side - 2] = _write(with_rows(arrays[side - 2], count), new[side], begin)
            return self.view(cache)
        # New tokens attend to each other, and to those that were recent, as they are; the next ones to packed ones.
        recent = [mx.concatenate([arrays[side - 2][:, :, :begin], new[side]], axis=2) for side in (0, 1)]
        sink = min(cache.offset, cache.sink)
        view = [*self._older(cache, sink), Plain(recent[0], recent[1], count)]
        self._pack(cache, [r[:, :, :due] for r in recent], packed)
        for side in (0, 1):
            arrays[side - 2] = with_rows(mx.contiguous(recent[side][:, :, due:]), count - due)
        return view

    def _pack(self, cache: Tokens, vectors: list[mx.array], packed: int) -> None:
        """Pack these keys and values behind the packed ones, of which there are `packed` then."""
        arrays = cache.arrays[2:-2]
        have = arrays[0].shape[2]
        if packed > have:
            longer = self._packed(grown(packed // BLOCK, have // BLOCK) * BLOCK - have)
            arrays = [mx.concatenate(list(pair), axis=2) for pair in zip(arrays, longer, strict=True)]
        first, fitted = 0, list(cache.fitted)
        for side, codec in enumerate(self.codecs):
            x = vectors[side]
            if codec.fits and fitted[side] is None:
                fitted[side] = codec.fit(x)
            for start in range(0, x.shape[2], ENCODE_STEP):
                part = self.encode(side, x[:, :, start : start + ENCODE_STEP], fitted[side])
                for i, codes in enumerate(part, first):
                    arrays[i] = _write(arrays[i], codes, cache.packed + start)
            first += len(codec.layout)
        cache.arrays[2:-2] = arrays
        cache.fitted = (fitted[0], fitted[1])
        cache.packed = packed

    def encode(self, side: int, x: mx.array, fitted: mx.array | None) -> list[mx.array]:
        """Packed arrays of keys (side 0) or values (1)."""
        codec = self.codecs[side]
        return codec.encode(codec.rotate(x, fitted))

    def view(self, cache: Tokens) -> list[Segment]:
        if cache.mirror is not None:
            return [Plain(*cache.mirror, cache.offset)]
        sink = min(cache.offset, cache.sink)
        count = cache.offset - sink - cache.dropped - cache.packed
        return [*self._older(cache, sink), Plain(cache.arrays[-2], cache.arrays[-1], count)]

    def newest(self, view: Sequence[Segment], n: int) -> list[Segment]:
        return newest(view, n)

    def drop(self, cache: Tokens, tokens: int) -> None:
        cache.arrays[2:-2] = [mx.contiguous(a[:, :, tokens:]) for a in cache.arrays[2:-2]]
        cache.packed -= tokens
        cache.dropped += tokens

    def _older(self, cache: Tokens, sink: int) -> list[Segment]:
        return [Plain(cache.arrays[0], cache.arrays[1], sink), self._packed_tokens(cache)]

    def _packed_tokens(self, cache: Tokens) -> Packed:
        arrays, n_keys = cache.arrays[2:-2], self.n_arrays[0]
        return Packed(arrays[:n_keys], arrays[n_keys:], cache.packed, 0, self.codecs, cache.fitted)

    def decoded(self, view: Sequence[Segment], dtype: mx.Dtype) -> tuple[mx.array, mx.array]:
        return attention.decoded(view, dtype)

    def attend(
        self,
        view: Sequence[Segment],
        queries: mx.array,
        scale: float,
        mask: mx.array | str | None = None,
        sinks: mx.array | None = None,
        softcap: float = 0.0,
        values_are_keys: bool = False,
    ) -> mx.array | None:
        if len(view) == 1:
            return None
        return attention.attend(queries, view, scale, mask, sinks, softcap, values_are_keys)


def grown(needed: int, have: int) -> int:
    """Blocks to make room for: those needed at first, then some more, so that growing copies little."""
    return max(needed, have + max(STEP_BLOCKS, have // 16) if have else 0)


def with_rows(array: mx.array, tokens: int) -> mx.array:
    """An array of recent tokens that has room for so many."""
    rows = -(-tokens // STEP) * STEP
    more = rows - array.shape[2]
    return mx.pad(array, [(0, 0), (0, 0), (0, more), (0, 0)]) if more > 0 else array


def _write(array: mx.array, rows: mx.array, at: int) -> mx.array:
    """The array with tokens from `at` on replaced: another one, unless nobody else holds it when it is computed."""
    if rows.shape[2] == 0:
        return array
    return mx.slice_update(array, rows, mx.array([at]), axes=[2])


def newest(view: Sequence[Segment], n: int) -> list[Segment]:
    """A view without the oldest tokens after the sink, so that `n` in all are left."""
    surplus = sum(segment.count for segment in view) - n
    sink, packed, recent = view
    assert isinstance(packed, Packed) and isinstance(recent, Plain)
    if surplus <= 0:
        return list(view)
    cut = min(surplus, packed.count)
    packed = replace(packed, first=packed.first + cut, count=packed.count - cut)
    late = surplus - cut
    if late:
        recent = Plain(
            recent.keys[:, :, late : recent.count], recent.values[:, :, late : recent.count], recent.count - late
        )
    return [sink, packed, recent]
