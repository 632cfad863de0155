"""Threads: what is asked for, else physical cores, less what affinity and the cgroups of the process take away."""

import os

import pytest

from tq.cpu import cores
from tq.errors import UsageError

V1 = "33 31 0:30 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu,cpuacct\n"
V2 = "30 24 0:26 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate\n"


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A machine made of files: siblings of each processor, and the process's groups with their limits."""
    monkeypatch.delenv("TQ_THREADS", raising=False)
    monkeypatch.setattr(cores, "SYSTEM", tmp_path / "sys")
    monkeypatch.setattr(cores, "PROCESS", tmp_path / "proc")
    (tmp_path / "proc").mkdir()

    def make(siblings, allowed=None, mounts="", groups="", limits=()):
        for processor, text in siblings.items():
            folder = tmp_path / f"sys/devices/system/cpu/cpu{processor}/topology"
            folder.mkdir(parents=True)
            (folder / "thread_siblings_list").write_text(text + "\n")
        allowed = set(siblings) if allowed is None else allowed
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid: allowed, raising=False)
        (tmp_path / "proc/cgroup").write_text(groups)
        (tmp_path / "proc/mountinfo").write_text(mounts.replace("/sys/fs", str(tmp_path / "sys/fs")))
        for name, text in dict(limits).items():
            path = tmp_path / "sys/fs/cgroup" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text + "\n")

    return make


FOUR_CORES = {0: "0,4", 4: "0,4", 1: "1,5", 5: "1,5", 2: "2,6", 6: "2,6", 3: "3,7", 7: "3,7"}


@pytest.mark.parametrize(
    ("siblings", "allowed", "found"),
    [
        (FOUR_CORES, None, 4),
        (FOUR_CORES, {0, 4}, 1),  # both halves of one core
        (FOUR_CORES, {0, 1, 6}, 3),
        ({0: "0", 1: "1"}, None, 2),
        ({}, {0, 1, 2}, 3),  # a system that does not say
    ],
)
def test_hyperthreads_of_a_core_count_once(machine, siblings, allowed, found):
    machine(siblings, allowed)
    assert cores.available() == found


@pytest.mark.parametrize(
    ("limits", "found"),
    [
        ({}, 4),
        ({"app/cpu.max": "max 100000"}, 4),
        ({"app/cpu.max": "200000 100000"}, 2),
        ({"app/cpu.max": "150000 100000"}, 2),
        ({"app/cpu.max": "140000 100000"}, 1),
        ({"app/cpu.max": "10000 100000"}, 1),
        ({"app/cpu.max": "900000 100000"}, 4),
        ({"app/inner/cpu.max": "max 100000", "app/cpu.max": "300000 100000"}, 3),
        ({"app/inner/cpu.max": "300000 100000", "app/cpu.max": "100000 50000"}, 2),
        ({"app/inner/cpu.max": "100000 100000", "app/cpu.max": "300000 100000"}, 1),
    ],
)
def test_the_least_quota_of_all_groups_around_the_process(machine, limits, found):
    machine(FOUR_CORES, mounts=V2, groups="0::/app/inner\n", limits=limits)
    assert cores.available() == found


def test_quotas_of_version_1(machine):
    limits = {"cpu/app/cpu.cfs_quota_us": "200000", "cpu/app/cpu.cfs_period_us": "100000",
              "cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}  # fmt: skip
    groups = "4:memory:/elsewhere\n2:cpu,cpuacct:/app\n0::/\n"
    machine(FOUR_CORES, mounts=V2.replace("/cgroup rw", "/cgroup/unified rw") + V1, groups=groups, limits=limits)
    assert cores.available() == 2


def test_a_container_that_sees_the_names_of_its_host(machine):
    """Only the container's own part of the tree is mounted, in the place of the whole."""
    mounts = V1.replace("0:30 / ", "0:30 /docker/1234 ")
    limits = {"cpu/cpu.cfs_quota_us": "100000", "cpu/cpu.cfs_period_us": "100000"}
    machine(FOUR_CORES, mounts=mounts, groups="2:cpu,cpuacct:/docker/1234\n", limits=limits)
    assert cores.available() == 1


def test_a_group_outside_of_what_is_mounted(machine):
    machine(FOUR_CORES, mounts=V2, groups="0::/../other\n", limits={"cpu.max": "100000 100000"})
    assert cores.available() == 1


def test_no_groups_at_all(machine, tmp_path):
    machine(FOUR_CORES)
    (tmp_path / "proc/cgroup").unlink()
    assert cores.available() == 4


def test_tq_threads_comes_first(machine, monkeypatch):
    machine(FOUR_CORES)
    assert cores.threads() == 4
    monkeypatch.setenv("TQ_THREADS", "7")
    assert cores.threads() == 7
    monkeypatch.setenv("TQ_THREADS", "0")
    with pytest.raises(UsageError):
        cores.threads()


def test_the_real_machine_has_at_least_one_core_and_no_more_than_processors():
    assert 1 <= cores.available() <= os.cpu_count()
