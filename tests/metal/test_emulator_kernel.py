"""The emulator as a replacement of mx.fast.metal_kernel: arguments, what Metal refuses, its cache, a GPU instead."""

import subprocess
import sys

import mlx.core as mx
import numpy as np
import pytest
from metal import runner
from metal.emulator import DeviceKernel, EmulatorError, Kernel, emulated, toolchain

pytestmark = pytest.mark.usefixtures("emulator")

ROOT = toolchain.FOLDER.parents[2]
COPY = "uint i = thread_position_in_grid.x; o[i] = a[i];"


def run(kernel, a, dtype, threads=None, threadgroup=(32, 1, 1), **call):
    threads = threads or (a.size, 1, 1)
    shape = call.pop("shape", a.shape)
    (output,) = kernel(
        inputs=[a], grid=threads, threadgroup=threadgroup, output_shapes=[shape], output_dtypes=[dtype], **call
    )
    return output


def test_in_place_of_mlx(capfd):
    real = mx.fast.metal_kernel
    with emulated(typecheck=True):
        kernel = mx.fast.metal_kernel(name="copy", input_names=["a"], output_names=["o"], source=COPY)
        x = mx.arange(70, dtype=mx.bfloat16).reshape(7, 10)
        y = run(kernel, x, mx.bfloat16, verbose=True, stream=mx.cpu)
    assert mx.fast.metal_kernel is real
    assert isinstance(y, mx.array) and y.dtype == mx.bfloat16 and mx.array_equal(x, y)
    assert "[[kernel]] void custom_kernel_copy_bfloat16_t_bfloat16_t(" in capfd.readouterr().out
    assert kernel.accesses > 140


def test_a_gpu_takes_the_same_arguments():
    """DeviceKernel on top of the emulator, which stands in for the GPU."""
    with emulated():
        kernel = DeviceKernel("copy", ["a"], ["o"], COPY)
    x = np.arange(70, dtype=np.float32)
    y = run(kernel, x, mx.float32, misalign=3, check=True, order="random", seed=5)
    assert isinstance(y, np.ndarray)
    np.testing.assert_array_equal(y, x)
    assert isinstance(run(kernel, mx.array(x), mx.bfloat16), mx.array)


def test_numpy_gets_numpy_and_bfloat_as_float():
    x = np.linspace(-3, 3, 40, dtype=np.float32)
    kernel = Kernel("convert", ["a"], ["o"], "uint i = thread_position_in_grid.x; o[i] = bfloat(a[i]);")
    y = run(kernel, x, "bfloat16")
    assert y.dtype == np.float32
    np.testing.assert_array_equal(y, np.array(mx.array(x).astype(mx.bfloat16).astype(mx.float32)))


def test_outputs_begin_with_a_value_if_there_is_one():
    kernel = Kernel("part", ["a"], ["o"], "if (thread_position_in_grid.x < 3) o[thread_position_in_grid.x] = a[0];")
    x = np.full(8, 5, np.float32)
    np.testing.assert_array_equal(run(kernel, x, mx.float16, init_value=-2.5), [5, 5, 5, -2.5, -2.5, -2.5, -2.5, -2.5])
    assert np.isnan(run(kernel, x, mx.float16, check=False)[3:]).all()
    with pytest.raises(EmulatorError, match="unwritten: 10 of 16 bytes of output o"):
        run(kernel, x, mx.float16)


def test_numbers_are_scalars_of_their_types():
    kernel = Kernel("scalars", ["a", "b", "c"], ["o"], "o[0] = a; o[1] = b; o[2] = c;")
    (output,) = kernel(
        inputs=[2, 0.5, True], grid=(1, 1, 1), threadgroup=(1, 1, 1), output_shapes=[(3,)], output_dtypes=["float32"]
    )
    np.testing.assert_array_equal(output, [2, 0.5, 1])
    assert "const constant int32_t& a" in kernel.metal([2, 0.5, True], ["float32"])


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        ({"threadgroup": (1025, 1, 1)}, "1025 threads in a threadgroup, the limit is 1024"),
        ({"threadgroup": (32, 8, 8)}, "2048 threads in a threadgroup, the limit is 1024"),
        ({"threads": (0, 1, 1)}, r"grid is \(0, 1, 1\): it must be three positive numbers"),
        ({"threads": (8, 1)}, r"grid is \(8, 1\)"),
    ],
)
def test_what_metal_does_not_start(call, reason):
    with pytest.raises(EmulatorError, match=reason):
        run(Kernel("copy", ["a"], ["o"], COPY), np.zeros(8, np.float32), "float32", **call)


@pytest.mark.parametrize(("inputs", "fine"), [(10, True), (11, False)])
def test_shapes_count_as_buffers(inputs, fine):
    """Metal has 31: ten inputs with shape and strides, and an output."""
    names = [f"a{i}" for i in range(inputs)]
    body = "o[0] = " + " + ".join(f"{name}[0] * {name}_shape[0] * int({name}_strides[0])" for name in names) + ";"
    kernel = Kernel("buffers", names, ["o"], body)
    arrays = [np.full(2, i, np.float32) for i in range(inputs)]
    call = {"grid": (1, 1, 1), "threadgroup": (1, 1, 1), "output_shapes": [(1,)], "output_dtypes": ["float32"]}
    if fine:
        assert kernel(inputs=arrays, **call)[0] == 2 * sum(range(inputs))
        assert kernel.typecheck(arrays, ["float32"]) == []
    else:
        assert "34 buffers, Metal has 31" in kernel.typecheck(arrays, ["float32"])[-1]
        with pytest.raises(EmulatorError, match="34 buffers, the limit is 31"):
            kernel(inputs=arrays, **call)


def test_text_that_does_not_compile_is_told_by_its_own_lines():
    kernel = Kernel("broken", ["a"], ["o"], "o[0] = helper(a);\no[1] = missing;", header="float helper(float x) {}\n")
    with pytest.raises(EmulatorError, match=r"(?s)broken.body:1:.*broken.body:2:8: error: .*'missing'"):
        run(kernel, np.zeros(9, np.float32), "float32")
    assert any(each.startswith("broken.header:1:") for each in kernel.typecheck([np.zeros(9, np.float32)], ["float32"]))


def test_warnings_fail_where_the_type_check_is_asked_for():
    kernel = Kernel("warned", ["a"], ["o"], "int x; if (a[0] > 0) x = 1;\no[0] = x;")
    with pytest.raises(EmulatorError, match=r"(?s)fails the type check.*warned.body:1:.*uninitialized"):
        run(kernel, np.ones(9, np.float32), "float32", typecheck=True)


def test_arguments_that_nobody_knows():
    with pytest.raises(TypeError, match="copy: no such argument: checks"):
        run(Kernel("copy", ["a"], ["o"], COPY), np.zeros(8, np.float32), "float32", checks=True)


def test_a_kernel_that_fails_leaves_nothing_for_the_next():
    bad = Kernel("bad", ["a"], ["o"], "o[thread_position_in_grid.x] = a[thread_position_in_grid.x + 4096 * 1024];")
    x = np.arange(40, dtype=np.float32)
    for _ in range(2):
        with pytest.raises(EmulatorError, match="out of bounds: read of 4 bytes, far from any buffer"):
            run(bad, x, "float32")
        np.testing.assert_array_equal(run(Kernel("copy", ["a"], ["o"], COPY), x, "float32"), x)


# ---- the cache ----------------------------------------------------------------------------------------------------
def test_what_is_compiled_is_found_again():
    def make(folder, path):
        made.append(path)
        path.write_text("whole")

    made = []
    first = toolchain.cached("test", ".txt", ("found again", id(made)), make)
    assert toolchain.cached("test", ".txt", ("found again", id(made)), make) == first
    assert len(made) == 1 and made[0] != first and first.read_text() == "whole"
    first.unlink()


def test_what_was_not_finished_is_not_kept():
    def fail(folder, path):
        path.write_text("half")
        (folder / "more").write_text("of it")
        raise RuntimeError("stopped")

    folder = toolchain.cached("test", ".txt", "a folder", lambda folder, path: path.write_text("")).parent
    before = sorted(folder.glob("*test*"))
    with pytest.raises(RuntimeError, match="stopped"):
        toolchain.cached("test", ".txt", ("not finished", id(fail)), fail)
    assert sorted(folder.glob("*test*")) == before
    assert not list(folder.glob("making-*/more"))


def test_two_processes_may_compile_the_same_at_once():
    """Both find a whole library, whoever was first."""
    body = f"o[0] = a[0] + {np.random.default_rng().integers(1 << 30)};"
    program = (
        "import sys; sys.path.insert(0, 'tests')\n"
        "from metal.emulator import Kernel\n"
        "import numpy as np\n"
        f"k = Kernel('both', ['a'], ['o'], '{body}')\n"
        "call = dict(grid=(1, 1, 1), threadgroup=(1, 1, 1), output_shapes=[(1,)], output_dtypes=['int32'])\n"
        "print(k(inputs=[np.zeros(9, np.int32)], **call)[0][0])\n"
    )
    processes = [
        subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, cwd=ROOT) for _ in range(2)
    ]
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert {int(output) for output in outputs} == {int(body.split("+ ")[1].rstrip(";"))}


# ---- where it can't run -------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("environment", "outcome", "reason"),
    [
        ({}, pytest.skip.Exception, "pip install ziglang"),
        ({"TQ_REQUIRE_EMULATOR": "1"}, pytest.fail.Exception, "pip install ziglang"),
        ({"TQ_METAL_DEVICE": "1"}, pytest.fail.Exception, "MLX finds no Metal device"),
    ],
)
def test_without_a_compiler_tests_are_skipped_unless_that_is_forbidden(monkeypatch, environment, outcome, reason):
    for name in ("TQ_REQUIRE_EMULATOR", "TQ_METAL_DEVICE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(toolchain, "zig", lambda: None)
    with pytest.raises(outcome, match=reason):
        runner.need_runner()


def test_the_device_is_a_matter_of_the_environment(monkeypatch):
    monkeypatch.setenv("TQ_METAL_DEVICE", "1")
    real = mx.fast.metal_kernel
    with runner.running():
        assert mx.fast.metal_kernel is real
    assert runner.kernel_class() is DeviceKernel
    monkeypatch.setenv("TQ_METAL_DEVICE", "0")
    with runner.running():
        assert mx.fast.metal_kernel is runner.kernel_class() is Kernel
