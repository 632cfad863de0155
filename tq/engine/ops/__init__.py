"""Operations on packed arrays, and the choice of the backend that runs each one.

``TQ_BACKEND`` forces a backend; one that declines then is an error. Otherwise the first backend that supports the
operation runs it, and ``explain`` tells why the others did not.
"""

import os
from functools import lru_cache
from types import ModuleType

import mlx.core as mx

from tq.engine.ops import cpu, native, reference
from tq.engine.ops.prepared import PreparedRotation
from tq.engine.quantize import PackedTensor, QuantSpec, rotation
from tq.errors import TQError, UsageError

__all__ = ["BACKENDS", "OPS", "embed", "explain", "gather_matmul", "matmul", "rotate", "unrotate"]

BACKENDS: tuple[ModuleType, ...] = (cpu, native, reference)  # in order of preference
OPS = ("matmul", "gather_matmul", "embed")


def forced_backend() -> str:
    """The value of ``TQ_BACKEND``, ``auto`` if unset. Raises UsageError for an unknown name."""
    name = os.environ.get("TQ_BACKEND", "auto") or "auto"
    valid = ("auto", *(b.name for b in BACKENDS))
    if name not in valid:
        raise UsageError(f"TQ_BACKEND={name} is not one of {', '.join(valid)}")
    return name


def select(op: str, packed: PackedTensor, dtype: mx.Dtype) -> ModuleType:
    """The backend that runs ``op``: the one that a matrix was prepared for, or the first that supports it.

    Raises:
        TQError: The backend that TQ_BACKEND asks for declines. It has every reason.
    """
    if packed.prepared is not None:
        return cpu
    return _select(op, packed.spec, packed.shape, packed.decoded is not None, dtype, forced_backend())


@lru_cache(maxsize=4096)
def _select(
    op: str, spec: QuantSpec, shape: tuple[int, ...], decoded: bool, dtype: mx.Dtype, forced: str
) -> ModuleType:
    question = PackedTensor(spec, shape, {}, decoded=mx.array(0) if decoded else None)
    reasons = []
    for backend in BACKENDS:
        if forced in ("auto", backend.name):
            reason = backend.supports(op, question, dtype)
            if reason is None:
                return backend
            reasons.append(f"{backend.name}: {reason}")
    raise TQError(f"no backend runs {op} on {spec.label()} ({'; '.join(reasons)})", "unset TQ_BACKEND")


def rotate(x: mx.array, signs: mx.array, prepared: PreparedRotation | None = None) -> mx.array:
    """y = H (signs * x) along the last axis; ``prepared`` is the same rotation for the backend cpu."""
    return rotation.rotate(x, signs) if prepared is None else cpu.rotate(x, prepared)


def unrotate(y: mx.array, signs: mx.array, prepared: PreparedRotation | None = None) -> mx.array:
    """The inverse of ``rotate``."""
    return rotation.unrotate(y, signs) if prepared is None else cpu.unrotate(y, prepared)


def matmul(x: mx.array, packed: PackedTensor, transpose: bool = True) -> mx.array:
    """x @ W^T (x rotated), or x @ W. See ``reference.matmul``."""
    return select("matmul", packed, x.dtype).matmul(x, packed, transpose)


def gather_matmul(x: mx.array, packed: PackedTensor, indices: mx.array, sorted_indices: bool = False) -> mx.array:
    """x @ W[expert]^T (x rotated). See ``reference.gather_matmul``."""
    return select("gather_matmul", packed, x.dtype).gather_matmul(x, packed, indices, sorted_indices)


def embed(ids: mx.array, packed: PackedTensor, dtype: mx.Dtype) -> mx.array:
    """Rows of W, in the rotated basis. See ``reference.embed``."""
    return select("embed", packed, dtype).embed(ids, packed, dtype)


def explain(op: str, packed: PackedTensor, dtype: mx.Dtype) -> tuple[ModuleType, dict[str, str]]:
    """The backend that ``TQ_BACKEND=auto`` chooses, and why each one preferred to it declines."""
    declined: dict[str, str] = {}
    for backend in BACKENDS:
        reason = backend.supports(op, packed, dtype)
        if reason is None:
            return backend, declined
        declined[backend.name] = reason
    raise AssertionError("the reference runs everything")
