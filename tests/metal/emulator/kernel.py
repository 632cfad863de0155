"""`Kernel`: mx.fast.metal_kernel, emulated."""

import contextlib
import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import numpy as np

from . import arrays, lowering, mlx_text
from .library import MAX_BUFFERS, Buffer, CompileError, Fault, Launch, Library, library
from .typecheck import diagnostics, typecheck
from .variant import Variant, dtype_name, template_values

MAX_THREADS = 1024  # of a threadgroup
MAX_THREADGROUP_BYTES = 32768
_ORDERS = {"forward": 0, "backward": 1, "random": 2}
_AROUND = 4096  # bytes on each side of a buffer that belong to nobody


class EmulatorError(RuntimeError):
    """A kernel that Metal would refuse, or that did something wrong.

    Attributes:
        faults: What it did, each once for each place in the text; empty if it was refused.
    """

    def __init__(self, name: str, reason: str = "", faults: Sequence[Fault] = ()):
        super().__init__(f"{name}: {reason}" + "".join(f"\n  {fault}" for fault in faults))
        self.faults = list(faults)


class Kernel:
    """Has the arguments of mx.fast.metal_kernel, takes arrays of MLX or NumPy, and returns the same kind.

    Attributes:
        defaults: The keywords of a call that MLX does not have, for calls that don't give them.
    """

    defaults: ClassVar[dict[str, Any]] = {
        "check": True,
        "typecheck": False,
        "misalign": 0,
        "order": "forward",
        "seed": 1,
    }

    def __init__(
        self,
        name: str,
        input_names: Sequence[str],
        output_names: Sequence[str],
        source: str,
        header: str = "",
        ensure_row_contiguous: bool = True,
        atomic_outputs: bool = False,
    ):
        self.name = name
        self.input_names = tuple(input_names)
        self.output_names = tuple(output_names)
        self.source = source
        self.header = header
        self.ensure_row_contiguous = ensure_row_contiguous
        self.atomic_outputs = atomic_outputs
        self.accesses = 0  # checked in the last call

    def variant(self, inputs: Sequence[Any], output_dtypes: Sequence[Any], template: Sequence | None = ()) -> Variant:
        """What a call with these arguments compiles."""
        stored = [arrays.stored(value) for value in inputs]
        return self._variant(stored, output_dtypes, template)

    def metal(self, inputs: Sequence[Any], output_dtypes: Sequence[Any], template: Sequence | None = ()) -> str:
        """The text that MLX hands to Apple's compiler, after metal::utils()."""
        return mlx_text.metal_source(self.variant(inputs, output_dtypes, template))

    def typecheck(
        self, inputs: Sequence[Any], output_dtypes: Sequence[Any], template: Sequence | None = ()
    ) -> list[str]:
        """What a compiler says against the text; nothing, for a kernel that is right."""
        return typecheck(self.variant(inputs, output_dtypes, template))

    def __call__(
        self,
        *,
        inputs: Sequence[Any],
        grid: Sequence[int],
        threadgroup: Sequence[int],
        output_shapes: Sequence[Sequence[int]],
        output_dtypes: Sequence[Any],
        template: Sequence | None = None,
        init_value: float | None = None,
        verbose: bool = False,
        stream: Any = None,
        **mode: Any,
    ) -> list[Any]:
        """Runs the kernel, at once.

        Keywords that MLX does not have:
            check: Whether to check every load and store; else only results and barriers are looked at.
            typecheck: Whether the variant must also be without errors and warnings.
            misalign: Elements by which inputs are shifted in memory, as those of a slice x[1:] are.
            order: In which order lanes and threadgroups run: "forward", "backward", or "random" from `seed`.

        Raises:
            EmulatorError: Metal would refuse the kernel, or the kernel did something wrong.
        """
        unknown = mode.keys() - self.defaults.keys()
        if unknown:
            raise TypeError(f"{self.name}: no such argument: {', '.join(sorted(unknown))}")
        mode = {**self.defaults, **mode}
        stored = [arrays.stored(value) for value in inputs]
        if self.ensure_row_contiguous:
            stored = [arrays.Stored(np.asarray(array.bits, order="C"), array.dtype) for array in stored]
        variant = self._variant(stored, output_dtypes, template)
        if verbose:
            print(mlx_text.metal_source(variant))
        self._refuse(variant, grid, threadgroup)
        if mode["typecheck"] and (found := _typecheck(variant)):
            raise EmulatorError(self.name, "fails the type check\n  " + "\n  ".join(found))
        compiled = self._compiled(variant, mode["check"])
        if compiled.threadgroup_bytes > MAX_THREADGROUP_BYTES:
            reason = f"{compiled.threadgroup_bytes} bytes of threadgroup memory, the limit is {MAX_THREADGROUP_BYTES}"
            raise EmulatorError(self.name, reason)

        launch = Launch(order=_ORDERS[mode["order"]], checking=mode["check"], seed=mode["seed"])
        launch.grid[:], launch.threads[:] = grid, threadgroup
        memory, outputs = [], []
        for i, (parameter, (bits, kind)) in enumerate(
            zip(variant.buffers(), self._contents(variant, stored, output_shapes, init_value), strict=True)
        ):
            shift = mode["misalign"] * bits.itemsize if parameter.role == "input" else 0
            whole, place = _place(bits, shift)
            memory.append(whole)
            launch.buffers[i] = Buffer(place.ctypes.data, bits.nbytes, bits.itemsize, parameter.name.encode(), kind)
            if parameter.role == "output":
                outputs.append((place, bits))
        launch.buffer_count = len(memory)
        faults = compiled.run(launch)
        self.accesses = launch.accesses
        if faults:
            raise EmulatorError(self.name, f"{len(faults)} fault{'s' if len(faults) > 1 else ''}", faults)
        as_mlx = any(arrays.is_mlx(value) for value in inputs)
        return [
            arrays.returned(np.frombuffer(place.tobytes(), bits.dtype).reshape(bits.shape), dtype, as_mlx)
            for (place, bits), dtype in zip(outputs, variant.output_dtypes, strict=True)
        ]

    def _variant(self, stored: list[arrays.Stored], output_dtypes: Sequence[Any], template: Sequence | None) -> Variant:
        return Variant(
            self.name,
            self.input_names,
            self.output_names,
            self.source,
            self.header,
            tuple((array.bits.shape, array.dtype) for array in stored),
            tuple(dtype_name(dtype) for dtype in output_dtypes),
            template_values(template),
            self.atomic_outputs,
        )

    def _refuse(self, variant: Variant, grid: Sequence[int], threadgroup: Sequence[int]) -> None:
        """Raises EmulatorError for what MLX or Metal would not start."""
        for what, sizes in (("grid", grid), ("threadgroup", threadgroup)):
            if len(sizes) != 3 or min(sizes) < 1:
                raise EmulatorError(self.name, f"{what} is {tuple(sizes)}: it must be three positive numbers")
        if math.prod(threadgroup) > MAX_THREADS:
            reason = f"{math.prod(threadgroup)} threads in a threadgroup, the limit is {MAX_THREADS}"
            raise EmulatorError(self.name, reason)
        if len(variant.buffers()) > MAX_BUFFERS:
            raise EmulatorError(self.name, f"{len(variant.buffers())} buffers, the limit is {MAX_BUFFERS}")

    def _compiled(self, variant: Variant, check: bool) -> Library:
        try:
            return library(lowering.executable(variant), bool(check))
        except CompileError as error:
            lines = diagnostics(str(error)) or [str(error)]
            raise EmulatorError(self.name, "does not compile\n  " + "\n  ".join(lines)) from None

    def _contents(
        self, variant: Variant, stored: list[arrays.Stored], output_shapes: Sequence[Sequence[int]], init_value: Any
    ) -> Iterator[tuple[np.ndarray, int]]:
        """The bits that each buffer begins with, and what kind of buffer it is."""
        inputs = dict(zip(self.input_names, stored, strict=True))
        outputs = dict(zip(self.output_names, zip(output_shapes, variant.output_dtypes, strict=True), strict=True))
        for parameter in variant.buffers():
            if parameter.role == "output":
                shape, dtype = outputs[parameter.of]
                if init_value is None:  # every bit set is NaN, so that what is forgotten shows
                    bits = np.frombuffer(b"\xff" * (math.prod(shape) * arrays.stored_dtype(dtype).itemsize), np.uint8)
                    yield bits.view(arrays.stored_dtype(dtype)).reshape(tuple(shape)), Buffer.OUTPUT
                else:
                    yield arrays.filled(tuple(shape), dtype, init_value), Buffer.FILLED_OUTPUT
                continue
            array = inputs[parameter.of]
            contents = {
                "input": lambda array=array: array.bits if self.ensure_row_contiguous else array.storage(),
                "shape": lambda array=array: np.array(array.bits.shape, np.int32),
                "strides": lambda array=array: np.array(array.bits.strides, np.int64) // array.bits.itemsize,
                "ndim": lambda array=array: np.array(array.bits.ndim, np.int32),
            }
            yield contents[parameter.role](), Buffer.INPUT


@functools.lru_cache(maxsize=512)
def _typecheck(variant: Variant) -> list[str]:
    return typecheck(variant)


def _place(bits: np.ndarray, shift: int) -> tuple[np.ndarray, np.ndarray]:
    """Memory with `bits` in it, `shift` bytes past an aligned address, between bytes that belong to nobody."""
    whole = np.full(bits.nbytes + shift + 2 * _AROUND + 256, 0xA5, np.uint8)
    begin = -whole.ctypes.data % 256 + _AROUND + shift
    place = whole[begin : begin + bits.nbytes]
    place[:] = np.frombuffer(bits.tobytes(), np.uint8)
    return whole, place


@contextlib.contextmanager
def emulated(**mode: Any) -> Iterator[None]:
    """Within this context, mx.fast.metal_kernel is Kernel; `mode` are the keywords of its calls that MLX lacks."""
    import mlx.core as mx

    real, defaults = mx.fast.metal_kernel, Kernel.defaults
    mx.fast.metal_kernel, Kernel.defaults = Kernel, {**defaults, **mode}
    try:
        yield
    finally:
        mx.fast.metal_kernel, Kernel.defaults = real, defaults
