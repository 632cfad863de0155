"""From a .metal file of this folder to a function that MLX runs.

A file holds helpers, then the line ``// body``, then the statements of a kernel: MLX writes the signature around them,
from the types of the arrays that it is called with (``mx.fast.metal_kernel``). ``#include "codes.metal"`` takes the
helpers of another file.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import mlx.core as mx

FOLDER = Path(__file__).parent
INCLUDE = re.compile(r'^#include "([\w.]+)"\n', re.MULTILINE)
BODY = "// body\n"

Template = dict[str, mx.Dtype | int | bool]
Shape = tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Launch:
    """How a kernel is run: all but its inputs. Made once for a shape: a model makes hundreds of calls for a token.

    Attributes:
        template: Values of its template arguments: types, and integers that are not negative.
        grid: Threads, in all.
        threadgroup: Threads in one group.
        outputs: Shape and type of each.
    """

    template: Template
    grid: tuple[int, int, int]
    threadgroup: tuple[int, int, int]
    outputs: Sequence[tuple[Shape, mx.Dtype]]

    @cached_property
    def arguments(self) -> dict[str, Any]:
        """For the function that MLX makes of a kernel."""
        return {
            "template": list(self.template.items()),
            "grid": self.grid,
            "threadgroup": self.threadgroup,
            "output_shapes": [shape for shape, _ in self.outputs],
            "output_dtypes": [dtype for _, dtype in self.outputs],
        }


@cache
def text(name: str) -> tuple[str, str]:
    """The helpers (with those that they include, each once) and the body of ``<name>.metal``."""
    helpers, _, body = (FOLDER / f"{name}.metal").read_text().partition(BODY)
    seen: set[str] = set()

    def include(match: re.Match) -> str:
        if match[1] in seen:
            return ""
        seen.add(match[1])
        return INCLUDE.sub(include, (FOLDER / match[1]).read_text())

    return INCLUDE.sub(include, helpers), body


@dataclass(frozen=True)
class Kernel:
    """A kernel and the names of its arrays, in order.

    Attributes:
        name: Of its file.
        inputs: Arrays that it reads.
        outputs: Arrays that it writes.
    """

    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]

    def __call__(self, inputs: list[mx.array], launch: Launch) -> list[mx.array]:
        """Run it, lazily. inputs: as named; MLX copies those that are not row-contiguous."""
        if 0 in launch.grid:  # a GPU cannot be given nothing to do
            return [mx.zeros(shape, dtype) for shape, dtype in launch.outputs]
        return _build(self, mx.fast.metal_kernel)(inputs=inputs, **launch.arguments)


@cache
def _build(kernel: Kernel, factory: Any) -> Any:
    # The factory is part of the key: tests put an emulator in its place.
    header, source = text(kernel.name)
    return factory(
        name=f"tq_{kernel.name}",
        input_names=list(kernel.inputs),
        output_names=list(kernel.outputs),
        header=header,
        source=source,
    )
