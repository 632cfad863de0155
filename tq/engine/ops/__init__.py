"""Operations on packed arrays, and the choice of the backend that runs each one.

``TQ_BACKEND`` forces a backend; one that declines then is an error. Otherwise the first backend that supports the
operation runs it, and ``explain`` tells why the others did not.
"""

import os
from functools import lru_cache
from types import ModuleType

import mlx.core as mx

from tq.engine.ops import cpu, metal, native, reference
from tq.engine.ops.prepared import PreparedRotation
from tq.engine.quantize import PackedTensor, QuantSpec, rotation
from tq.errors import TQError, UsageError

__all__ = ["BACKENDS", "OPS", "embed", "explain", "forget_choices", "gather_matmul", "matmul", "rotate", "unrotate"]

BACKENDS: tuple[ModuleType, ...] = (cpu, metal, native, reference)  # in order of preference
OPS = ("matmul", "gather_matmul", "embed")


def forced_backend() -> str:
    """The value of ``TQ_BACKEND``, ``auto`` if unset. Raises UsageError for an unknown name."""
    return _known(os.environ.get("TQ_BACKEND") or "auto")


@lru_cache(maxsize=16)
def _known(name: str) -> str:
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


def forget_choices() -> None:
    """Ask the backends again: what they support has changed."""
    _select.cache_clear()


def rotate(x: mx.array, signs: mx.array, prepared: PreparedRotation | None = None) -> mx.array:
    """y = H (signs * x) along the last axis; ``prepared`` is the same rotation for the backend cpu."""
    if prepared is not None:
        return cpu.rotate(x, prepared)
    return (metal if _metal_rotates(x) else rotation).rotate(x, signs)


def unrotate(y: mx.array, signs: mx.array, prepared: PreparedRotation | None = None) -> mx.array:
    """The inverse of ``rotate``."""
    if prepared is not None:
        return cpu.unrotate(y, prepared)
    return (metal if _metal_rotates(y) else rotation).unrotate(y, signs)


def _metal_rotates(x: mx.array) -> bool:
    return forced_backend() in ("auto", metal.name) and metal.rotates(x.shape[-1], x.dtype)


def matmul(x: mx.array, packed: PackedTensor, transpose: bool = True, bias: mx.array | None = None) -> mx.array:
    """x @ W^T + bias (x rotated), or x @ W. See ``reference.matmul``."""
    return select("matmul", packed, x.dtype).matmul(x, packed, transpose, bias)


def gather_matmul(
    x: mx.array,
    packed: PackedTensor,
    indices: mx.array,
    sorted_indices: bool = False,
    bias: mx.array | None = None,
) -> mx.array:
    """x @ W[expert]^T + bias[expert] (x rotated). See ``reference.gather_matmul``."""
    return select("gather_matmul", packed, x.dtype).gather_matmul(x, packed, indices, sorted_indices, bias)


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
