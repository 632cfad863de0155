"""Runs and checks the kernels of mx.fast.metal_kernel on Linux, without Apple's compiler or hardware.

    mlx_text   the text that MLX generates for a kernel, character by character
    lowering   that text as C++ for OpenCL, which clang knows
    typecheck  its errors and warnings, with Metal's address spaces; lint has the rules that clang lacks
    registers  thread arrays that would not be in registers
    library    the text compiled to x86-64 or aarch64 and run by runtime/: a fiber a lane, and a check of every access
    kernel     Kernel, with the arguments of mx.fast.metal_kernel, and emulated(), which puts it in its place
    include/   Metal's standard library, as far as compute kernels use it

docs/metal_emulator.md says what this proves, and what it can't.
"""

from .device import DeviceKernel, device_requested
from .kernel import EmulatorError, Kernel, emulated
from .library import Fault
from .toolchain import unavailable

__all__ = ["DeviceKernel", "EmulatorError", "Fault", "Kernel", "device_requested", "emulated", "unavailable"]
