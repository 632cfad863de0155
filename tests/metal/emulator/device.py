"""The same kernels on a Mac: with TQ_METAL_DEVICE=1, tests run them by the real mx.fast.metal_kernel."""

import os
from collections.abc import Sequence
from typing import Any

import numpy as np


def device_requested() -> bool:
    """Whether the environment variable TQ_METAL_DEVICE asks for a real GPU."""
    return os.environ.get("TQ_METAL_DEVICE", "") not in ("", "0")


class DeviceKernel:
    """Takes what Kernel takes and runs it on the GPU. What only an emulator can do is left out.

    Inputs and outputs are arrays of MLX, or of NumPy if all inputs are; there, bfloat16 comes as float32.
    """

    def __init__(self, name: str, input_names: Sequence[str], output_names: Sequence[str], source: str, **options: Any):
        import mlx.core as mx

        self._kernel = mx.fast.metal_kernel(name, input_names, output_names, source, **options)

    def typecheck(self, inputs: Sequence[Any], output_dtypes: Sequence[Any], template: Sequence = ()) -> list[str]:
        """Nothing: Apple's compiler has its say when the kernel is called."""
        return []

    def __call__(self, *, inputs: Sequence[Any], misalign: int = 0, **call: Any) -> list[Any]:
        """Runs the kernel. `misalign` shifts inputs in memory; a GPU neither checks nor has an order."""
        import mlx.core as mx

        as_mlx = any(isinstance(value, mx.array) for value in inputs)
        arrays = [value if isinstance(value, mx.array) else mx.array(value) for value in inputs]
        if misalign:
            arrays = [_shifted(array, misalign) for array in arrays]
        call = {name: value for name, value in call.items() if name not in ("check", "typecheck", "order", "seed")}
        outputs = self._kernel(inputs=arrays, **call)
        mx.eval(outputs)
        if as_mlx:
            return outputs
        return [np.array(out.astype(mx.float32) if out.dtype == mx.bfloat16 else out) for out in outputs]


def _shifted(array: Any, elements: int) -> Any:
    """The same values, in memory that begins `elements` later."""
    import mlx.core as mx

    whole = mx.concatenate([mx.zeros(elements, array.dtype), array.flatten()])
    mx.eval(whole)
    return whole[elements:].reshape(array.shape)
