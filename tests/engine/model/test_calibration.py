"""The files of a calibration: what is written is read, in half the bytes, and what cannot be read says why."""

import errno
import json
import subprocess
import sys

import numpy as np
import pytest

from tq.engine.model.calibration import (
    NAME,
    Index,
    moments_bytes,
    read_counts,
    read_index,
    read_moments,
    write_index,
    write_moments,
)
from tq.engine.quantize.feedback import DAMPING
from tq.engine.quantize.moments import Moments
from tq.errors import TQError

INDEX = Index("model", "abc", {"text": "t", "tokens": 32}, {"layers.0.q": ("layers.0.q.safetensors", 9)}, {"l": [1, 2]})


def moments(n, count=50, seed=0):
    x = np.random.default_rng(seed).standard_normal((count, n)) * np.exp(np.linspace(-4, 4, n))
    return (x.T @ x).astype(np.float32)


def assert_close(found, expected):
    """To what float16 can tell, relative to the strength of the two channels."""
    strength = np.sqrt(np.outer(np.diagonal(expected), np.diagonal(expected))) + 1e-30
    assert np.abs((found - expected) / strength).max() < 1e-3


def test_moments_are_read_as_they_were_written(tmp_path):
    total = moments(33)
    total[4, :] = total[:, 4] = 0  # a channel that was always zero
    path = tmp_path / "a.b.safetensors"
    write_moments(path, Moments(total, 50))
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    found = read_moments(path)
    assert (found.count, found.own, found.counts) == (50, None, None)
    assert_close(found.total, total)
    np.testing.assert_array_equal(found.total, found.total.T)
    assert path.stat().st_size - moments_bytes(33, None) < 1000


def test_moments_of_experts_are_read_as_they_were_written(tmp_path):
    counts = np.array([50, 0, 3])
    own = np.stack([moments(12, count, seed=count) for count in counts])
    path = tmp_path / "experts.safetensors"
    write_moments(path, Moments(own.sum(axis=0), 53, own, counts))
    found = read_moments(path)
    for expert in range(3):
        assert_close(found.own[expert], own[expert])
    np.testing.assert_array_equal(found.counts, counts)
    assert read_counts(path) == [50, 0, 3]
    assert path.stat().st_size - moments_bytes(12, 3) < 1000


def test_the_index_is_read_as_it_was_written(tmp_path):
    write_index(tmp_path, INDEX)
    assert read_index(tmp_path) == INDEX


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (None, "is no calibration"),
        ({"format": "other"}, "its format is 'other'"),
        ({"version": 2}, "has version 2 of the format of calibrations, this tq reads 1"),
        ({"matrices": [1]}, "is not the index of a calibration"),
    ],
)
def test_what_is_no_calibration_says_so(tmp_path, change, message):
    if change is not None:
        write_index(tmp_path, INDEX)
        (tmp_path / NAME).write_text(json.dumps(json.loads((tmp_path / NAME).read_text()) | change))
    with pytest.raises(TQError, match=message):
        read_index(tmp_path)


def test_a_file_that_was_cut_off_says_so(tmp_path):
    path = tmp_path / "a.safetensors"
    write_moments(path, Moments(moments(16), 50))
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(TQError, match="cannot be read"):
        read_moments(path)


def test_inputs_that_are_not_finite_are_refused_when_they_are_seen(tmp_path):
    total = moments(9)
    total[2, 3] = total[3, 2] = np.inf
    with pytest.raises(TQError, match=r"a\.b: its inputs cannot be used: they are not finite"):
        write_moments(tmp_path / "a.b.safetensors", Moments(total, 50))
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_an_os_error_and_leaves_nothing_half_written(tmp_path):
    """Of a process whose files must stay small, which is what MLX's writer sees of a full disk."""
    script = """
import resource, sys
from pathlib import Path
import numpy as np
from tq.engine.model.calibration import write_moments
from tq.engine.quantize.moments import Moments

resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
try:
    write_moments(Path(sys.argv[1]) / "a.safetensors", Moments(np.eye(200, dtype=np.float32), 5))
except OSError as error:
    print(error.errno, Path(error.filename).name)
"""
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(errno.ENOSPC), "a.safetensors"]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("signs", ["alike", "alternating"])
def test_channels_that_are_nearly_one_are_told_apart(signs, tmp_path):
    """Rounding must stay below what damping adds, or the moments are not positive and the factor is of noise."""
    n = 600
    x = 1 + 0.1 * np.random.default_rng(0).standard_normal((4 * n, n))
    x = (x * (np.resize([1, -1], n) if signs == "alternating" else 1)).astype(np.float32)
    total = x.T @ x
    write_moments(tmp_path / "a.safetensors", Moments(total, len(x)))
    found = read_moments(tmp_path / "a.safetensors").total
    scales = np.sqrt(np.diagonal(total).astype(np.float64))
    worst = np.abs(np.linalg.eigvalsh((found - total) / np.outer(scales, scales))).max()
    assert worst < 0.05 * DAMPING
