"""A Metal kernel that is wrong on a device is switched off there, and one that was right is not checked again."""

import json

import mlx.core as mx
import pytest

from tq.engine import ops
from tq.engine.ops import metal, proof, reference
from tq.engine.quantize import QuantSpec
from tq.engine.quantize import rotation as plain

SPEC = QuantSpec("lloyd-max", 3, 64)
WORK = [("matmul", SPEC), ("embed", SPEC), ("rotate", 96), ("matmul", SPEC)]


@pytest.fixture
def kernels(monkeypatch, tmp_path):
    """Kernels that do what the reference does, and count what they are asked for."""
    calls = []

    def counted(name, function):
        return lambda *arguments, **named: calls.append(name) or function(*arguments, **named)

    for name in ("matmul", "gather_matmul", "embed"):
        monkeypatch.setattr(metal, name, counted(name, getattr(reference, name)))
    for name in ("rotate", "unrotate"):
        monkeypatch.setattr(metal, name, counted(name, getattr(plain, name)))
    monkeypatch.setattr(metal, "unavailable", lambda: None)
    monkeypatch.setattr(metal, "switched_off", {})
    monkeypatch.setattr(proof, "_file", lambda: tmp_path / "made" / "right.json")
    yield calls
    ops.forget_choices()


def check(work=WORK, dtype=mx.float32):
    return proof.switch_off_wrong(work, dtype)


def test_what_is_right_is_checked_once(kernels, tmp_path):
    assert check() == []
    assert set(kernels) == {"matmul", "embed", "rotate", "unrotate"}
    names = json.loads((tmp_path / "made" / "right.json").read_text())
    assert len(names) == 3
    assert [p.name for p in (tmp_path / "made").iterdir()] == ["right.json"]
    kernels.clear()
    assert check() == []
    assert kernels == []
    assert check(dtype=mx.float16) == []
    assert kernels != []


@pytest.mark.parametrize("content", ["", "{", "[[]]", "3", None])
def test_a_damaged_or_unwritable_record_only_costs_another_check(kernels, tmp_path, content):
    if content is None:
        (tmp_path / "made").write_text("a file where a folder should be")
    else:
        (tmp_path / "made").mkdir()
        (tmp_path / "made" / "right.json").write_text(content)
    assert check() == []
    assert "matmul" in kernels


def test_what_is_wrong_is_switched_off(kernels, monkeypatch):
    monkeypatch.setattr(metal, "matmul", lambda *a: reference.matmul(*a) * 1.05)
    (note,) = check()
    assert "matmul lloyd-max 3-bit g64" in note
    assert "relative error 5.0e-02" in note
    assert "wrong on this device" in metal.supports("matmul", ops.selftest.sample("matmul", SPEC), mx.float32)
    assert metal.supports("embed", ops.selftest.sample("embed", SPEC), mx.float32) is None
    assert len(check([("matmul", SPEC)])) == 0  # it is known


def test_a_rotation_that_is_wrong_is_switched_off(kernels, monkeypatch):
    assert metal.rotates(96, mx.float32)
    monkeypatch.setattr(metal, "unrotate", plain.rotate)
    assert len(check()) == 1
    assert not metal.rotates(96, mx.float32)
    assert metal.rotates(192, mx.float32)


def test_what_does_not_run_is_switched_off(kernels, monkeypatch):
    def fails(*arguments):
        raise RuntimeError("[metal::Device] Unable to build\nand more")

    monkeypatch.setattr(metal, "embed", fails)
    (note,) = check()
    assert "does not run on this device ([metal::Device] Unable to build)" in note
