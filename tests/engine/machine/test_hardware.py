"""Machines by name."""

import mlx.core as mx
import pytest

from tq.engine.machine import hardware
from tq.engine.machine.hardware import GIB, find, gpu_default, names
from tq.errors import UsageError


@pytest.mark.parametrize("name", names())
def test_every_name_is_found_and_plausible(name):
    target = find(name)
    assert target.name == name
    assert target.gpu_bytes is not None and target.memory_bytes / 2 < target.gpu_bytes < target.memory_bytes
    assert target.bandwidth_gb_s is not None and 60 < target.bandwidth_gb_s < 1000
    assert not target.measured and target.free_bytes is None


@pytest.mark.parametrize(
    ("gigabytes", "megabytes"),
    [(16, 12713.12), (24, 19069.67), (32, 26800.60), (36, 30150.67), (48, 40200.90), (64, 55662.79), (128, 115448.73)],
)
def test_the_default_limit_of_the_gpu_is_what_metal_says(gigabytes, megabytes):
    assert gpu_default(gigabytes * GIB) / 1e6 == pytest.approx(megabytes, abs=1)


def test_memory_tells_two_chips_of_one_name_apart():
    assert (find("m3-max-36gb").bandwidth_gb_s, find("m3-max-64gb").bandwidth_gb_s) == (300, 400)


@pytest.mark.parametrize("name", ["M4-16GB", "m4 16gb", "m4-16", "m4_16gb"])
def test_names_are_read_as_people_write_them(name):
    assert find(name).name == "m4-16gb"


def test_unknown_names_are_answered_with_valid_ones():
    with pytest.raises(UsageError, match="is none that tq knows: this, or a chip") as caught:
        find("m1-mx-64gb")
    assert "m1-max-64gb" in caught.value.hint
    with pytest.raises(UsageError, match="is none that tq knows"):
        find("m4-" + "9" * 5000)  # more digits than Python makes a number of
    with pytest.raises(UsageError, match="the M4 is sold with 16, 24, 32 GB"):
        find("m4-48gb")


def test_this_machine_is_measured(monkeypatch):
    import psutil

    target = find("this")
    assert target.memory_bytes == psutil.virtual_memory().total
    assert target.free_bytes is not None and target.free_bytes < target.memory_bytes
    assert (target.gpu_bytes is None) == (mx.default_device() == mx.Device(mx.cpu))
    assert target.measured == (target.bandwidth_gb_s is not None)
    monkeypatch.setattr("tq.engine.ops.selftest.read_bandwidth", lambda: None)
    assert hardware.this_target().bandwidth_gb_s is None
