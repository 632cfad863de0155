"""One variant of a kernel: its text with the shapes, types and template arguments of a call, as MLX compiles it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

# The names of Metal's thread attributes, in the order in which MLX declares those that a body mentions.
ATTRIBUTES = {
    "dispatch_quadgroups_per_threadgroup": "uint",
    "dispatch_simdgroups_per_threadgroup": "uint",
    "dispatch_threads_per_threadgroup": "uint3",
    "grid_origin": "uint3",
    "grid_size": "uint3",
    "quadgroup_index_in_threadgroup": "uint",
    "quadgroups_per_threadgroup": "uint",
    "simdgroup_index_in_threadgroup": "uint",
    "simdgroups_per_threadgroup": "uint",
    "thread_execution_width": "uint",
    "thread_index_in_quadgroup": "uint",
    "thread_index_in_simdgroup": "uint",
    "thread_index_in_threadgroup": "uint",
    "thread_position_in_grid": "uint3",
    "thread_position_in_threadgroup": "uint3",
    "threadgroup_position_in_grid": "uint3",
    "threadgroups_per_grid": "uint3",
    "threads_per_grid": "uint3",
    "threads_per_simdgroup": "uint",
    "threads_per_threadgroup": "uint3",
}
METAL_TYPES = {
    "bool": "bool",
    "float16": "float16_t",
    "bfloat16": "bfloat16_t",
    "float32": "float",
    "complex64": "complex64_t",
    **{f"{sign}int{bits}": f"{sign}int{bits}_t" for sign in ("", "u") for bits in (8, 16, 32, 64)},
}
CONSTANT_ELEMENTS = 8  # MLX passes inputs of fewer elements in the constant address space

Role = Literal["input", "shape", "strides", "ndim", "output", "attribute"]


@dataclass(frozen=True)
class Parameter:
    """A parameter of the generated function; `of` names the input or output that it belongs to."""

    type: str
    name: str
    attribute: str
    role: Role
    of: str


@dataclass(frozen=True)
class Variant:
    """What determines the generated text.

    Attributes:
        inputs: (shape, dtype name) of each input.
        template: (name, value) pairs; a value is an int, a bool or the name of a dtype.
    """

    name: str
    input_names: tuple[str, ...]
    output_names: tuple[str, ...]
    source: str
    header: str
    inputs: tuple[tuple[tuple[int, ...], str], ...]
    output_dtypes: tuple[str, ...]
    template: tuple[tuple[str, int | bool | str], ...]
    atomic_outputs: bool

    def parameters(self) -> list[Parameter]:
        """The function's parameters in order."""
        parameters: list[Parameter] = []

        def add(type: str, name: str, role: Role, of: str) -> None:
            parameters.append(Parameter(type, name, f"buffer({len(parameters)})", role, of))

        for name, (shape, dtype) in zip(self.input_names, self.inputs, strict=True):
            space = "constant" if math.prod(shape) < CONSTANT_ELEMENTS else "device"
            add(f"const {space} {METAL_TYPES[dtype]}{'*' if shape else '&'}", name, "input", name)
            if shape:
                if f"{name}_shape" in self.source:
                    add("const constant int*", f"{name}_shape", "shape", name)
                if f"{name}_strides" in self.source:
                    add("const constant int64_t*", f"{name}_strides", "strides", name)
                if f"{name}_ndim" in self.source:
                    add("const constant int&", f"{name}_ndim", "ndim", name)
        for name, dtype in zip(self.output_names, self.output_dtypes, strict=True):
            type = METAL_TYPES[dtype]
            add(f"device {f'atomic<{type}>' if self.atomic_outputs else type}*", name, "output", name)
        for name, type in ATTRIBUTES.items():
            if name in self.source:
                parameters.append(Parameter(type, name, name, "attribute", name))
        return parameters

    def buffers(self) -> list[Parameter]:
        return [parameter for parameter in self.parameters() if parameter.role != "attribute"]

    def template_arguments(self) -> list[tuple[str, str, str]]:
        """(kind, name, value) of each: ("typename", "T", "float16_t") or ("int", "N", "64")."""
        return [
            ("typename", name, METAL_TYPES[value])
            if isinstance(value, str)
            else ("bool" if isinstance(value, bool) else "int", name, str(int(value)))
            for name, value in self.template
        ]


def dtype_name(dtype: Any) -> str:
    """'float16' for a dtype of NumPy or MLX, or for that string."""
    name = getattr(dtype, "__name__", None) or getattr(dtype, "name", None) or str(dtype)
    name = name.removeprefix("mlx.core.").rstrip("_")
    if name not in METAL_TYPES:
        raise ValueError(f"{dtype} is not a type that MLX passes to Metal")
    return name


def template_values(template: Sequence[tuple[str, Any]] | None) -> tuple[tuple[str, int | bool | str], ...]:
    """Template arguments as mx.fast.metal_kernel takes them, with dtypes by name."""
    return tuple(
        (name, value if isinstance(value, bool) else int(value) if hasattr(value, "__index__") else dtype_name(value))
        for name, value in template or ()
    )
