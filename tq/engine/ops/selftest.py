"""Every operation on every kind of code, run on the backend that this machine chooses and held against the reference.

It answers two questions of `tq doctor --kernels`: are the kernels right here, and how close do they come to the speed
at which this machine reads memory. Codes are random, because encoding would take longer than the test.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

import mlx.core as mx
import numpy as np

from tq.cpu import library
from tq.engine import ops
from tq.engine.events import Progress
from tq.engine.quantize import PackedTensor, QuantSpec
from tq.engine.quantize.codecs import layout, shared_arrays

SPECS = [*(QuantSpec(bits=b) for b in (2, 3, 4, 6, 8)), QuantSpec(bits=3, group_size=0), QuantSpec("ternary", 0),
         QuantSpec("affine", 4)]  # fmt: skip
SHAPE = (53, 192)  # neither a multiple of the 16 rows of a tile
EXPERTS = 5
SPEED_COLUMNS = 4096
SPEED_BYTES = 96 << 20  # more than the caches of a processor hold
REPEATS = 5
INT8_ERROR = 0.01  # relative RMS error allowed where activations are quantized to 8 bits
FLOAT_ERROR = 1e-4


@dataclass(frozen=True)
class KernelCheck:
    """One operation on one kind of code.

    Attributes:
        backend: The one that runs it here.
        error: Relative RMS error against the reference.
        gb_s: Packed bytes read per second for one token, where that is what limits it.
        bandwidth_share: The same, as a share of what this machine reads.
        declined: Why each preferred backend does not run it.
    """

    operation: str
    codes: str
    backend: str
    ok: bool
    error: float
    gb_s: float | None
    bandwidth_share: float | None
    declined: dict[str, str]


def check_kernels() -> Iterator[Progress | KernelCheck]:
    """Run them all, with activations of the type that models have here."""
    dtype = mx.float32 if mx.default_device() == mx.Device(mx.cpu) else mx.float16
    bandwidth = library.library().tq_read_bandwidth(SPEED_BYTES) / 1e9 if library.state().active else None
    todo = [(op, spec) for op in ops.OPS for spec in SPECS]
    for done, (op, spec) in enumerate(todo):
        yield Progress(done, len(todo), "kernels", f"{op} {spec.label()}")
        yield _check(op, spec, dtype, bandwidth)
    yield Progress(len(todo), len(todo), "kernels", "")


def _check(op: str, spec: QuantSpec, dtype: mx.Dtype, bandwidth: float | None) -> KernelCheck:
    rng = np.random.default_rng(0)
    shape = (EXPERTS, *SHAPE) if op == "gather_matmul" else SHAPE
    packed = _random_packed(spec, shape, rng)
    backend, declined = ops.explain(op, packed, dtype)
    mine = backend.prepare(packed) if hasattr(backend, "prepare") else packed
    got = _run(op, backend, mine, dtype, np.random.default_rng(1))
    expected = _run(op, ops.reference, packed, dtype, np.random.default_rng(1))
    error = float(np.linalg.norm(got - expected) / np.linalg.norm(expected))
    allowed = INT8_ERROR if backend is ops.cpu else FLOAT_ERROR if dtype == mx.float32 else INT8_ERROR
    gb_s = share = None
    if op != "embed" and backend is not ops.reference:
        gb_s = _speed(op, spec, backend, dtype, rng)
        share = gb_s / bandwidth if bandwidth else None
    return KernelCheck(op, spec.label(), backend.name, error <= allowed, error, gb_s, share, declined)


def _random_packed(spec: QuantSpec, shape: tuple[int, ...], rng: np.random.Generator) -> PackedTensor:
    arrays = dict(shared_arrays(spec, shape[-1]))
    for name, array in layout(spec, shape).items():
        if name == "weight":
            words = rng.integers(0, 3**20 if spec.codec == "ternary" else 2**32, prod(array.shape), np.uint32)
            arrays[name] = mx.array(words).reshape(array.shape)
        else:
            arrays[name] = mx.array(rng.uniform(0.5, 1.5, array.shape).astype(np.float16)).astype(array.dtype)
    return PackedTensor(spec, shape, arrays)


def _run(op: str, backend, packed: PackedTensor, dtype: mx.Dtype, rng: np.random.Generator) -> np.ndarray:
    columns = packed.in_features
    if op == "embed":
        result = backend.embed(mx.array([[0, 52, 7]]), packed, dtype)
    elif op == "gather_matmul":
        x = mx.array(rng.standard_normal((3, 1, 1, columns), np.float32)).astype(dtype)
        result = backend.gather_matmul(x, packed, mx.array([[0, 4], [2, 1], [4, 4]], mx.uint32))
    else:
        # One row, a few and many take different kernels.
        xs = [mx.array(rng.standard_normal((n, columns), np.float32)).astype(dtype) for n in (1, 5, 40)]
        result = mx.concatenate([backend.matmul(x, packed) for x in xs])
    return np.array(result.astype(mx.float32), np.float64)


def _speed(op: str, spec: QuantSpec, backend, dtype: mx.Dtype, rng: np.random.Generator) -> float:
    """Packed GB/s for one row, or one row per expert: the best of a few runs."""
    rows = int(SPEED_BYTES / (layout_bytes(spec, (16, SPEED_COLUMNS)) / 16)) // 512 * 512
    shape = (rows, SPEED_COLUMNS) if op == "matmul" else (32, rows // 32, SPEED_COLUMNS)
    packed = _random_packed(spec, shape, rng)
    size = layout_bytes(spec, shape)
    mine = backend.prepare(packed) if hasattr(backend, "prepare") else packed
    del packed
    x = mx.array(rng.standard_normal((1, SPEED_COLUMNS), np.float32)).astype(dtype)
    experts = mx.arange(32, dtype=mx.uint32)[None]
    best = float("inf")
    for _ in range(REPEATS):
        start = time.perf_counter()
        mx.eval(backend.matmul(x, mine) if op == "matmul" else backend.gather_matmul(x[None, None], mine, experts))
        best = min(best, time.perf_counter() - start)
    return size / best / 1e9


def layout_bytes(spec: QuantSpec, shape: tuple[int, ...]) -> int:
    return sum(array.size_bytes for array in layout(spec, shape).values())
