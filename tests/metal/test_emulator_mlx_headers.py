"""MLX's own Metal headers, which Apple's compiler accepts, have no errors for the emulator's type check either."""

import pytest
from metal.emulator import Kernel
from metal.emulator.mlx_text import header_text

pytestmark = pytest.mark.usefixtures("emulator")


@pytest.mark.parametrize(
    "name",
    [
        "fp4.h",
        "fp8.h",
        "gated_delta_update_vjp.h",
        "gemv_masked.h",
        "hadamard.h",
        "indexing/gather.h",
        "logsumexp.h",
        "quantized_utils.h",
        "sdpa_blocked.h",
        "softmax.h",
        "sort.h",
        "steel/attn/attn.h",
        "steel/conv/conv.h",
        "steel/gemm/gemm.h",
        "unary_ops.h",
    ],
)
def test_headers_that_apple_accepts_have_no_errors(name):
    kernel = Kernel("mlx", ["a"], ["o"], "o[0] = a;", header=header_text(name))
    assert [found for found in kernel.typecheck([0.0], ["float32"]) if "error: " in found] == []
