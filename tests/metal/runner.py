"""Chooses what runs Metal kernels in tests: the emulator, or a GPU if the environment variable TQ_METAL_DEVICE is 1."""

import contextlib
import os

import pytest
from metal.emulator import DeviceKernel, Kernel, device_requested, emulated, unavailable


def need_emulator() -> None:
    """Skips the test where the emulator can't run; with TQ_REQUIRE_EMULATOR=1, as in `make test`, it fails."""
    if reason := unavailable():
        required = os.environ.get("TQ_REQUIRE_EMULATOR", "") not in ("", "0")
        (pytest.fail if required else pytest.skip)(reason)


def need_runner() -> None:
    """Skips or fails the test if what should run kernels can't."""
    if not device_requested():
        return need_emulator()
    import mlx.core as mx

    if not mx.metal.is_available():
        pytest.fail("TQ_METAL_DEVICE is 1, but MLX finds no Metal device here")


def kernel_class() -> type:
    return DeviceKernel if device_requested() else Kernel


def running() -> contextlib.AbstractContextManager[None]:
    """Within this context mx.fast.metal_kernel works: on the GPU, or emulated with every check."""
    return contextlib.nullcontext() if device_requested() else emulated(typecheck=True)
