"""The backend `metal` without a GPU: nothing to do is done without a kernel."""

import mlx.core as mx
import pytest

from tq.engine.ops import metal, selftest
from tq.engine.quantize import QuantSpec

SPEC = QuantSpec("lloyd-max", 3, 64)


@pytest.fixture(autouse=True)
def no_kernel(monkeypatch):
    def factory(**arguments):
        raise AssertionError("a kernel was asked for")

    monkeypatch.setattr(mx.fast, "metal_kernel", factory)


def test_no_rows_are_a_result_without_rows():
    packed, experts = selftest.sample("matmul", SPEC), selftest.sample("gather_matmul", SPEC)
    columns, rows = packed.in_features, packed.shape[0]
    assert metal.matmul(mx.zeros((2, 0, columns)), packed).shape == (2, 0, rows)
    nobody = mx.zeros((0, 2), mx.uint32)
    assert metal.gather_matmul(mx.zeros((0, 1, 1, columns)), experts, nobody).shape == (0, 2, 1, rows)
    assert metal.embed(mx.zeros((1, 0), mx.int32), packed, mx.float16).shape == (1, 0, columns)
    assert metal.rotate(mx.zeros((0, columns)), mx.ones(columns)).shape == (0, columns)
