"""Bugs put into two correct kernels, one at a time: each is found by the pass that is named here.

The checker runs one schedule and must find what many schedules of a plain run would not show.
"""

from dataclasses import dataclass

import numpy as np
import pytest
from metal.emulator import EmulatorError
from metal.examples import Attend, Matvec

pytestmark = pytest.mark.usefixtures("emulator")

BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup);\n"


@dataclass(frozen=True)
class Bug:
    """A text in a kernel's body, what replaces it, and what must be said of the result.

    Attributes:
        diagnostic: Words of the type check, which otherwise says nothing.
        kind: The kind of a fault that the checker finds; then also
        statement: the line that it names, by words in it, and
        words: words of its message.
        refused: Words of the reason for which the kernel isn't run.
    """

    kernel: type
    old: str
    new: str
    diagnostic: str = ""
    kind: str = ""
    statement: str = ""
    words: str = ""
    refused: str = ""


BUGS = {
    # ---- synchronisation
    "no barrier before the sums are combined": Bug(
        Attend,
        BARRIER,
        "\n",
        kind="race",
        statement="max(highest",
        words="maxima[1]",
    ),
    "no barrier after the codebook is staged": Bug(
        Matvec,
        BARRIER,
        "\n",
        kind="race",
        statement="float4 w0",
        words="table[",
    ),
    "a barrier for the wrong memory": Bug(
        Attend,
        "mem_flags::mem_threadgroup",
        "mem_flags::mem_device",
        kind="race",
        statement="max(highest",
        words="not ordered after the write by lane 0",
    ),
    "a barrier that not all lanes reach": Bug(
        Attend,
        BARRIER,
        "if (group < 2) " + BARRIER,
        kind="race",
        statement="max(highest",
        words="maxima",
    ),
    "a barrier that half of a SIMD-group reaches": Bug(
        Matvec,
        BARRIER,
        "if (lane < 16) " + BARRIER,
        kind="divergence",
        statement="if (lane < 16)",
        words="threadgroup_barrier is reached by 32 of",
    ),
    "simd_sum in divergent flow": Bug(
        Attend,
        "d = simd_sum(d)",
        "if (lane < 16) d = simd_sum(d); d = d",
        kind="divergence",
        statement="if (lane < 16)",
        words="mask 0000ffff",
    ),
    "two lanes write one output": Bug(
        Matvec,
        "if (lane == 0 &&",
        "if (lane < 2 &&",
        kind="race",
        statement="y[first + r] =",
        words="write of y[0] is not ordered after the write by lane 0",
    ),
    "two threadgroups write one output": Bug(
        Attend,
        "out[head * D + d] =",
        "out[(head / 2) * D + d] =",
        kind="race",
        statement="out[(head / 2)",
        words="another threadgroup",
    ),
    "a lane overwrites what others still read": Bug(
        Attend,
        "out[head * D + d] = T(o / total);",
        "out[head * D + d] = T(o / total); if (lane == 7) maxima[group] = 0.0f;",
        kind="race",
        statement="maxima[group] = 0.0f",
        words="write of maxima[0] is not ordered after the read by lane 0",
    ),
    # ---- which lane, which place
    "the wrong lane writes": Bug(
        Matvec,
        "if (lane == 0 &&",
        "if (lane == 1 && int(lane) +",
        kind="unwritten",
        words="of 84 bytes of output y",
    ),
    "the index in the threadgroup for the lane": Bug(
        Matvec,
        "lane = thread_index_in_simdgroup",
        "lane = thread_index_in_threadgroup",
        kind="unwritten",
        words="bytes of output y",
    ),
    "half of the outputs": Bug(
        Attend,
        "d < uint(D); d +=",
        "d < uint(D / 2); d +=",
        kind="unwritten",
        words="1024 of 2048 bytes of output out",
    ),
    "a read without a bound": Bug(
        Matvec,
        "min(first + r, rows - 1)",
        "first + r",
        kind="out of bounds",
        statement="q = w[",
        words="w[2688], which has 2688 elements",
    ),
    "a read one past the end": Bug(
        Matvec,
        "p < words; p += 32",
        "p <= words; p += 32",
        kind="out of bounds",
        statement="x4[0]",
        words="of 8 bytes at x[512], which has 512 elements",
    ),
    "an index outside of a threadgroup array": Bug(
        Matvec,
        "table[q >> 28]",
        "table[(q >> 28) + 1u]",
        kind="undefined",
        statement="table[(q >> 28) + 1u]",
        words="array of constant size",
    ),
    "an index outside of a thread array": Bug(
        Matvec,
        "for (int r = 0; r < R; ++r) {\n  const float",
        "for (int r = 0; r <= R; ++r) {\n  const float",
        kind="undefined",
        statement="simd_sum(sum[r])",
        words="array of constant size",
    ),
    "threadgroup memory that nobody wrote": Bug(
        Attend,
        "totals[group] = l;",
        "if (group != 3) totals[group] = l;",
        kind="uninitialised",
        statement="total += totals[i]",
        words="totals[3], which nothing has written",
    ),
    # ---- values
    "a shift by the width or more": Bug(
        Matvec,
        "table[q >> 28]",
        "table[(q >> (28 + 4 * r)) & 15u]",
        kind="undefined",
        statement="table[(q >> (28",
        words="shift of 32 bits by 32",
    ),
    "a division by zero": Bug(
        Matvec,
        "p * 8 / GROUP]",
        "p * 8 / (GROUP * r)]",
        kind="undefined",
        statement="(GROUP * r)",
        words="integer division by zero",
    ),
    "a float that does not fit its integer": Bug(
        Matvec,
        "y[first + r] = T(total)",
        "y[first + r] = T(uchar(total * 1e6f))",
        kind="undefined",
        statement="uchar(total",
        words="float that does not fit",
    ),
    # ---- the type system
    "a device pointer without its address space": Bug(
        Matvec,
        "const device half4* x4 = (const device half4*)",
        "const half4* x4 = (const half4*)",
        diagnostic="explicit address space: 'half4 *x4'",
    ),
    "a device pointer without its address space, assigned": Bug(
        Attend,
        "const device uint* key =",
        "const uint* key =",
        diagnostic="explicit address space: 'uint *key'",
    ),
    "a pointer to a local array without its address space": Bug(
        Matvec,
        "float sum[R] = {0.0f, 0.0f, 0.0f, 0.0f};",
        "float sums_[R] = {}; float* sum = sums_;",
        diagnostic="explicit address space: 'float *sum'",
    ),
    "a threadgroup pointer as a thread pointer": Bug(
        Attend,
        "float highest =",
        "thread float* t = maxima; t[0] = 0; float highest =",
        diagnostic="type 'thread float *' with an lvalue of type 'threadgroup float[4]'",
        refused="does not compile",
    ),
    "a write to an input": Bug(
        Matvec,
        "y[first + r] = T(total);",
        "{ y[first + r] = T(total); x[0] = half(0); }",
        diagnostic="not assignable",
        refused="does not compile",
    ),
    "a write to an input by a cast": Bug(
        Matvec,
        "y[first + r] = T(total);",
        "{ y[first + r] = T(total); ((device half*)x)[0] = half(0); }",
        kind="write to input",
        statement="((device half*)x)[0]",
        words="write of x[0]",
    ),
    "min of uint and int": Bug(
        Matvec,
        "min(first + r, rows - 1)",
        "min(uint(first + r), 3)",
        diagnostic="ambiguous",
        refused="does not compile",
    ),
    "half from bfloat": Bug(
        Matvec,
        "const float total = simd_sum(sum[r]);",
        "bfloat b = bfloat(sum[r]); half h = b; const float total = h;",
        diagnostic="type 'thread half' with an lvalue of type 'thread bfloat'",
        refused="does not compile",
    ),
    "double": Bug(
        Matvec,
        "const float total =",
        "double total =",
        diagnostic="double",
        refused="does not compile",
    ),
    "a lambda": Bug(
        Matvec,
        "simd_sum(sum[r]);",
        "[](float z) { return z; }(simd_sum(sum[r]));",
        diagnostic="lambda",
    ),
    "too much threadgroup memory": Bug(
        Attend,
        "threadgroup float sums[G][D];",
        "threadgroup float sums[G][D], more[8192]; more[0] = 0;",
        refused="34848 bytes of threadgroup memory, the limit is 32768",
    ),
}


@pytest.mark.parametrize("example", [Matvec, Attend])
def test_correct_kernels_have_no_fault(example):
    kernel = example()
    assert kernel.kernel.typecheck(kernel.inputs, kernel.output_dtypes, kernel.template) == []
    for mode in ({}, {"order": "backward"}, {"order": "random", "seed": 3}, {"check": False}):
        expected = kernel.expected()
        assert np.abs(kernel.run(**mode) - expected).max() < 2e-3 * np.abs(expected).max()


@pytest.mark.parametrize("name", BUGS)
def test_bugs_are_found(name):
    bug = BUGS[name]
    assert bug.old in bug.kernel.source
    source = bug.kernel.source.replace(bug.old, bug.new, 1)
    kernel = bug.kernel(source)

    diagnostics = kernel.kernel.typecheck(kernel.inputs, kernel.output_dtypes, kernel.template)
    if bug.diagnostic:
        assert any("error: " in found and bug.diagnostic in found for found in diagnostics), diagnostics
    else:
        assert diagnostics == []

    if not bug.kind and not bug.refused:  # the compiler's business only
        kernel.run(check=False)
        return
    with pytest.raises(EmulatorError) as raised:
        kernel.run()
    assert bug.refused in str(raised.value)
    if bug.kind:
        found = [fault for fault in raised.value.faults if fault.kind == bug.kind and bug.words in fault.message]
        assert found, raised.value
        if bug.statement:
            lines = [i for i, line in enumerate(source.split("\n"), 1) if bug.statement in line]
            assert {fault.line for fault in found} & {f"{bug.kernel.__name__.lower()}.body:{i}" for i in lines}


def test_a_wrong_stride_shows_in_the_numbers_only():
    """Every access is legal, so that results must be compared as well."""
    kernel = Matvec(Matvec.source.replace("p += 32", "p += 16"))
    assert np.abs(kernel.run() - kernel.expected()).max() > 0.1


def test_a_misaligned_input_is_found():
    """MLX passes a slice x[1:] as it lies in memory; a load of half4 needs 8 bytes of alignment."""
    with pytest.raises(EmulatorError, match=r"misaligned: read of 8 bytes at x\[0\].*multiple of 8, matvec.body:15"):
        Matvec().run(misalign=1)
    Attend().run(misalign=1)  # loads single elements


def test_all_faults_are_told_at_once():
    source = Matvec.source.replace("if (lane == 0 &&", "if (lane < 2 &&").replace("rows - 1", "rows")
    with pytest.raises(EmulatorError) as raised:
        Matvec(source).run()
    assert {fault.kind for fault in raised.value.faults} == {"race", "out of bounds"}
    assert str(raised.value).startswith("matvec: ")
    assert "SIMD-group 0, lane" in str(raised.value)
