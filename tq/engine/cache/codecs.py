"""What a codec of head vectors is, and which there are."""

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Protocol

import mlx.core as mx

from tq.engine.cache.settings import KVSettings
from tq.errors import TQError

Layout = tuple[tuple[mx.Dtype, int], ...]


class VectorCodec(Protocol):
    """Packs vectors of `dim` numbers one by one. Vectors are (B, heads, tokens, dim), arrays (B, heads, tokens, ...).

    Codes are of a rotated vector, and `decode` gives that: attention rotates a query once and un-rotates one result,
    instead of un-rotating every token. A rotation keeps scalar products.

    Attributes:
        dim: Of a vector.
        layout: Type and last axis of each array.
        fits: Whether `fit` has to see vectors before any is packed.
    """

    dim: int
    layout: Layout
    fits: bool

    def fit(self, x: mx.array) -> mx.array | None:
        """What the codec takes from the first vectors (B, heads, tokens, dim) and needs from then on, if anything."""

    def rotate(self, x: mx.array, fitted: mx.array | None) -> mx.array:
        """Vectors (B, heads, n, dim) in the basis of the codes, float32."""

    def unrotate(self, y: mx.array, fitted: mx.array | None) -> mx.array:
        """The inverse."""

    def encode(self, y: mx.array) -> list[mx.array]:
        """Rotated vectors, packed: arrays of `layout`."""

    def decode(self, arrays: Sequence[mx.array]) -> mx.array:
        """Rotated vectors, float32."""


def size_bytes(codec: VectorCodec) -> int:
    """Bytes of one packed vector."""
    return sum(dtype.size * width for dtype, width in codec.layout)


def key_codec(settings: KVSettings, dim: int) -> VectorCodec:
    """The codec of keys of `dim` numbers.

    Raises:
        TQError: It cannot pack that dimension.
    """
    return make(settings.key_codec, settings.key_bits, dim, settings.group_size)


def value_codec(settings: KVSettings, dim: int) -> VectorCodec:
    """The codec of values of `dim` numbers. Raises as `key_codec`."""
    return make(settings.value_codec, settings.value_bits, dim, settings.group_size)


@lru_cache
def make(name: str, bits: float, dim: int, group_size: int) -> VectorCodec:
    """A codec by its name in `settings.BITS`."""
    from tq.engine.cache.affine import Affine
    from tq.engine.cache.lloyd_max import LloydMax
    from tq.engine.cache.outliers import Outliers
    from tq.engine.cache.polar import Polar
    from tq.engine.cache.qjl import QJL

    if dim < 1:
        raise TQError("there is nothing to pack in vectors without numbers")
    makers: dict[str, Callable[[], VectorCodec]] = {
        "lloyd-max": lambda: LloydMax(int(bits), dim, group_size) if bits == int(bits) else Outliers(bits, dim),
        "qjl": lambda: QJL(int(bits), dim, group_size),
        "affine": lambda: Affine(int(bits), dim, group_size),
        "polar": lambda: Polar(int(bits), dim),
    }
    return makers[name]()
