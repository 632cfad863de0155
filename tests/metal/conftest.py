"""Fixtures of tests that run Metal kernels; runner.py says on what."""

import pytest
from metal import runner


@pytest.fixture(scope="session")
def emulator():
    """The emulator can run here."""
    runner.need_emulator()


@pytest.fixture(scope="session")
def kernel_class():
    """A class with the arguments of mx.fast.metal_kernel, whose calls also take those that only Kernel has."""
    runner.need_runner()
    return runner.kernel_class()


@pytest.fixture
def metal():
    """mx.fast.metal_kernel works: on the GPU, or emulated with every check."""
    runner.need_runner()
    with runner.running():
        yield
