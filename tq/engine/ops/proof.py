"""Metal kernels prove themselves on a device before a model runs on them.

Each is checked once for a device, an MLX version and the text of the kernels; what was right is remembered in
``~/.cache/tq/metal``. One that is wrong is switched off, and something slower runs instead of giving wrong text.
"""

import hashlib
import json
from collections.abc import Iterable
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from tq import settings
from tq.engine import ops
from tq.engine.ops import metal, reference, selftest
from tq.engine.quantize import QuantSpec, rotation
from tq.metal.experts import Activation
from tq.metal.kernel import FOLDER

# An operation on codes, or "rotate" and a number of features.
Work = tuple[str, QuantSpec | int]

ALPHA, LIMIT = 1.702, 7.0


def switch_off_wrong(work: Iterable[Work], dtype: mx.Dtype) -> list[str]:
    """Check the kernels that do this work, where there is a Metal GPU.

    Returns:
        A sentence on each that was wrong: it is switched off for this process.
    """
    if metal.unavailable() is not None:
        return []
    record = _Record(_file())
    notes = []
    for op, codes in dict.fromkeys(work):
        name = f"{op} {codes.label() if isinstance(codes, QuantSpec) else codes} {dtype}"
        if name in record.right or not _runs(op, codes, dtype):
            continue
        wrong = _fault(op, codes, dtype)
        if wrong is None:
            record.right.add(name)
        else:
            metal.switched_off[op, codes] = wrong
            notes.append(f"something slower does {name}: {wrong}; please report this")
    record.save()
    if notes:
        ops.forget_choices()
    return notes


def _runs(op: str, codes: QuantSpec | int, dtype: mx.Dtype) -> bool:
    if isinstance(codes, int):
        return metal.rotates(codes, dtype)
    return metal.supports(op, selftest.sample(op, codes), dtype) is None


def _fault(op: str, codes: QuantSpec | int, dtype: mx.Dtype) -> str | None:
    """What is wrong with a kernel here, or None."""
    try:
        error = _error(op, codes, dtype)
    except RuntimeError as failure:  # what MLX says when Metal does not compile or run a kernel
        return f"its kernel does not run on this device ({str(failure).splitlines()[0]})"
    if error <= selftest.allowed_error(metal, dtype):
        return None
    return f"its kernel is wrong on this device (relative error {error:.1e})"


def _error(op: str, codes: QuantSpec | int, dtype: mx.Dtype) -> float:
    if isinstance(codes, int):
        return _rotation_error(codes, dtype)
    if op == "gate_up":
        return _gate_up_error(codes, dtype)
    return selftest.relative_error(op, metal, selftest.sample(op, codes), dtype)


def _rotation_error(n: int, dtype: mx.Dtype) -> float:
    x = mx.array(np.random.default_rng(0).standard_normal((3, n)).astype(np.float32)).astype(dtype)
    signs = mx.array(rotation.random_signs(n))
    with mx.stream(mx.cpu):  # some releases of MLX rotate wrongly on Metal
        expected = [there(x.astype(mx.float32), signs) for there in (rotation.rotate, rotation.unrotate)]
    return _largest_difference([metal.rotate(x, signs), metal.unrotate(x, signs)], expected)


def _gate_up_error(spec: QuantSpec, dtype: mx.Dtype) -> float:
    packed = selftest.sample("gather_matmul", spec)
    x = mx.array(np.random.default_rng(0).standard_normal((3, packed.in_features)).astype(np.float32)).astype(dtype)
    indices = mx.array([[0, 4], [2, 1], [4, 4]], mx.uint32)
    product = reference.gather_matmul(x[:, None, None], packed, indices).astype(mx.float32)  # gate and up are the same
    clipped = mx.minimum(product, LIMIT)
    expected: dict[Activation, mx.array] = {
        "silu": product * mx.sigmoid(product) * product,
        "gelu_tanh": nn.gelu_approx(product) * product,
        "swiglu_oai": (mx.maximum(clipped, -LIMIT) + 1) * clipped * mx.sigmoid(ALPHA * clipped),
    }
    got = [metal.gate_up(x, packed, packed, indices, name, alpha=ALPHA, limit=LIMIT) for name in expected]
    return _largest_difference(got, list(expected.values()))


def _largest_difference(got: list[mx.array], expected: list[mx.array]) -> float:
    """The largest of the relative RMS errors."""
    pairs = zip(got, expected, strict=True)
    return max(float(mx.linalg.norm(a.astype(mx.float32) - b) / mx.linalg.norm(b)) for a, b in pairs)


class _Record:
    """Names of what was right, in a file that may be missing, damaged or not writable."""

    def __init__(self, path: Path):
        self.path = path
        try:
            self.before = set(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            self.before = set()
        self.right = set(self.before)

    def save(self) -> None:
        if self.right == self.before:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            partial = self.path.with_name(f"{self.path.name}.{id(self)}")
            partial.write_text(json.dumps(sorted(self.right), indent=1), encoding="utf-8")
            partial.replace(self.path)
        except OSError:
            pass  # they are checked again


@lru_cache
def _file() -> Path:
    """Of this device, this MLX and these kernels."""
    what = hashlib.sha256(f"{mx.device_info()} {version('mlx')}".encode())
    for path in sorted(FOLDER.glob("*.*")):
        what.update(path.read_bytes())
    return settings.cache_dir() / "metal" / f"{what.hexdigest()[:20]}.json"
