"""Which accesses the checker takes for ordered: small kernels on both sides of each rule."""

import numpy as np
import pytest
from metal.emulator import EmulatorError, Kernel

pytestmark = pytest.mark.usefixtures("emulator")

START = "uint i = thread_index_in_threadgroup, l = thread_index_in_simdgroup, g = simdgroup_index_in_threadgroup;\n"
ATOMIC = "device atomic<uint>* c = (device atomic<uint>*)o;\n"
RELAXED = ", memory_order_relaxed)"


def barrier(scope, memory="threadgroup"):
    return f"{scope}_barrier(mem_flags::mem_{memory});\n"


def faults(body, threads=64, threadgroup=64, order="forward", **call):
    """(kind, line in the body) of each fault; output o has 64 words, input a 64."""
    kernel = Kernel("rule", ["a"], ["o"], START + body)
    a = np.arange(64, dtype=np.uint32)
    call = {"init_value": 0, **call}
    try:
        kernel(
            inputs=[a],
            grid=(threads, 1, 1),
            threadgroup=(threadgroup, 1, 1),
            output_shapes=[(64,)],
            output_dtypes=["uint32"],
            order=order,
            **call,
        )
    except EmulatorError as error:
        assert error.faults, error
        return {(fault.kind, int(fault.line.split(":")[1]) if fault.line else 0) for fault in error.faults}
    return set()


@pytest.mark.parametrize("order", ["forward", "backward", "random"])
@pytest.mark.parametrize(
    ("between", "partner", "racing"),
    [
        ("", "i ^ 1", True),
        (barrier("simdgroup"), "i ^ 1", False),
        (barrier("simdgroup"), "i ^ 32", True),  # it orders the lanes of one SIMD-group
        (barrier("simdgroup", "device"), "i ^ 1", True),
        (barrier("simdgroup", "none"), "i ^ 1", True),
        (barrier("threadgroup"), "i ^ 32", False),
        (barrier("threadgroup", "device"), "i ^ 32", True),
        (barrier("threadgroup", "none"), "i ^ 1", True),
        ("threadgroup_barrier(mem_flags::mem_device | mem_flags::mem_threadgroup);\n", "i ^ 32", False),
        ("simd_sum(1.0f);\n", "i ^ 1", True),  # lanes meet, memory isn't ordered
    ],
)
def test_reads_after_writes_in_threadgroup_memory(between, partner, racing, order):
    body = f"threadgroup uint s[64];\ns[i] = a[i];\n{between}o[i] = s[{partner}];"
    found = {kind for kind, _ in faults(body, order=order)}
    assert ("race" in found) == racing
    assert found <= {"race", "uninitialised"}


@pytest.mark.parametrize(
    ("between", "racing"),
    [("", True), (barrier("threadgroup"), True), (barrier("threadgroup", "device"), False)],
)
def test_reads_after_writes_in_device_memory(between, racing):
    found = faults(f"o[i] = a[i];\n{between}uint v = o[i ^ 32];\nif (v == 99) o[i] = v;")
    assert (("race", 4 if between else 3) in found) == racing
    assert {kind for kind, _ in found} <= {"race"}


@pytest.mark.parametrize("order", ["forward", "backward", "random"])
@pytest.mark.parametrize(
    ("between", "writer", "racing"),
    [
        ("", "i == 5", True),
        ("", "i == 63", True),
        (barrier("simdgroup"), "i == 5", True),  # the other SIMD-group has read too
        (barrier("threadgroup"), "i == 5", False),
    ],
)
def test_writes_after_reads(between, writer, racing, order):
    body = f"threadgroup uint s[1];\nif (i == 0) s[0] = 7;\n{barrier('threadgroup')}o[i] = s[0];\n{between}"
    body += f"if ({writer}) s[0] = 1;"
    assert {kind for kind, _ in faults(body, order=order)} == ({"race"} if racing else set())


def test_each_round_of_a_loop_needs_two_barriers():
    body = """threadgroup uint s[64];
for (uint r = 0; r < 3; ++r) {
s[i] = a[i] + r;
threadgroup_barrier(mem_flags::mem_threadgroup);
o[i] = s[63 - i];
SECOND
}"""
    assert faults(body.replace("SECOND", barrier("threadgroup"))) == set()
    assert faults(body.replace("SECOND", "")) == {("race", 4), ("race", 6)}


def test_threadgroups_are_never_ordered():
    assert faults("o[i] = a[i];", threads=128) == {("race", 2)}  # both write all
    whole = "if (threadgroup_position_in_grid.x == 0) o[i] = a[i];\nelse if (o[i] == 99) o[i + 64] = 1;"
    assert faults(whole, threads=128) == {("race", 3)}
    assert (
        faults("threadgroup uint s[64];\ns[i] = a[i];\no[i + 32 * threadgroup_position_in_grid.x] = s[i];", 64, 32)
        == set()
    )


def test_threadgroup_memory_does_not_survive_its_threadgroup():
    body = "threadgroup uint s[32];\nif (threadgroup_position_in_grid.x == 0) s[i] = a[i];\n"
    assert faults(body + "o[i + 32 * threadgroup_position_in_grid.x] = s[i];", 64, 32) == {("uninitialised", 4)}


@pytest.mark.parametrize(
    ("body", "found"),
    [
        (f"atomic_fetch_add_explicit(&c[0], a[i]{RELAXED};", set()),
        (f"atomic_store_explicit(&c[0], a[i]{RELAXED};\natomic_fetch_max_explicit(&c[0], 5u{RELAXED};", set()),
        (f"if (i == 0) o[0] = 1;\natomic_fetch_add_explicit(&c[0], 1u{RELAXED};", {("race", 4)}),
        (f"atomic_fetch_add_explicit(&c[0], 1u{RELAXED};\nif (i == 63) o[0] = 1;", {("race", 4)}),
        (f"atomic_fetch_add_explicit(&c[0], 1u{RELAXED};\nif (i == 63 && o[0] == 99) o[1] = 1;", {("race", 4)}),
        (
            f"atomic_fetch_add_explicit(&c[0], 1u{RELAXED};\n{barrier('threadgroup', 'device')}"
            "if (i == 63 && o[0] == 99) o[1] = 1;",
            set(),
        ),
    ],
)
def test_atomics_race_with_plain_accesses_only(body, found):
    assert faults(ATOMIC + body) == found


def test_an_atomic_sum_needs_a_beginning():
    body = ATOMIC + f"atomic_fetch_add_explicit(&c[i], 1u{RELAXED};"
    assert faults(body, init_value=None) == {("uninitialised", 3)}
    assert faults(ATOMIC + f"atomic_store_explicit(&c[i], 1u{RELAXED};", init_value=None) == set()


@pytest.mark.parametrize(
    ("body", "found"),
    [
        ("for (uint k = 0; k < 40; k += 8) if (a[i] < 1000) o[i] = a[i] << k;", {("undefined", 2)}),
        ("o[i] = uint(ulong(a[i]) << (a[i] + 1u));", {("undefined", 2)}),  # lane 63
        ("o[i] = uint(ulong(a[i]) << a[i]);", set()),
        ("o[i] = (uint4(a[i]) >> uint4(0, 8, a[i] / 2, 31)).z;", set()),
        ("o[i] = (uint4(a[i]) >> uint4(0, 8, a[i] / 2 + 1, 31)).z;", {("undefined", 2)}),
        ("o[i] = uint((uchar4(1) << uchar4(uchar(a[i] / 7))).x);", {("undefined", 2)}),
        ("o[i] = a[i] >> -int(i);", {("undefined", 2)}),
    ],
)
def test_shifts_by_their_width(body, found):
    assert faults(body) == found


@pytest.mark.parametrize(
    ("body", "found"),
    [
        ("o[i] = simd_shuffle(a[i], ushort(i + 1));", {("inactive lane", 2)}),
        ("if (l > 29) return;\no[i] = simd_shuffle_xor(a[i], 2);", {("inactive lane", 3)}),
        ("if (l < 16) o[i] = simd_sum(a[i]);\nelse o[i] = simd_max(a[i]);", {("divergence", 2)}),
        ("if (i == 3) return;\nthreadgroup_barrier(mem_flags::mem_none);\no[i] = 1;", {("divergence", 3)}),
        ("if (g == 0) simdgroup_barrier(mem_flags::mem_none);\no[i] = 1;", set()),
        (
            f"if (g == 0) {barrier('threadgroup')}else {barrier('threadgroup')}o[i] = 1;",
            {("divergence", 3)},  # a lane of the second SIMD-group waits at another call
        ),
    ],
)
def test_lanes_that_do_not_come(body, found):
    assert faults(body) == found


def test_lanes_that_are_not_there_are_not_waited_for():
    assert faults(f"o[i] = simd_sum(a[i]);\n{barrier('threadgroup')}o[i] += quad_max(a[i]);", 45, 64) == set()


def test_uninitialised_thread_variables_show_as_nan():
    kernel = Kernel("rule", ["a"], ["o"], "float v[2]; v[a[0]] = 1; o[0] = v[0] + v[1];")
    call = {"grid": (1, 1, 1), "threadgroup": (1, 1, 1), "output_shapes": [(1,)], "output_dtypes": ["float32"]}
    assert np.isnan(kernel(inputs=[np.zeros(9, np.int32)], **call)[0])


def test_reads_before_a_buffer_and_behind_a_threadgroup_array():
    assert faults("o[i] = (a - 1)[i];") == {("out of bounds", 2)}
    body = (
        "threadgroup uint s[64], t[64];\nthreadgroup uint* p = s;\ns[i] = t[i] = 0;\no[i] = (p + 1)[i] == 99 ? 1 : 0;"
    )
    assert ("out of bounds", 5) in faults(body)
