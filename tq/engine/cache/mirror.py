"""A decoded copy of what a cache holds, for packed tokens that no kernel reads: what it may take, and how it grows.

Without kernels a CPU would decode every packed token again for each new one, 20 to 80 times as long as the model itself
takes. With a copy each token is decoded once, when it is packed, and attention is that over an unpacked cache. The
price is memory, up to LIMIT_BYTES for a layer; a cache that outgrows it gives its copy up, and is decoded from then on.
GPUs decode fast enough and never have one, and neither have caches where TQ_BACKEND names a backend: `reference` reads
packed tokens as they are.
"""

from typing import NamedTuple

import mlx.core as mx

from tq.engine import ops

LIMIT_BYTES = 16 << 20  # of a layer's keys and values: 10 000 tokens of a model of 135M, 2000 of one of 8B
STEP = 256  # rows by which it grows, or by an eighth if that is more


class Mirror(NamedTuple):
    """Keys and values (B, heads, rows, dim) of all tokens in their order, behind which there is room for more."""

    keys: mx.array
    values: mx.array


def wanted(size_bytes: int) -> bool:
    """Whether a cache of so many decoded bytes has a copy."""
    return size_bytes <= LIMIT_BYTES and ops.forced_backend() == "auto" and mx.default_device() == mx.Device(mx.cpu)


def with_room(mirror: Mirror, tokens: int) -> Mirror:
    """The same with room for so many tokens, which is `wanted`."""
    have = mirror.keys.shape[2]
    if tokens <= have:
        return mirror
    row_bytes = sum(side.itemsize * side.shape[0] * side.shape[1] * side.shape[3] for side in mirror)
    rows = min(-(-max(tokens, have + have // 8) // STEP) * STEP, max(LIMIT_BYTES // row_bytes, tokens))
    return Mirror(*(mx.pad(side, [(0, 0), (0, 0), (0, rows - have), (0, 0)]) for side in mirror))


def written(mirror: Mirror, tokens: tuple[mx.array, mx.array], at: int) -> Mirror:
    """The same with these keys and values from token `at` on."""
    pairs = zip(mirror, tokens, strict=True)
    return Mirror(*(mx.slice_update(side, new.astype(side.dtype), mx.array([at]), axes=[2]) for side, new in pairs))
