"""Inputs and outputs as NumPy arrays of what is in memory. bfloat16, which NumPy hasn't got, is held as uint16."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from .variant import dtype_name


@dataclass(frozen=True)
class Stored:
    """An array in memory: `bits` has the dtype `dtype`, or uint16 for bfloat16."""

    bits: np.ndarray
    dtype: str

    def storage(self) -> np.ndarray:
        """The array that this one is a view of, which has all the memory."""
        whole = self.bits
        while isinstance(whole.base, np.ndarray):
            whole = whole.base
        return whole


def is_mlx(value: Any) -> bool:
    return type(value).__module__.startswith("mlx")


def stored(value: Any) -> Stored:
    """An input as it lies in memory: an array of MLX or NumPy, or a number, which is passed as MLX passes it."""
    if is_mlx(value):
        import mlx.core as mx

        name = dtype_name(value.dtype)
        return Stored(np.array(value.view(mx.uint16) if name == "bfloat16" else value), name)
    if isinstance(value, bool | int | float):
        value = np.array(value, {bool: np.bool_, int: np.int32, float: np.float32}[type(value)])
    value = np.asarray(value)
    name = dtype_name(value.dtype)
    return Stored(value.view(np.uint16) if name == "bfloat16" else value, name)


def stored_dtype(dtype: str) -> np.dtype:
    return np.dtype(np.uint16 if dtype == "bfloat16" else dtype)


def filled(shape: tuple[int, ...], dtype: str, value: Any) -> np.ndarray:
    if dtype != "bfloat16":
        return np.full(shape, value, stored_dtype(dtype))
    bits = np.float32(value).view(np.uint32)
    return np.full(shape, (int(bits) + 0x7FFF + (int(bits) >> 16 & 1)) >> 16, np.uint16)


def returned(bits: np.ndarray, dtype: str, as_mlx: bool) -> Any:
    """An output, as an array of MLX or of NumPy; there, bfloat16 comes as float32."""
    if as_mlx:
        import mlx.core as mx

        return mx.array(bits).view(mx.bfloat16) if dtype == "bfloat16" else mx.array(bits)
    return (bits.astype(np.uint32) << 16).view(np.float32) if dtype == "bfloat16" else bits
