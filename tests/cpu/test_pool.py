"""The threads of the kernels: every part runs once, whoever calls, whatever sleeps, after a fork and until the end."""

import ctypes
import subprocess
import sys
import threading
import time

import pytest
from native_harness import LEVELS, harness, harness_path

from tq.cpu import library

THREADS = (1, 2, 3, 7)
# A fresh process: the harness, and a way to fail. Hangs are found by its time limit.
PREAMBLE = """
import ctypes, os, sys, threading
pool = ctypes.CDLL(sys.argv[1])

def in_child(check):
    process = os.fork()
    if process == 0:
        os._exit(0 if check() else 1)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 0

def works():
    return pool.check_regions(200, 100, 0) == 0 and pool.region_parts() == pool.tq_get_threads()
"""


@pytest.fixture
def pool():
    return harness(LEVELS[0])


def in_a_fresh_process(script: str) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore::DeprecationWarning", "-c", PREAMBLE + script, str(harness_path(LEVELS[0]))],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("threads", THREADS)
def test_each_part_runs_once(pool, threads):
    pool.tq_set_threads(threads)
    assert pool.tq_get_threads() == pool.region_parts() == threads
    for items in (0, 1, 5, 1000):
        assert pool.check_regions(300, items, 0) == 0


@pytest.mark.parametrize("threads", THREADS)
def test_parts_run_at_the_same_time(pool, threads):
    pool.tq_set_threads(threads)
    for _ in range(3):
        pool.meet()


@pytest.mark.parametrize("threads", THREADS)
def test_threads_that_fell_asleep_come_back(pool, threads):
    pool.tq_set_threads(threads)
    assert pool.check_regions(20, 100, 200) == 0  # the caller sleeps as well
    for _ in range(5):
        time.sleep(0.01)
        assert pool.check_regions(1, 100, 0) == 0
        pool.meet()


def test_the_number_of_threads_may_change_at_any_time(pool):
    for threads in (1, 3, 2, 7, 7, 1, 2):
        pool.tq_set_threads(threads)
        assert pool.region_parts() == threads
        assert pool.check_regions(50, 100, 0) == 0
    pool.tq_set_threads(0)
    assert pool.tq_get_threads() == 1


def test_a_region_inside_a_region_stays_on_its_thread(pool):
    for threads in THREADS:
        pool.tq_set_threads(threads)
        assert pool.nested_parts() == 1
    assert pool.region_parts() == threads


def test_callers_do_not_disturb_each_other(pool):
    pool.tq_set_threads(3)
    wrong = []
    callers = [threading.Thread(target=lambda: wrong.append(pool.check_regions(2000, 100, 0))) for _ in range(4)]
    for caller in callers:
        caller.start()
    while any(caller.is_alive() for caller in callers):
        for threads in THREADS:
            pool.tq_set_threads(threads)
            time.sleep(0.001)
    assert wrong == [0] * 4
    pool.tq_set_threads(2)
    assert pool.region_parts() == 2


def test_memory_of_threads(pool):
    kept = []

    def ask():
        kept.append(all(pool.scratch_is_aligned_and_kept(size) for size in (100, 5000, 1 << 20, 3)))

    callers = [threading.Thread(target=ask) for _ in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert kept == [True] * 4


def test_a_child_starts_threads_of_its_own():
    in_a_fresh_process("""
pool.tq_set_threads(3)
assert in_child(works)  # before the first use
assert works()
for _ in range(5):
    assert in_child(works)
    assert in_child(lambda: in_child(works) and works())
    assert works()
""")


def test_a_fork_while_another_thread_computes():
    in_a_fresh_process("""
pool.tq_set_threads(2)
going = True
def compute():
    while going:
        assert pool.check_regions(50, 100, 0) == 0
computing = threading.Thread(target=compute)
computing.start()
good = all([in_child(works) for _ in range(20)])
going = False
computing.join()
assert good
assert works()
""")


def test_forked_workers_of_multiprocessing():
    in_a_fresh_process("""
import multiprocessing
pool.tq_set_threads(2)
assert works()
def check(_):
    return works()
with multiprocessing.get_context("fork").Pool(3) as processes:
    assert all(processes.map(check, range(12)))
""")


def test_a_process_ends_whatever_the_threads_do():
    in_a_fresh_process("""
pool.tq_set_threads(4)
assert works()
threading.Thread(target=pool.check_regions, args=(1 << 30, 100, 0), daemon=True).start()
""")


def test_the_library_says_what_it_is():
    for level in LEVELS:
        assert harness(level).tq_isa().decode() == level.name
    assert harness(LEVELS[0]).tq_struct_size(b"tq_nothing") == -1
    for name, structure in library.STRUCTURES.items():
        assert harness(LEVELS[0]).tq_struct_size(name.encode()) == ctypes.sizeof(structure)


def test_read_bandwidth_is_that_of_some_machine(pool):
    pool.tq_set_threads(2)
    for size in (0, 1, 1 << 20):
        assert 1e6 < pool.tq_read_bandwidth(size) < 1e14
