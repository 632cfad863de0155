"""`tq doctor --kernels` runs every operation on every kind of code, and a wrong kernel is found."""

import mlx.core as mx
import numpy as np
import pytest

from tq.engine import ops
from tq.engine.ops import selftest
from tq.engine.ops.selftest import KernelCheck, check_kernels


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(selftest, "SPEED_BYTES", 1 << 22)
    monkeypatch.setattr(selftest, "REPEATS", 1)


def checks():
    return [event for event in check_kernels() if isinstance(event, KernelCheck)]


def test_every_operation_runs_on_every_code_and_is_right():
    found = checks()
    assert {(c.operation, c.codes) for c in found} == {(op, s.label()) for op in ops.OPS for s in selftest.SPECS}
    assert all(c.ok for c in found)
    for c in found:
        assert (c.gb_s is not None) == (c.operation != "embed" and c.backend != "reference")


def test_a_wrong_kernel_is_found(monkeypatch):
    packed = selftest._random_packed(selftest.SPECS[2], (16, 64), np.random.default_rng(0))
    backend, _ = ops.explain("matmul", packed, mx.float32)
    right = backend.matmul
    monkeypatch.setattr(backend, "matmul", lambda x, packed: right(x, packed) * 1.02)
    # What the reference runs itself has nothing to be compared with.
    wrong = {c.operation for c in checks() if not c.ok and c.backend != "reference"}
    assert wrong == {"matmul"}
