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
from tq.engine.quantize.spec import CODEC_BITS, GROUP_SIZES
from tq.metal.catalogue import catalogue
from tq.metal.variants import Variant, type_name

SPECS = [*(QuantSpec(bits=b) for b in (2, 3, 4, 6, 8)), QuantSpec(bits=3, group_size=0), QuantSpec("ternary", 0),
         QuantSpec("affine", 4)]  # fmt: skip
ALL_SPECS = [QuantSpec(codec, bits, group) for codec, widths in CODEC_BITS.items() for bits in widths
             for group in (*GROUP_SIZES, *((0,) if codec != "affine" else ()))]  # fmt: skip
SHAPE = (53, 192)  # neither a multiple of the 16 rows of a tile
WIDE_SHAPE = (53, 384)  # for groups that do not divide that
EXPERTS = 5
SPEED_COLUMNS = 4096
SPEED_BYTES = 96 << 20  # more than the caches of a processor hold
REPEATS = 5
INT8_ERROR = 0.01  # relative RMS error allowed where activations are quantized to 8 bits, or have a half type
FLOAT_ERROR = 1e-4


@dataclass(frozen=True)
class KernelCheck:
    """One operation on one kind of code.

    Attributes:
        dtype: Of the activations.
        backend: The one that runs it here.
        error: Relative RMS error against the reference.
        gb_s: Packed bytes read per second for one token, where that is what limits it.
        bandwidth_share: The same, as a share of what this machine reads.
        affine_ratio: Its speed, as a ratio to MLX's own affine codes of as many bits, on a GPU.
        declined: Why each preferred backend does not run it.
    """

    operation: str
    codes: str
    dtype: str
    backend: str
    ok: bool
    error: float
    gb_s: float | None
    bandwidth_share: float | None
    affine_ratio: float | None
    declined: dict[str, str]


def check_kernels(everything: bool = False) -> Iterator[Progress | KernelCheck]:
    """Run the kernels with activations of the type that models have here; or all codes with all types."""
    usual = mx.float32 if _on_cpu() else mx.float16
    types = [usual] if not everything or _on_cpu() else [usual, mx.bfloat16, mx.float32]
    bandwidth = read_bandwidth()
    specs = ALL_SPECS if everything else SPECS
    todo = [(op, spec, dtype) for op in ops.OPS for spec in specs for dtype in types]
    single = list(catalogue()) if everything and ops.metal.unavailable() is None else []
    total = len(todo) + len(single)
    for done, (op, spec, dtype) in enumerate(todo):
        yield Progress(done, total, "kernels", f"{op} {spec.label()}")
        yield _check(op, spec, dtype, bandwidth, timed=dtype == usual)
    for done, variant in enumerate(single, len(todo)):
        yield Progress(done, total, "kernels", f"{variant.kernel} {variant.label}")
        yield _check_single(variant, bandwidth)
    yield Progress(total, total, "kernels", "")


def read_bandwidth() -> float | None:
    """GB/s at which the device that runs models reads memory, or None if nothing here can tell."""
    if not _on_cpu():
        x = mx.zeros(4 * SPEED_BYTES // 4)
        mx.eval(x)
        return x.nbytes / _best(lambda: mx.sum(x)) / 1e9
    return library.library().tq_read_bandwidth(SPEED_BYTES) / 1e9 if library.state().active else None


def _on_cpu() -> bool:
    return mx.default_device() == mx.Device(mx.cpu)


def _check(op: str, spec: QuantSpec, dtype: mx.Dtype, bandwidth: float | None, timed: bool) -> KernelCheck:
    packed = sample(op, spec)
    backend, declined = ops.explain(op, packed, dtype)
    error = relative_error(op, backend, packed, dtype)
    gb_s = share = ratio = None
    if timed and op != "embed" and backend is not ops.reference:
        seconds, size = _speed(op, spec, backend, dtype)
        gb_s = size / seconds / 1e9
        share = gb_s / bandwidth if bandwidth else None
        affine = QuantSpec("affine", spec.bits or 2)
        if not _on_cpu() and spec.codec != "affine" and affine.bits in CODEC_BITS["affine"]:
            theirs, their_size = _speed(op, affine, ops.native, dtype)
            weights = 8 * size / _bits_per_weight(spec), 8 * their_size / _bits_per_weight(affine)
            ratio = (weights[0] / seconds) / (weights[1] / theirs)
    ok = error <= allowed_error(backend, dtype)
    return KernelCheck(op, spec.label(), type_name(dtype), backend.name, ok, error, gb_s, share, ratio, declined)


def _check_single(variant: Variant, bandwidth: float | None) -> KernelCheck:
    """A Metal kernel by itself, against float64."""
    case = variant.prepare(np.random.default_rng(0))
    error, gb_s = case.error(), case.size_bytes / _best(case.launch) / 1e9
    share = gb_s / bandwidth if bandwidth else None
    ok = error <= allowed_error(ops.metal, variant.dtype)
    return KernelCheck(
        variant.kernel, variant.label, type_name(variant.dtype), ops.metal.name, ok, error, gb_s, share, None, {}
    )


def sample(op: str, spec: QuantSpec) -> PackedTensor:
    """A small random matrix for an operation."""
    shape = WIDE_SHAPE if spec.group_size == 128 else SHAPE
    return _random_packed(spec, (EXPERTS, *shape) if op == "gather_matmul" else shape, np.random.default_rng(0))


def allowed_error(backend, dtype: mx.Dtype) -> float:
    return INT8_ERROR if backend is ops.cpu or dtype != mx.float32 else FLOAT_ERROR


def relative_error(op: str, backend, packed: PackedTensor, dtype: mx.Dtype) -> float:
    """RMS error of a backend against the reference, relative to the RMS of that."""
    mine = backend.prepare(packed) if hasattr(backend, "prepare") else packed
    got = _run(op, backend, mine, dtype, np.random.default_rng(1))
    expected = _run(op, ops.reference, packed, dtype, np.random.default_rng(1))
    return float(np.linalg.norm(got - expected) / np.linalg.norm(expected))


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


def _speed(op: str, spec: QuantSpec, backend, dtype: mx.Dtype) -> tuple[float, int]:
    """Seconds for one row, or one row per expert, the best of a few runs; and the packed bytes that it reads."""
    rng = np.random.default_rng(0)
    rows = int(SPEED_BYTES / (_bits_per_weight(spec) / 8 * SPEED_COLUMNS)) // 512 * 512
    shape = (rows, SPEED_COLUMNS) if op == "matmul" else (32, rows // 32, SPEED_COLUMNS)
    packed = _random_packed(spec, shape, rng)
    size = spec.size_bytes(shape)
    mine = backend.prepare(packed) if hasattr(backend, "prepare") else packed
    del packed
    x = mx.array(rng.standard_normal((1, SPEED_COLUMNS), np.float32)).astype(dtype)
    experts = mx.arange(32, dtype=mx.uint32)[None]
    if op == "matmul":
        return _best(lambda: backend.matmul(x, mine)), size
    return _best(lambda: backend.gather_matmul(x[None, None], mine, experts)), size


def _best(run) -> float:
    """Seconds of the fastest of a few runs."""
    best = float("inf")
    for _ in range(REPEATS):
        start = time.perf_counter()
        mx.eval(run())
        best = min(best, time.perf_counter() - start)
    return best


def _bits_per_weight(spec: QuantSpec) -> float:
    return spec.bits_per_weight((16, SPEED_COLUMNS))
