"""The text that the emulator compiles is the one that MLX itself generates."""

import ctypes
import os
import random
import re
import sys

import mlx.core as mx
import pytest
from metal.emulator import Kernel
from metal.emulator.mlx_text import utils_text
from metal.emulator.variant import ATTRIBUTES

DTYPES = [mx.float32, mx.float16, mx.bfloat16, mx.bool_, mx.complex64] + [
    getattr(mx, f"{sign}int{bits}") for sign in ("", "u") for bits in (8, 16, 32, 64)
]
SHAPES = [(), (1,), (3,), (7,), (8,), (2, 4), (1, 7), (5, 5, 5)]


def generated_by_mlx(arguments, inputs, template, output_dtypes, folder):
    """What `verbose` prints when a call is traced, which needs no Metal device."""
    kernel = mx.fast.metal_kernel(**arguments)

    def call(*inputs):
        return kernel(
            inputs=list(inputs),
            template=template,
            grid=(1, 1, 1),
            threadgroup=(1, 1, 1),
            output_shapes=[(4,)] * len(output_dtypes),
            output_dtypes=output_dtypes,
            verbose=True,
        )

    printed = folder / "printed"
    sys.stdout.flush()
    stdout = os.dup(1)
    try:
        with open(printed, "w") as file:
            os.dup2(file.fileno(), 1)
        mx.export_function(str(folder / "call.mlxfn"), call, *inputs)
    finally:
        ctypes.CDLL(None).fflush(None)  # MLX prints through C++
        os.dup2(stdout, 1)
        os.close(stdout)
    return re.search(r"```\n(.*)\n```", printed.read_text(), re.DOTALL)[1]


def random_kernel(choose):
    """The arguments of a kernel, and of a call of it, with anything that the text depends on."""
    input_names = [f"in{i}" for i in range(choose.randint(1, 4))]
    output_names = [f"out{i}" for i in range(choose.randint(1, 3))]
    words = [f"{name}_{what}" for name in input_names for what in ("shape", "strides", "ndim") if choose.random() < 0.4]
    words += [attribute for attribute in ATTRIBUTES if choose.random() < 0.25]
    arguments = {
        "name": f"k{choose.randint(0, 99)}",
        "input_names": input_names,
        "output_names": output_names,
        "source": "  " + "; ".join(words) + ";",
        "header": choose.choice(["", "// a header\n"]),
        "atomic_outputs": choose.random() < 0.5,
    }
    template = [
        ("T", choose.choice(DTYPES)),
        ("N", choose.randint(-5, 500)),
        ("B", choose.random() < 0.5),
    ][: choose.randint(0, 3)]
    inputs = [mx.zeros(choose.choice(SHAPES), choose.choice(DTYPES)) for _ in input_names]
    return arguments, inputs, template, [choose.choice(DTYPES) for _ in output_names]


@pytest.mark.parametrize("seed", range(4))
def test_random_kernels_have_the_text_that_mlx_generates(seed, tmp_path):
    choose = random.Random(seed)
    for _ in range(100):
        arguments, inputs, template, output_dtypes = random_kernel(choose)
        ours = Kernel(**arguments).metal(inputs, output_dtypes, template)
        assert ours == generated_by_mlx(arguments, inputs, template, output_dtypes, tmp_path)


def test_the_utilities_are_complete_and_each_comes_once():
    text = utils_text()
    assert not re.search(r'#include "', text)
    for used_by_kernels in ("complex64_t", "float16_t", "bfloat16_t", "elem_to_loc("):
        assert used_by_kernels in text
    files = re.findall(r'#line 1 "(.*)"', text)
    assert len(files) == len(set(files))
    assert files[-1].endswith("utils.h")
