"""Operations on packed arrays, and the choice of the backend that runs each one.

``TQ_BACKEND`` forces a backend; one that declines then is an error. Otherwise the first backend that supports the
operation runs it, and ``matrix`` tells why the others did not.
"""

import os
from functools import lru_cache
from types import ModuleType

import mlx.core as mx

from tq.engine.ops import native, reference
from tq.engine.quantize import PackedTensor, QuantSpec
from tq.engine.quantize.rotation import rotate, unrotate
from tq.errors import TQError, UsageError

__all__ = ["BACKENDS", "OPS", "embed", "gather_matmul", "matmul", "matrix", "rotate", "unrotate"]

BACKENDS: tuple[ModuleType, ...] = (native, reference)  # in order of preference
OPS = ("matmul", "gather_matmul", "embed")


def forced_backend() -> str:
    """The value of ``TQ_BACKEND``, ``auto`` if unset. Raises UsageError for an unknown name."""
    name = os.environ.get("TQ_BACKEND", "auto") or "auto"
    valid = ("auto", *(b.name for b in BACKENDS))
    if name not in valid:
        raise UsageError(f"TQ_BACKEND={name} is not one of {', '.join(valid)}")
    return name


def select(op: str, packed: PackedTensor, dtype: mx.Dtype) -> ModuleType:
    """The backend that runs ``op``. Raises TQError with every reason when the forced one declines."""
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


def matmul(x: mx.array, packed: PackedTensor, transpose: bool = True) -> mx.array:
    """x @ W^T (x rotated), or x @ W. See ``reference.matmul``."""
    return select("matmul", packed, x.dtype).matmul(x, packed, transpose)


def gather_matmul(x: mx.array, packed: PackedTensor, indices: mx.array, sorted_indices: bool = False) -> mx.array:
    """x @ W[expert]^T (x rotated). See ``reference.gather_matmul``."""
    return select("gather_matmul", packed, x.dtype).gather_matmul(x, packed, indices, sorted_indices)


def embed(ids: mx.array, packed: PackedTensor, dtype: mx.Dtype) -> mx.array:
    """Rows of W, in the rotated basis. See ``reference.embed``."""
    return select("embed", packed, dtype).embed(ids, packed, dtype)


def matrix(dtype: mx.Dtype = mx.float16) -> list[dict[str, str]]:
    """One record per operation and kind of code: the backend that runs it, and why each other one declines."""
    specs = [QuantSpec(bits=b) for b in (2, 3, 4, 8)] + [QuantSpec("ternary", 0), QuantSpec("affine", 4)]
    records = []
    for op in OPS:
        for spec in specs:
            question = PackedTensor(spec, (64, 128) if op != "gather_matmul" else (4, 64, 128), {})
            declined = {b.name: reason for b in BACKENDS if (reason := b.supports(op, question, dtype)) is not None}
            chosen = next(b.name for b in BACKENDS if b.name not in declined)
            records.append(
                {
                    "operation": op,
                    "codes": spec.label(),
                    "backend": chosen,
                    "declined": "; ".join(f"{name}: {reason}" for name, reason in declined.items()),
                }
            )
    return records
