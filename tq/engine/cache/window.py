"""PackedRotatingKVCache: a sliding window over packed tokens, in place of mlx-lm's RotatingKVCache."""

from dataclasses import replace
from typing import Any

import mlx.core as mx

from tq.engine.cache.packed import PackedKVCache
from tq.engine.cache.settings import BLOCK, KVSettings

LEAST_BLOCKS = 2  # that a window has to have behind its unpacked tokens


def worth_packing(settings: KVSettings, max_size: int, keep: int) -> bool:
    """Whether enough of a window would be packed: recent tokens alone take `window` to `window + 64`."""
    return max_size >= keep + settings.window + BLOCK + LEAST_BLOCKS * BLOCK


class PackedRotatingKVCache(PackedKVCache):
    """The first `keep` tokens and the latest ones, `max_size` in all; whole blocks leave at the other end.

    Tokens are in the order of time, where mlx-lm's overwrites the oldest: what attention computes is the same.
    There is no sink but `keep`: the first tokens leave the window like all others.
    """

    windowed = True

    def __init__(self, settings: KVSettings | None = None, max_size: int = 0, keep: int = 0):
        super().__init__(replace(settings or KVSettings(), sink=keep))
        self.max_size = max_size
        self.seen = 0  # by the last tokens that were added

    @property
    def limit(self) -> int:  # type: ignore[override]
        return self.max_size

    def make_room(self, n_tokens: int) -> None:
        """Forget blocks that no later token sees: not before one comes, as other layers may read what the last saw."""
        surplus = self.offset - self.dropped - self.max_size
        due = min(max(surplus, 0), self.packed) // BLOCK * BLOCK
        if due:
            self._opened().drop(self, due)
        self.seen = self.previous() + n_tokens

    def seen_of(self, view: Any) -> Any:
        return self._opened().newest(view, self.seen)

    def previous(self) -> int:
        return min(self.offset, self.max_size - 1)

    def size(self) -> int:
        return min(self.offset, self.max_size)

    def is_trimmable(self) -> bool:
        return self.offset < self.max_size

    def make_mask(self, N: int, window_size: int | None = None, return_array: bool = False) -> Any:
        from mlx_lm.models.cache import create_causal_mask

        if N > 1:
            window = window_size or self.max_size
            offset = self.previous()
            if offset + N > window or return_array:
                return create_causal_mask(N, offset, window_size=window)
            return "causal"
        tokens = min(self.offset + 1, self.max_size)
        if window_size is None or tokens <= window_size:
            return None
        return mx.arange(tokens) >= tokens - window_size

    def _header(self) -> dict:
        return super()._header() | {"max_size": self.max_size, "seen": self.seen}

    def _read_header(self, header: dict) -> None:
        super()._read_header(header)
        self.max_size, self.seen = header["max_size"], header["seen"]
