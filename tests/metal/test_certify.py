"""`tq doctor --certify` on a device with Metal: operations on all codes, then the kernels one by one."""

import mlx.core as mx
import pytest
from metal.emulator import Kernel

from tq.engine import ops
from tq.engine.ops import selftest
from tq.engine.ops.selftest import KernelCheck, check_kernels
from tq.engine.quantize import QuantSpec
from tq.metal import rotate
from tq.metal.catalogue import catalogue


@pytest.fixture
def backend(metal, monkeypatch):
    monkeypatch.setattr(ops.metal, "unavailable", lambda: None)
    monkeypatch.setattr(ops.cpu, "unavailable", lambda: "kernels are on Metal here")
    monkeypatch.setitem(Kernel.defaults, "check", False)
    monkeypatch.setattr(selftest, "SPEED_BYTES", 1 << 21)
    monkeypatch.setattr(selftest, "REPEATS", 1)


def test_everything_is_run_and_right(backend, monkeypatch):
    monkeypatch.setattr(selftest, "ALL_SPECS", [QuantSpec(bits=3), QuantSpec("affine", 4)])
    monkeypatch.setattr(selftest, "catalogue", lambda: rotate.variants([mx.float32], [(2, 96)]))
    found = [event for event in check_kernels(everything=True) if isinstance(event, KernelCheck)]
    assert [(c.operation, c.backend) for c in found] == [
        *((op, backend) for op in ops.OPS for backend in ("metal", "mlx")),
        ("rotate", "metal"),
        ("rotate", "metal"),
    ]
    assert all(c.ok for c in found)
    assert found[0].gb_s is not None and found[-1].gb_s is not None


def test_the_catalogue_has_every_kernel_of_which_there_are_variants_and_no_label_twice():
    variants = list(catalogue())
    names = [(v.kernel, v.label) for v in variants]
    assert len(set(names)) == len(names)
    assert {v.kernel for v in variants} == {
        *("matvec", "matmul", "gather_matvec", "gather_matmul", "gate_up", "embed", "rotate"),
        *("attend_rows", "attend_tile"),
    }
