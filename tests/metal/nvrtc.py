"""Compiles what ``mx.fast.cuda_kernel`` would: the text that MLX makes of a call, by NVRTC, which needs no GPU."""

import ctypes
import functools
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx

from tq.metal.cuda import as_cuda

# The part of MLX's own mlx/backend/cuda/device/utils.cuh that kernels see: the CPU's wheel has no .cuh files.
MLX_HEADER = """
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda/std/array>
#include <cooperative_groups.h>
namespace mlx::core::cu {
using Shape = cuda::std::array<int32_t, 10>;
using Strides = cuda::std::array<int64_t, 10>;
}
"""
TYPES = {
    mx.float16: "__half",
    mx.bfloat16: "__nv_bfloat16",
    mx.float32: "float",
    mx.uint32: "uint32_t",
    mx.int32: "int32_t",
    mx.bool_: "bool",
}
ARCHITECTURE = "compute_80"


def unavailable() -> str | None:
    """None, or why nothing can be compiled."""
    for package in ("cuda_nvrtc", "cuda_runtime", "cuda_cccl"):
        if _folder(package) is None:
            return f"needs the package nvidia-{package.replace('_', '-')}-cu12"
    return None


class CompiledKernel:
    """Takes what mx.fast.metal_kernel takes, compiles the kernel as CUDA, and returns zeros."""

    def __init__(self, name: str, input_names: Sequence[str], output_names: Sequence[str], header: str, source: str):
        self.name, self.input_names, self.output_names = name, input_names, output_names
        self.header, self.source = as_cuda(header, source)

    def __call__(
        self,
        *,
        inputs: Sequence[mx.array],
        template: Sequence[tuple[str, Any]],
        output_shapes: Sequence[tuple[int, ...]],
        output_dtypes: Sequence[mx.Dtype],
        **_: Any,
    ) -> list[mx.array]:
        compile_cuda(self.text(inputs, template, output_dtypes))
        return [mx.zeros(shape, dtype) for shape, dtype in zip(output_shapes, output_dtypes, strict=True)]

    def text(self, inputs: Sequence[mx.array], template: Sequence[tuple[str, Any]], dtypes: Sequence[mx.Dtype]) -> str:
        """As ``build_kernel`` of mlx/backend/cuda/custom_kernel.cpp."""
        parameters = []
        for name, array in zip(self.input_names, inputs, strict=True):
            parameters.append(f"const {TYPES[array.dtype]}* {name}")
            for suffix, kind in (("shape", "Shape"), ("strides", "Strides"), ("ndim", "int")):
                if f"{name}_{suffix}" in self.source:
                    parameters.append(f"const __grid_constant__ {kind} {name}_{suffix}")
        parameters += [f"{TYPES[dtype]}* {name}" for name, dtype in zip(self.output_names, dtypes, strict=True)]
        constants = []
        for name, value in template:
            if isinstance(value, bool | int):
                constants.append(f"constexpr {type(value).__name__} {name} = {str(value).lower()};")
            else:
                constants.append(f"using {name} = {TYPES[value]};")
        return "\n".join(
            (
                MLX_HEADER + self.header,
                "namespace mlx::core::cu {\nnamespace cg = cooperative_groups;",
                f"__global__ void {self.name}({', '.join(parameters)}) {{",
                *constants,
                self.source + "}\n}",
            )
        )


def compile_cuda(text: str) -> None:
    """Raises RuntimeError with what the compiler says."""
    library = _library()
    program = ctypes.c_void_p()
    library.nvrtcCreateProgram(ctypes.byref(program), text.encode(), b"kernel.cu", 0, None, None)
    includes = [f"--include-path={_folder(package)}/include" for package in ("cuda_runtime", "cuda_cccl")]
    options = [f"--gpu-architecture={ARCHITECTURE}", "--device-as-default-execution-space", *includes]
    arguments = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
    try:
        if library.nvrtcCompileProgram(program, len(options), arguments):
            size = ctypes.c_size_t()
            library.nvrtcGetProgramLogSize(program, ctypes.byref(size))
            log = ctypes.create_string_buffer(size.value)
            library.nvrtcGetProgramLog(program, log)
            raise RuntimeError(log.value.decode())
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))


@functools.cache
def _folder(package: str) -> Path | None:
    if importlib.util.find_spec("nvidia") is None:
        return None
    spec = importlib.util.find_spec(f"nvidia.{package}")
    return Path(next(iter(spec.submodule_search_locations))) if spec else None


@functools.cache
def _library() -> ctypes.CDLL:
    return ctypes.CDLL(str(next((_folder("cuda_nvrtc") / "lib").glob("libnvrtc.so*"))))
