"""PackedKVCache: mlx-lm's cache of one layer with its tokens in a few bits per number.

The first `sink` tokens and at least the last `window` stay as they are; between them, blocks of 64 tokens are packed as
they fill. How and where is the storage's business (storage.py). Sequences of a batch have the same length here:
batch.py has those of different lengths.
"""

import copy
import json
import weakref
from dataclasses import asdict
from typing import Any

import mlx.core as mx

from tq.engine.cache import storage as storages
from tq.engine.cache.mirror import Mirror
from tq.engine.cache.settings import BLOCK, KVSettings
from tq.engine.cache.storage import Form, Storage
from tq.errors import TQError


class Fetched:
    """The keys and values that a cache gave to a model last, and what attention needs to read them packed.

    A model's attention may get other arrays than its cache returned (latent attention does, for prompts), so that the
    packed tokens stand for arrays only if these are the very ones that were returned.
    """

    def __init__(self) -> None:
        self._held: tuple[weakref.ref, weakref.ref, Any] | None = None

    def remember(self, keys: mx.array, values: mx.array, view: Any) -> tuple[mx.array, mx.array]:
        """`view` lives as long as the arrays: it holds what the next token writes to."""
        holder = weakref.ref(self)

        def forget(_: Any) -> None:
            found = holder()
            if found is not None:
                found._held = None

        self._held = None
        self._held = weakref.ref(keys, forget), weakref.ref(values), view
        return keys, values

    def take(self, keys: Any, values: Any) -> tuple[Any, bool] | None:
        """(view, whether the keys serve as values too) if these are the arrays, else None."""
        held = self._held
        if held is None or held[0]() is not keys:
            return None
        if values is not keys and held[1]() is not values:
            return None
        return held[2], values is keys

    def __deepcopy__(self, memo: dict) -> "Fetched":
        return Fetched()


class PackedKVCache:
    """In place of mlx-lm's KVCache.

    Attributes:
        offset: Tokens so far.
        limit: How many of its latest tokens the next one sees, itself and the sink included; 0: all.
        sink: First tokens, which are never packed.
        packed: Tokens in packed arrays.
        dropped: Tokens after the sink that a window has left behind.
        storage: Where they are; None before the first token. `declined`: why not the CPU kernels' memory, if so.
        arrays, fitted, mirror: As the storage has them (storage.Tokens).
        centre: (B, heads, 1, key_dim): what is taken from all keys before the storage sees them. None before tokens are
            packed, and where the settings want none.

    Biases of key projections make a large part of all keys the same, and codes spend their bits on it. Scores of all
    tokens change by the same number without it, which the softmax does not see: nobody has to add it to them.
    """

    windowed = False
    limit = 0

    def __init__(self, settings: KVSettings | None = None):
        self.settings = settings or KVSettings()
        self.sink = self.settings.sink
        self.offset = self.packed = self.dropped = 0
        self.arrays: list[mx.array] = []
        self.fitted: tuple[mx.array | None, mx.array | None] = (None, None)
        self.mirror: Mirror | None = None
        self.centre: mx.array | None = None
        self.form: Form | None = None
        self.storage: Storage | None = None
        self.declined: str | None = None
        self._fetched = Fetched()
        self._rests_until = 0  # tokens: as long as there are fewer, native layers write recent ones alone

    def packed_after(self, tokens: int) -> int:
        """How many tokens packed arrays hold once there are so many."""
        return max(self.packed, self.settings.packed_after(tokens - self.dropped, self.sink))

    def open(self, form: Form) -> Storage:
        """The storage for tokens of this form.

        Raises:
            TQError: The cache holds tokens of another form, or the settings cannot pack this one.
        """
        if self.storage is None:
            self.storage, self.declined = storages.choose(self.settings, form)
            self.form, self.arrays = form, self.storage.empty()
        elif self.form is not None and form[:4] != self.form[:4]:
            raise TQError(
                f"a packed KV cache of (sequences, heads, key and value numbers) {self.form[:4]} cannot take {form[:4]}"
            )
        return self.storage

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Add tokens. keys: (B, heads, n, key_dim), values: (B, heads, n, value_dim).

        Returns:
            Keys and values of all tokens that these attend to, (B, heads, tokens, dim): decoded, as far as somebody
            reads them. Attention that knows packed tokens (hook.py) does not.
        """
        view = self.append(keys, values)
        return self._fetched.remember(*self._decoded(view, keys.dtype), view)

    def append(self, keys: mx.array, values: mx.array) -> Any:
        """Add tokens, as `update_and_fetch`, and return the storage's view of those that these attend to."""
        storage = self.open(form_of(keys, values))
        self._rests_until = 0
        self.make_room(keys.shape[2])
        return self.seen_of(storage.append(self, self._centred(keys), values))

    def make_room(self, n_tokens: int) -> None:
        """Before so many tokens are added."""

    def seen_of(self, view: Any) -> Any:
        """The tokens of a view that the latest ones see."""
        return view

    def keys_and_values(self) -> tuple[mx.array, mx.array]:
        """All tokens that the last ones attend to: for layers that share the cache of another one."""
        view, dtype = self.seen_of(self._opened().view(self)), getattr(mx, self._form().dtype)
        return self._fetched.remember(*self._decoded(view, dtype), view)

    @property
    def centres(self) -> bool:
        """Whether keys are packed less a centre: not in windows, whose first tokens leave, nor if they are values."""
        latent = self.form is not None and self.form.heads == 1 and self.form.key_dim != self.form.value_dim
        return bool(self.settings.centre) and not self.windowed and not latent

    def _centred(self, keys: mx.array) -> mx.array:
        """New keys less the centre: the mean of the first ones that are packed, which is found when they are due."""
        if not self.centres:
            return keys
        if self.centre is None:
            tokens = self.offset + keys.shape[2]
            due = self.packed_after(tokens)
            if due == 0:
                return keys
            recent = max(self.offset - self.sink, 0)
            new = keys[:, :, max(self.sink - self.offset, 0) :]
            first = mx.concatenate([self.arrays[-2][:, :, :recent].astype(mx.float32), new.astype(mx.float32)], axis=2)
            self.centre, self.mirror = first[:, :, :due].mean(axis=2, keepdims=True), None
            for i in (0, -2):
                self.arrays[i] = (self.arrays[i].astype(mx.float32) - self.centre).astype(self.arrays[i].dtype)
        return (keys.astype(mx.float32) - self.centre).astype(keys.dtype)

    def _decoded(self, view: Any, dtype: mx.Dtype) -> tuple[mx.array, mx.array]:
        """Keys and values of a view as a model knows them."""
        keys, values = self._opened().decoded(view, dtype)
        return keys if self.centre is None else (keys.astype(mx.float32) + self.centre).astype(dtype), values

    def attend(self, queries: mx.array, keys: mx.array, values: mx.array, **how: Any) -> mx.array | None:
        """Attention over packed tokens, for arrays that `update_and_fetch` returned; else None.

        Args:
            how: `scale`, `mask`, `sinks`, `softcap` as in `attention.attend`.
        """
        found = self._fetched.take(keys, values)
        if found is None:
            return None
        view, values_are_keys = found
        if self.centre is not None and (values_are_keys or how.get("sinks") is not None or how.get("softcap")):
            return None  # there a constant in all scores counts
        return self._opened().attend(view, queries, values_are_keys=values_are_keys, **how)

    # --- what native layers need (model/native_layers.py) ---

    def native(self, n_tokens: int, heads: int, key_dim: int, value_dim: int) -> Any:
        """The `native.Code` of arrays with room for more tokens; None if they are not the CPU kernels'."""
        storage = self.storage
        if storage is None or self.form is None or self.form[:4] != (1, heads, key_dim, value_dim):
            storage = self.open(Form(1, heads, key_dim, value_dim, "float32"))
        if storage.name != "cpu" or self.centres:  # the kernels would write keys as they are
            return None
        self.make_room(n_tokens)
        storage.reserve(self, n_tokens)  # type: ignore[attr-defined]
        return storage.code  # type: ignore[attr-defined]

    def resting(self) -> Any:
        """The same if one more token changes nothing but the recent ones, and they have room for it; else None."""
        return self.storage.code if self.offset < self._rests_until else None  # type: ignore[union-attr]

    def advance(self, arrays: list[mx.array], n_tokens: int) -> None:
        """These arrays, or the recent ones alone, hold so many more tokens."""
        self.offset += n_tokens
        self.arrays += arrays
        if len(arrays) == 2:
            return
        self.packed = self.packed_after(self.offset)
        if self.limit == 0 and self.offset >= self.sink:
            room = min(self.settings.window + BLOCK - 1, arrays[-1].shape[2])
            self._rests_until = self.sink + self.packed + room

    @property
    def keys(self) -> mx.array:
        """No tokens, (B, heads, 0, key_dim): for `cache.keys = mx.depends(cache.keys, others)` in models whose graphs
        would grow otherwise. All keys are in `keys_and_values`."""
        return mx.zeros((*self._form()[:2], 0, self._form().key_dim), self.arrays[-2].dtype)

    @keys.setter
    def keys(self, keys: mx.array) -> None:
        self.arrays[-2] = mx.depends(self.arrays[-2], keys)

    # --- what mlx-lm asks of a cache ---

    def previous(self) -> int:
        """Tokens before the next one that it sees."""
        return self.offset

    def size(self) -> int:
        return self.offset

    def empty(self) -> bool:
        return self.offset == 0

    @property
    def nbytes(self) -> int:
        return sum(a.nbytes for a in (*self.arrays, *self.fitted, self.centre) if a is not None)

    def make_mask(self, *args: Any, **kwargs: Any) -> Any:
        from mlx_lm.models.cache import create_attention_mask

        return create_attention_mask(*args, offset=self.offset, **kwargs)

    def is_trimmable(self) -> bool:
        return self.dropped == 0

    def trim(self, n: int) -> int:
        """Forget the last n tokens. A block that is cut is decoded back into the recent ones."""
        if not self.is_trimmable():
            return 0
        self._rests_until = 0
        n = min(self.offset, n)
        left = self.offset - n
        rest = max(left - self.sink, 0)
        if rest < self.packed:
            packed = rest // BLOCK * BLOCK
            storage = self._opened()
            dtype = self.arrays[-1].dtype
            both = storage.decoded(storage.view(self), dtype)
            first = self.sink + packed
            for side in (0, 1):
                kept, recent = both[side][:, :, first : self.sink + rest], self.arrays[side - 2]
                self.arrays[side - 2] = mx.concatenate([kept, recent[:, :, rest - packed :]], axis=2)
            self.packed = packed
        self.offset = left
        return n

    @property
    def state(self) -> Any:
        """Arrays, and all else as a line of JSON: what `from_state` needs, and files hold."""
        return json.dumps(self._header()), self.arrays or None, *self.fitted, self.centre

    @state.setter
    def state(self, state: Any) -> None:
        header, arrays, *found = state
        header = json.loads(header)
        self._read_header(header)
        self.arrays = list(arrays or [])
        self.fitted, self.centre = (found[0], found[1]), found[2] if len(found) > 2 else None
        if header["form"] is not None:
            self.form = Form(*header["form"])
            self.storage, self.declined, self.arrays, self.fitted = storages.adopted(
                header["storage"], self.settings, self.form, self.arrays, self.fitted, tuple(header["tokens"])
            )

    def _header(self) -> dict:
        """What is no array."""
        return {
            "settings": asdict(self.settings),
            "tokens": [self.offset, self.packed, self.dropped],
            "form": self.form,
            "storage": None if self.storage is None else self.storage.name,
        }

    def _read_header(self, header: dict) -> None:
        PackedKVCache.__init__(self, KVSettings(**header["settings"]))
        self.offset, self.packed, self.dropped = header["tokens"]

    @property
    def meta_state(self) -> str:
        """Nothing: `state` has it all."""
        return ""

    @classmethod
    def from_state(cls, state: Any, meta_state: str = "") -> Any:
        """The cache that had this state, in the storage of this machine."""
        made = cls.__new__(cls)
        made.state = state
        return made

    @classmethod
    def merge(cls, caches: list[Any]) -> Any:
        """One cache of several sequences, whatever their lengths."""
        from tq.engine.cache.batch import BatchPackedKVCache

        return BatchPackedKVCache.merge(caches)

    def copy(self) -> Any:
        """Another cache of the same tokens, which goes its own way. Arrays are shared until one of them writes."""
        made = copy.copy(self)
        made.arrays, made._fetched = list(self.arrays), Fetched()
        return made

    def _opened(self) -> Storage:
        assert self.storage is not None, "no tokens yet"
        return self.storage

    def _form(self) -> Form:
        assert self.form is not None, "no tokens yet"
        return self.form


def form_of(keys: mx.array, values: mx.array) -> Form:
    batch, heads, _, key_dim = keys.shape
    return Form(batch, heads, key_dim, values.shape[3], str(keys.dtype).removeprefix("mlx.core."))
