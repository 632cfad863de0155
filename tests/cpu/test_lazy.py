"""Operations reach MLX as lazy arrays or directly, with equal results; buffers are reused only where nobody looks."""

import copy
import ctypes
import functools
import gc
import importlib.util
import os
import subprocess
import sys
import sysconfig
import threading
from ctypes import c_float, c_int32
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from tq.cpu import build, lazy, library
from tq.cpu.build import Declined, Recipe

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="kernels are for Linux")
SOURCE = Path(__file__).with_name("operations.cpp")


class Add(ctypes.Structure):
    _fields_ = (("number", c_float), ("numbers", ctypes.c_void_p), ("calls", ctypes.c_void_p), ("wait_us", c_int32))


class Append(ctypes.Structure):
    _fields_ = (("row", c_int32), ("wait_us", c_int32))


class Token(ctypes.Structure):
    _fields_ = (("number", c_float), ("position", c_int32), ("row", c_int32), ("rows", c_int32))


@functools.cache
def operations():
    recipe = Recipe("operations", "C++", (SOURCE,), (), ("-std=c++20", "-O1", f"-I{library.KERNELS}"))
    return build.load(build.build(recipe).path)


@pytest.fixture(autouse=True)
def our_operations(monkeypatch):
    monkeypatch.setattr(
        lazy, "_address_of", lambda name: ctypes.cast(getattr(operations(), name), ctypes.c_void_p).value
    )


def test_this_machine_has_the_extension():
    assert lazy.state() == lazy.LazyState(True, "lazy operations of MLX")


@pytest.fixture(params=["lazy", "direct"])
def both(request, monkeypatch):
    if request.param == "direct":
        monkeypatch.setattr(lazy, "state", lambda: lazy.LazyState(False, "asked for"))
        monkeypatch.setattr(lazy, "_way", lambda: lazy._call_now)
    return request.param


def add(x, number=0.0, numbers=None, calls=None, wait_us=0, **more):
    return lazy.call("add", Add(number, numbers, calls, wait_us), [x], [(x.shape, mx.float32)], **more)[0]


def address(a):
    return np.asarray(a).__array_interface__["data"][0]


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.uint32, mx.int32, mx.uint8, mx.bool_])
@pytest.mark.parametrize("shape", [(), (1,), (7,), (2, 3), (2, 1, 5), (0,), (3, 0, 2)])
def test_every_type_and_shape(both, dtype, shape):
    x = (mx.arange(int(np.prod(shape))) % 3).reshape(shape).astype(dtype)
    (y,) = lazy.call("copy", c_int32(dtype.size), [x], [(shape, dtype)])
    assert (y.dtype, y.shape) == (dtype, shape)
    assert y.tolist() == x.tolist()
    (described,) = lazy.call("describe", c_int32(), [x], [((3 + 2 * x.ndim,), mx.int32)])
    assert described.tolist()[:2] == [
        [mx.float32, mx.float16, mx.uint32, mx.int32, mx.uint8, mx.bool_].index(dtype), x.ndim,
    ]  # fmt: skip
    assert described.tolist()[3 : 3 + x.ndim] == list(shape)
    assert x.size == 0 or described.tolist()[2] == 0


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.int64])
def test_a_type_that_kernels_do_not_know_is_refused(both, dtype):
    with pytest.raises((ValueError, KeyError, RuntimeError)):
        lazy.call("copy", c_int32(1), [mx.zeros((3,)).astype(dtype)], [((3,), mx.float32)])


VIEWS = {
    "transposed": lambda x: x.T,
    "columns": lambda x: x[:, 1:4],
    "every second": lambda x: x[:, ::2],
    "backwards": lambda x: x[::-1],
    "broadcast": lambda x: mx.broadcast_to(x[:1], (4, 6)),
    "one column": lambda x: x[:, 2:3],
    "offset": lambda x: x[2:],
    "middle": lambda x: x[1:2, 3:],
    "three axes": lambda x: x.reshape(4, 3, 2).transpose(1, 0, 2),
}


@pytest.mark.parametrize("view", VIEWS)
def test_inputs_are_made_row_contiguous(both, view):
    x = mx.arange(24, dtype=mx.float32).reshape(4, 6)
    mx.eval(x)
    y = VIEWS[view](x)
    assert add(y, 0.5).tolist() == (np.array(y) + 0.5).tolist()
    unevaluated = VIEWS[view](x + 1)
    assert add(unevaluated, 0.5).tolist() == (np.array(y) + 1.5).tolist()


def test_a_kernel_that_reads_strides_gets_them(both):
    x = mx.arange(24, dtype=mx.float32).reshape(4, 6)
    for y, strides in [(x[:, 1:4], [6, 1]), (mx.broadcast_to(x[:1], (3, 6)), [0, 1]), (x[1:, ::2], None), (x.T, None)]:
        (rows,) = lazy.call("read_rows", c_int32(), [y], [(y.shape, mx.float32)], strided=True)
        assert rows.tolist() == y.tolist()
        (described,) = lazy.call("describe", c_int32(), [y], [((7,), mx.int32)], strided=True)
        assert described.tolist()[5:] == (strides or [y.shape[1], 1])


def test_parameters_are_those_of_the_call(both):
    params = Add(1.0)
    (y,) = lazy.call("add", params, [mx.zeros(3)], [((3,), mx.float32)])
    params.number = 5.0
    assert y.tolist() == [1, 1, 1]


def test_nothing_runs_before_it_is_asked_for():
    calls = lazy.Memory(8)
    count = calls.view().view(np.int64)
    y = add(mx.zeros(3), 1.0, calls=calls.address, keep=lazy.Pinned(calls))
    z = add(y, 1.0, calls=calls.address)
    assert count[0] == 0
    assert z.tolist() == [2, 2, 2]
    assert count[0] == 2
    assert y.tolist() == [1, 1, 1]
    assert count[0] == 2


def test_a_long_chain(both):
    x = mx.zeros((2, 3))
    for i in range(300):
        x = add(x, 1.0) if i % 3 else add(x, 1.0) * 1.0
    assert x.tolist() == [[300] * 3] * 2


def test_what_parameters_point_to_stays(both):
    """Everything but the pending call lets go of its weights; then memory is filled with something else."""
    y = mx.zeros(4)
    for i in range(20):
        weights = mx.full((1000,), float(i))
        memory = lazy.Memory(64)
        memory.view().view(np.float32)[0] = 0.5
        inner = lazy.Pinned(memory)
        pinned = lazy.Pinned(weights, also=[inner])
        y = add(y, 0.0, pinned.addresses[0], wait_us=1000, keep=pinned)
        y = add(y, 0.0, inner.addresses[0], keep=pinned)
        del weights, memory, inner, pinned
    gc.collect()
    other = [mx.full((1000,), -1000.0) for _ in range(40)]
    mx.eval(other)
    assert y.tolist() == [sum(range(20)) + 10] * 4


def test_what_nobody_points_to_any_more_is_freed():
    mx.synchronize()
    gc.collect()
    before = mx.get_active_memory()
    pinned = lazy.Pinned(mx.zeros(1 << 20))
    y = add(mx.zeros(1), 0.0, pinned.addresses[0], keep=pinned)
    del pinned
    assert mx.get_active_memory() >= before + (4 << 20)
    mx.eval(y)
    mx.synchronize()
    assert mx.get_active_memory() < before + (1 << 20)


def test_pinned_arrays_are_evaluated_and_in_rows(both):
    x = mx.arange(12, dtype=mx.float32).reshape(3, 4)
    pinned = lazy.Pinned(x.T, mx.array([7], mx.uint8))
    found = (c_float * 12).from_address(pinned.addresses[0])
    assert list(found) == x.T.flatten().tolist()
    assert ctypes.c_uint8.from_address(pinned.addresses[1]).value == 7


@pytest.mark.parametrize("size", [0, 1, 63, 64, 1000, 1 << 20])
def test_memory_is_aligned_and_zero_and_outlives_its_owner_in_a_view(both, size):
    memory = lazy.Memory(size)
    assert (memory.address % 64, memory.size_bytes) == (0, size)
    view = memory.view()
    assert (view.dtype, view.shape, view.any()) == (np.uint8, (size,), False)
    view[:] = 9
    assert memory.view().tolist() == [9] * size if size < 2000 else (memory.view() == 9).all()
    del memory
    gc.collect()
    junk = [lazy.Memory(size) for _ in range(10)]
    assert (view == 9).all() and len(junk) == 10


def put(cache, row, value, wait_us=0):
    return lazy.call("put", Append(row, wait_us), [cache, mx.array([value])], [(cache.shape, mx.float32)], [0])[0]


def append(first, second, row, value, wait_us=0):
    outputs = [(first.shape, mx.float32), (second.shape, mx.float32), ((1,), mx.float32)]
    return lazy.call("append", Append(row, wait_us), [first, second, mx.array([value])], outputs, [0, 1])


def caches(n=64):
    first, second = mx.zeros(n), mx.full((n,), 0.0)
    mx.eval(first, second)
    return first, second


def test_continued_outputs_begin_with_what_the_inputs_hold(both):
    first, second = caches(5)
    for i in range(5):
        first, second, total = append(first, second, i, float(i + 1))
        assert total.item() == 11 * sum(range(i + 2))
    assert first.tolist() == [1, 2, 3, 4, 5]
    assert second.tolist() == [10, 20, 30, 40, 50]


def test_an_output_may_have_another_shape_than_the_input_that_it_continues(both):
    cache = mx.zeros((2, 3))
    (y,) = lazy.call("put", Append(4, 0), [cache, mx.array([8.0])], [((3, 2), mx.float32)], [0])
    assert y.tolist() == [[0, 0], [0, 0], [8, 0]]


def test_an_output_of_another_size_is_refused():
    for shape, dtype in [((3,), mx.float32), ((2,), mx.int32)]:
        with pytest.raises(ValueError, match="another size or type"):
            lazy.call("put", Append(0, 0), [mx.zeros(2), mx.array([1.0])], [(shape, dtype)], [0])


@pytest.mark.parametrize("evaluate", ["once", "each", "pipelined"])
@pytest.mark.parametrize("first_asked", ["first", "second", "total"])
def test_caches_are_written_where_they_are(evaluate, first_asked):
    """All outputs of an operation, whichever of them it is evaluated for, and while earlier ones still run."""
    first, second = caches()
    at = address(first), address(second)
    totals = []
    for i in range(20):
        first, second, total = append(first, second, i, float(i + 1), wait_us=500)
        if first_asked != "total":
            total = total + {"first": first, "second": second}[first_asked][i : i + 1] * 0
        totals.append(total)
        if evaluate == "each":
            mx.eval(total)
        elif evaluate == "pipelined":
            mx.async_eval(total)
    assert [total.item() for total in totals] == [11 * sum(range(i + 2)) for i in range(20)]
    if first_asked == "total" or evaluate == "each":  # views of a cache that wait in the stream hold on to it
        assert (address(first), address(second)) == at
    assert first.tolist() == [float(i + 1) for i in range(20)] + [0.0] * 44


@pytest.mark.parametrize("pipelined", [False, True])
@pytest.mark.parametrize("hold", ["array", "view", "deepcopy", "numpy", "state", "pending view"])
def test_what_somebody_still_sees_does_not_change(both, pipelined, hold):
    first, second = caches(8)
    seen = []
    for i in range(6):
        if hold == "array":
            seen.append(first)
        elif hold in ("view", "pending view"):
            seen.append(first[: i + 1])
        elif hold == "deepcopy":
            seen.append(copy.deepcopy(first))
        elif hold == "state":
            seen.append(mx.contiguous(second)[:8] * 0.1)
        else:
            seen.append(np.asarray(first))
        if hold == "view":
            mx.eval(seen[-1])
        first, second, total = append(first, second, i, float(i + 1), wait_us=1000)
        (mx.async_eval if pipelined else mx.eval)(total)
    for i, old in enumerate(seen):
        expected = [float(k + 1) if k < i else 0.0 for k in range(len(old))]
        np.testing.assert_allclose(np.array(old), expected, rtol=1e-6)


class Cache:
    """As mlx-lm's KVCache."""

    def __init__(self, keys, values, offset):
        self.keys, self.values, self.offset = keys, values, offset


def attend_to(heads=2, capacity=3, key_dim=4, value_dim=5, dtype=mx.float32):
    shape = (1, heads, capacity)
    return Cache(mx.zeros((*shape, key_dim), dtype), mx.zeros((*shape, value_dim), dtype), 0)


def bound(keep=None):
    return lazy.bind("token", Token(100.0, -1, -1, -1), "position", [-1, 1, 2], keep or lazy.Pinned())


def test_a_bound_kernel_gets_the_numbers_of_each_call(both):
    forward = bound()
    keys, values = mx.zeros((2, 3)), mx.zeros((7,), mx.float16)
    x = mx.array([[0.5, 2.0]])
    first, keys, values = forward([x, keys, values], (1, 2, 3))
    second, keys, values = forward([x + 1, keys, values], (4, 0))
    assert (keys.shape, values.shape, values.dtype) == ((2, 3), (7,), mx.float16)
    assert second.tolist() == [[104.5, 106.0]]  # rows as when it was bound
    assert first.tolist() == [[106.5, 108.0]]
    assert keys.flatten().tolist() == [5.5, 0, 1.5, 0, 0, 0]  # x + position, at row


def test_a_bound_kernel_refuses_what_it_was_not_bound_to():
    forward = bound()
    with pytest.raises(ValueError, match="too many numbers"):
        forward([mx.zeros(1)] * 3, (1, 2, 3, 4))
    with pytest.raises((IndexError, ValueError)):
        forward([mx.zeros(1)], (1, 2, 3))


def test_what_a_bound_kernel_points_to_stays():
    memory = lazy.Memory(1 << 16)
    forward = bound(lazy.Pinned(memory))
    pointed = (ctypes.c_char * 4).from_address(memory.address)
    pointed.raw = b"here"
    y, *_ = forward([mx.zeros((1, 1, 1)), mx.zeros(4), mx.zeros(4)], (0, 0, 0))
    del memory, forward
    gc.collect()
    junk = [lazy.Memory(1 << 16) for _ in range(50)]
    assert pointed.raw == b"here" and len(junk) == 50
    mx.eval(y)


def test_a_token_goes_behind_those_of_a_cache():
    forward, cache = bound(), attend_to()
    at = []
    for i in range(3):
        y = forward.append(mx.full((1, 1, 6), float(i)), cache, 2, 4, 5)
        assert (cache.offset, y.shape) == (i + 1, (1, 1, 6))
        assert y.flatten().tolist() == [100.0 + i + i + (i + i + 1)] * 6  # number + x + position + row + rows
        at.append(address(cache.keys))
    assert len(set(at[1:])) == 1  # written where they are
    assert cache.keys.flatten().tolist()[:4] == [0, 2, 4, 0]
    assert forward.append(mx.zeros((1, 1, 6)), cache, 2, 4, 5) is None  # full
    assert (cache.offset, address(cache.keys)) == (3, at[-1])


@pytest.mark.parametrize(
    ("x", "cache"),
    [
        (mx.zeros((1, 2, 6)), attend_to()),
        (mx.zeros((2, 1, 6)), attend_to()),
        (mx.zeros((1, 6)), attend_to()),
        (mx.zeros((1, 1, 6), mx.float16), attend_to()),
        (mx.zeros((1, 1, 6)), attend_to(heads=1)),
        (mx.zeros((1, 1, 6)), attend_to(key_dim=5)),
        (mx.zeros((1, 1, 6)), attend_to(value_dim=4)),
        (mx.zeros((1, 1, 6)), attend_to(dtype=mx.bfloat16)),
        (mx.zeros((1, 1, 6)), attend_to(capacity=0)),
        (mx.zeros((1, 1, 6)), Cache(None, None, 0)),
        (mx.zeros((1, 1, 6)), Cache(attend_to().keys, attend_to(dtype=mx.float16).values, 0)),
        (mx.zeros((1, 1, 6)), Cache([attend_to().keys], attend_to().values, 0)),
    ],
)
def test_a_token_that_does_not_fit_changes_nothing(x, cache):
    before = vars(cache).copy()
    assert bound().append(x, cache, 2, 4, 5) is None
    assert all(vars(cache)[name] is value for name, value in before.items())


def test_where_nothing_is_lazy_tokens_go_the_long_way(monkeypatch):
    monkeypatch.setattr(lazy, "state", lambda: lazy.LazyState(False, "asked for"))
    assert bound().append(mx.zeros((1, 1, 6)), attend_to(), 2, 4, 5) is None


def test_two_continuations_of_one_array(both):
    cache, _ = caches(4)
    one, two = put(cache, 0, 1.0), put(cache, 1, 2.0)
    assert (one.tolist(), two.tolist(), cache.tolist()) == ([1, 0, 0, 0], [0, 2, 0, 0], [0] * 4)


def test_a_cache_goes_through_mlx_and_back(both):
    """A continued buffer is an array like any other: MLX may write to a copy, and that is continued again."""
    cache, _ = caches(4)
    cache = put(cache, 0, 1.0)
    cache[1] = 5.0
    cache = put(cache, 2, 3.0)
    kept = cache
    cache = put(cache[::-1], 0, 9.0)
    assert cache.tolist() == [9, 3, 5, 1]
    assert kept.tolist() == [1, 5, 3, 0]


def test_caches_that_are_dropped_are_freed():
    mx.synchronize()
    gc.collect()
    before = mx.get_active_memory()
    first, second = caches(1 << 18)
    for i in range(10):
        first, second, total = append(first, second, i, 1.0)
        mx.async_eval(total)
    mx.eval(first, second)
    assert mx.get_active_memory() <= before + (3 << 20)
    del first, second, total
    mx.synchronize()
    assert mx.get_active_memory() < before + (1 << 19)


def test_async_evaluation_and_other_streams(both):
    x = mx.zeros(4)
    for stream in [mx.new_stream(mx.cpu), mx.new_thread_local_stream(mx.cpu), mx.new_stream(mx.cpu)]:
        with mx.stream(stream):
            for _ in range(10):
                x = add(x, 1.0, wait_us=100)
                mx.async_eval(x)
    assert (x + add(x, 1.0)).tolist() == [61] * 4


def test_a_cache_that_goes_from_stream_to_stream(both):
    first, second = caches(30)
    streams = [mx.new_stream(mx.cpu) for _ in range(3)]
    for i in range(30):
        with mx.stream(streams[i % 3]):
            first, second, total = append(first, second, i, float(i), wait_us=200)
            mx.async_eval(total)
    assert first.tolist() == list(range(30))


def test_threads_of_python(both):
    found = {}

    def work(number):
        x, (first, second) = mx.zeros(5), caches(40)
        for i in range(40):
            x = add(x, float(number))
            first, second, total = append(first, second, i, float(number))
            mx.async_eval(x, total)
        found[number] = (x.tolist(), first.tolist(), total.item())

    threads = [threading.Thread(target=work, args=(number,)) for number in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {n: ([40.0 * n] * 5, [float(n)] * 40, 440.0 * n) for n in range(5)}


def test_results_can_be_copied(both):
    x = add(mx.zeros(3), 2.0)
    assert copy.deepcopy(x).tolist() == copy.copy(x).tolist() == [2, 2, 2]


def test_a_process_may_end_while_calls_are_pending():
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "import mlx.core as mx, test_lazy as t\n"
        "t.lazy._address_of = lambda name: t.ctypes.cast(getattr(t.operations(), name), t.ctypes.c_void_p).value\n"
        "pinned = t.lazy.Pinned(t.lazy.Memory(100))\n"
        "first, second = t.caches()\n"
        "for i in range(50):\n"
        "    first, second, total = t.append(first, second, i, 1.0, wait_us=2000)\n"
        "    total = t.add(total, 0.0, keep=pinned)\n"
        "    mx.async_eval(total)\n"
        "print('end')"
    )
    done = subprocess.run([sys.executable, "-c", code, os.path.dirname(__file__)], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "end\n"), done.stderr


# How the extension may be missing. `_built` and `_extension` without the memory of this process:
extension = lazy._extension.__wrapped__


def test_no_headers(monkeypatch, tmp_path):
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(Declined, match=r"^Python's headers are not installed$") as declined:
        extension()
    assert "python3-dev" in declined.value.hint


def test_no_nanobind(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(Declined, match=r"^nanobind is not installed$") as declined:
        extension()
    assert "pip install" in declined.value.hint


def test_a_nanobind_that_does_not_know_the_arrays_of_mlx(monkeypatch):
    """As another version would be: it builds and loads, and then every array is of an unknown type."""
    monkeypatch.setattr(lazy, "FLAGS", tuple(flag.replace("NB_DOMAIN=mlx", "NB_DOMAIN=other") for flag in lazy.FLAGS))
    with pytest.raises(Declined, match=r"^this nanobind is not compatible with the one that MLX was built with$"):
        extension()


def test_an_extension_that_cannot_be_loaded(monkeypatch, tmp_path):
    path = tmp_path / "extension.so"
    path.write_bytes(b"not a library")
    monkeypatch.setattr(lazy, "_built", lambda: build.Built(path, None))
    with pytest.raises(Declined, match=r"^the built extension cannot be loaded: "):
        extension()


def test_without_a_compiler_the_state_says_so(monkeypatch):
    def none():
        raise Declined("no C++ compiler", "install one")

    monkeypatch.setattr(lazy, "_extension", none)
    assert lazy.state.__wrapped__() == lazy.LazyState(False, "no C++ compiler", "install one")
