"""The storage in plain mx, with packing and attention by Metal kernels (tq/metal).

Arrays are the same, so that a saved cache goes on wherever it is loaded.
"""

from collections.abc import Sequence
from functools import lru_cache

import mlx.core as mx

from tq.engine.cache.attention import Packed, Plain, Segment
from tq.engine.cache.codecs import VectorCodec
from tq.engine.cache.lloyd_max import LloydMax
from tq.engine.cache.rotation import rotation
from tq.engine.cache.settings import KVSettings
from tq.engine.cache.storage import Form, Reference
from tq.engine.ops import metal
from tq.metal import attend as attention_kernel
from tq.metal import kv_encode
from tq.metal.attend import Codes, Tokens


def declines(settings: KVSettings, form: Form) -> str | None:
    """None, or why the kernels cannot read such a cache."""
    reason = metal.unavailable()
    if reason is not None:
        return reason
    made = Reference(settings, form)
    codes = [codes_of(codec) for codec in made.codecs]
    for one, name in zip(codes, (settings.key_codec, settings.value_codec), strict=True):
        if one is None:
            return f"there is no Metal kernel for the KV codec {name} with these bits"
        reason = kv_encode.declines(made.dtype, one)
        if reason is not None:
            return f"there is no Metal kernel for {reason}"
    reason = attention_kernel.declines(made.dtype, *(one for one in codes if one is not None))
    return None if reason is None else f"there is no Metal kernel for {reason}"


def codes_of(codec: VectorCodec) -> Codes | None:
    """What the kernels are told of a codec, or None if they do not know it."""
    return _codes(codec) if isinstance(codec, LloydMax) else None


@lru_cache(maxsize=256)
def _codes(codec: LloydMax) -> Codes:
    group_size = 0 if codec.group == codec.dim else codec.group
    return Codes(codec.bits, mx.array(codec.levels), rotation(codec.dim), group_size)


@lru_cache(maxsize=256)
def storage(settings: KVSettings, form: Form) -> "Metal":
    return Metal(settings, form)


class Metal(Reference):
    """As Reference, for the codec lloyd-max of whole bits."""

    mirrors = False

    def __init__(self, settings: KVSettings, form: Form):
        super().__init__(settings, form)
        key, value = (codes_of(codec) for codec in self.codecs)
        assert key is not None and value is not None
        self.codes = key, value

    def encode(self, side: int, x: mx.array, fitted: mx.array | None) -> list[mx.array]:
        return list(kv_encode.encode(x, self.codes[side]))

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
        sink, packed, recent = view
        assert isinstance(sink, Plain) and isinstance(packed, Packed) and isinstance(recent, Plain)
        key, value = self.codes
        keys = packed.keys[0], packed.keys[1]
        tokens = Tokens(
            (sink.keys, sink.keys if values_are_keys else sink.values),
            keys,
            keys if values_are_keys else (packed.values[0], packed.values[1]),
            (recent.keys, recent.keys if values_are_keys else recent.values),
            *(sink.count, packed.first, packed.count, recent.count),
        )
        return attention_kernel.attend(
            queries, tokens, key, key if values_are_keys else value, scale, mask, sinks, softcap
        )
