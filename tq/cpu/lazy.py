"""Calls kernels from MLX: as lazy operations through a small extension, or at once through ctypes where that is not.

Both ways have the same interface: `call`, `bind` for what is called again and again, and `Pinned` for memory that
parameters point to. The extension is C++ that binds to one exact Python, MLX and nanobind, so it is built on the
machine where it runs (extension.cpp).
"""

import ctypes
import functools
import importlib.util
import sysconfig
from collections.abc import Callable, Sequence
from ctypes import c_int32, c_int64
from dataclasses import dataclass
from importlib import metadata
from importlib.machinery import ExtensionFileLoader
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import mlx.core as mx
import numpy as np

from tq.cpu import build, library
from tq.cpu.build import Built, Declined, Recipe, once
from tq.cpu.library import Array

SOURCE = Path(__file__).with_name("extension.cpp")
FLAGS = (
    "-std=c++20", "-O1", "-fvisibility=hidden", "-fno-strict-aliasing", "-pthread", "-DNDEBUG",
    "-DNB_COMPACT_ASSERTIONS", "-DNB_DOMAIN=mlx",
)  # fmt: skip
NUMPY = {
    mx.float32: np.float32, mx.float16: np.float16, mx.uint32: np.uint32, mx.int32: np.int32, mx.uint8: np.uint8,
    mx.bool_: np.bool_,
}  # fmt: skip
TYPES = {np.dtype(numpy): i for i, numpy in enumerate(NUMPY.values())}  # tq_dtype
KERNEL = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p)
ALIGNMENT = 64
NANOBIND = "pip install --upgrade nanobind"
HEADERS = "install them (Debian and Ubuntu: apt install python3-dev; Fedora: dnf install python3-devel)"

Output = tuple[Sequence[int], mx.Dtype]


@dataclass(frozen=True)
class LazyState:
    """Whether kernels are lazy operations of MLX, and why not.

    Attributes:
        hint: What would help where they are not.
    """

    active: bool
    reason: str
    hint: str | None = None


@functools.cache
def state() -> LazyState:
    """How `call` reaches the kernels, for people."""
    try:
        extension = _extension()
    except Declined as declined:
        return LazyState(False, str(declined), declined.hint)
    if not extension.check_outputs_are_kept():
        return LazyState(True, "lazy operations of MLX, which copy the cache for each token with this version of MLX")
    return LazyState(True, "lazy operations of MLX")


class Memory:
    """Zeroed bytes at a multiple of 64, where the processor reads fastest; MLX's own arrays begin anywhere."""

    def __init__(self, size_bytes: int):
        self.size_bytes = size_bytes
        self.handle: Any = None
        if state().active:
            self.handle = _extension().Memory(size_bytes)
            self.address: int = self.handle.address
        else:
            self.handle = np.zeros(size_bytes + ALIGNMENT, np.uint8)
            self.address = -(-_address(self.handle) // ALIGNMENT) * ALIGNMENT

    @property
    def __array_interface__(self) -> dict[str, Any]:
        return {"shape": (self.size_bytes,), "typestr": "|u1", "data": (self.address, False), "version": 3}

    def view(self) -> np.ndarray:
        """The bytes themselves, uint8 (size_bytes,), writable."""
        return np.asarray(self)


class Pinned:
    """Arrays and memories that stay where they are while this object, or a call that it was given to, needs them.

    Attributes:
        addresses: Of each part, in order. Arrays are evaluated and row-contiguous there.
    """

    def __init__(self, *parts: "mx.array | Memory", also: "Sequence[Pinned]" = ()):
        """``also``: what else must stay; its addresses are known already."""
        self.parts = [mx.contiguous(part) if isinstance(part, mx.array) else part for part in parts]
        mx.eval([part for part in self.parts if isinstance(part, mx.array)])
        self.addresses = tuple(
            part.address if isinstance(part, Memory) else _address(np.asarray(part)) for part in self.parts
        )
        self.also = list(also)
        self.handle: Any = None
        if state().active:
            self.handle = _extension().Keep(
                [part for part in self.parts if isinstance(part, mx.array)],
                [part.handle for part in self.parts if isinstance(part, Memory)],
                [other.handle for other in self.also],
            )


def call(
    operation: str,
    params: ctypes.Structure,
    inputs: Sequence[mx.array],
    outputs: Sequence[Output],
    aliases: Sequence[int] = (),
    keep: Pinned | None = None,
    strided: bool = False,
) -> list[mx.array]:
    """Run a kernel, or plan to.

    Args:
        operation: Its name in tq_cpu.h. Trusted: shapes and types are what it wants.
        params: Its parameters, copied now.
        inputs: float32, float16, uint32, int32, uint8 or bool.
        outputs: Shape and type of each.
        aliases: For each output the number of the input that it continues, or -1: it has that input's buffer if nobody
            else uses it, else a copy. Such inputs are not passed to the kernel, which finds them in the output.
        keep: What parameters point to.
        strided: The kernel reads strides; only the last axis has to be contiguous. Otherwise inputs are made
            row-contiguous.
    """
    return _way()(_address_of(operation), params, inputs, outputs, aliases, keep and keep.handle, strided)


class Bound(Protocol):
    """A kernel with parameters of which a few numbers change from call to call."""

    def __call__(self, inputs: Sequence[mx.array], numbers: Sequence[int]) -> list[mx.array]:
        """As `call`. numbers: the first of those that change; others stay as they were when it was bound."""

    def append(self, x: mx.array, cache: Any, n_kv_heads: int, key_dim: int, value_dim: int) -> mx.array | None:
        """The same for x and the keys and values of an mlx-lm KVCache, with position, row and rows as numbers.

        The cache is then one token longer. None, and nothing happens: x is not one token, or the cache has no room for
        it or keeps other heads or types, or operations are not lazy, so that there is nothing to be gained.
        """


def bind(operation: str, params: ctypes.Structure, first_number: str, aliases: Sequence[int], keep: Pinned) -> Bound:
    """For what is called once per layer and token: all that calls have in common is handed over now.

    Args:
        params: Copied now. Numbers are its int32 fields from ``first_number`` on.
        aliases: As in `call`, one for each output: an output has the shape and type of the input that it continues,
            and those of the first input if it continues none.
    """
    address, at = _address_of(operation), getattr(type(params), first_number).offset
    if state().active:
        return _extension().Bound(address, params, at, aliases, keep.handle)
    return _BoundNow(address, type(params).from_buffer_copy(params), at, tuple(aliases))


@dataclass(frozen=True)
class _BoundNow:
    """The same, at once."""

    address: int
    params: ctypes.Structure
    numbers_at: int
    aliases: Sequence[int]

    def __call__(self, inputs: Sequence[mx.array], numbers: Sequence[int]) -> list[mx.array]:
        params = type(self.params).from_buffer_copy(self.params)
        (c_int32 * len(numbers)).from_buffer(params, self.numbers_at)[:] = list(numbers)
        like = [inputs[max(alias, 0)] for alias in self.aliases]
        return _call_now(self.address, params, inputs, [(a.shape, a.dtype) for a in like], self.aliases, None, False)

    def append(self, *_: Any) -> None:
        return None


@functools.cache
def _way() -> Callable[..., list[mx.array]]:
    return _extension().call if state().active else _call_now


def _call_now(
    address: int,
    params: ctypes.Structure,
    inputs: Sequence[mx.array],
    outputs: Sequence[Output],
    aliases: Sequence[int],
    keep: None,
    strided: bool,
) -> list[mx.array]:
    """The same, at once: results are NumPy's memory, copied to MLX."""
    mx.eval(inputs)
    seen = [_readable(np.asarray(a), strided) for i, a in enumerate(inputs) if i not in aliases]
    made = []
    for (shape, dtype), alias in zip(outputs, [*aliases, *[-1] * (len(outputs) - len(aliases))], strict=True):
        made.append(np.empty(shape, NUMPY[dtype]) if alias < 0 else np.array(inputs[alias]).reshape(shape))
    KERNEL(address)(ctypes.addressof(params), _arrays(seen), _arrays(made))
    return [mx.array(a) for a in made]


def _readable(a: np.ndarray, strided: bool) -> np.ndarray:
    if strided and (a.ndim == 0 or a.strides[-1] == a.itemsize):
        return a
    return np.asarray(a, order="C")


def _arrays(arrays: Sequence[np.ndarray]) -> ctypes.Array:
    """tq_array[]; it holds on to shapes and strides, not to `arrays`."""
    made = (Array * len(arrays))()
    for entry, a in zip(made, arrays, strict=True):
        entry.data = _address(a)
        entry.shape = (c_int32 * a.ndim)(*a.shape)
        entry.strides = (c_int64 * a.ndim)(*(stride // a.itemsize for stride in a.strides))
        entry.ndim, entry.dtype = a.ndim, TYPES[a.dtype]
    return made


def _address(a: np.ndarray) -> int:
    return a.__array_interface__["data"][0]


@functools.cache
def _address_of(operation: str) -> int:
    assert operation in library.OPERATIONS, operation
    address = ctypes.cast(getattr(library.library(), operation), ctypes.c_void_p).value
    assert address is not None
    return address


@once
def _extension() -> ModuleType:
    """The extension of this Python and this MLX.

    Raises:
        Declined: It cannot be built, or MLX's arrays are none to it.
    """
    path = _built().path
    loader = ExtensionFileLoader("extension", str(path))
    spec = importlib.util.spec_from_file_location("extension", path, loader=loader)
    try:
        assert spec is not None
        module = importlib.util.module_from_spec(spec)
        loader.exec_module(module)
    except ImportError as error:
        raise Declined(f"the built extension cannot be loaded: {error}", build.ANOTHER_CACHE) from error
    try:
        module.Keep([mx.zeros(1)], [], [])
    except TypeError as error:
        raise Declined("this nanobind is not compatible with the one that MLX was built with", NANOBIND) from error
    return module


def _built() -> Built:
    headers = {sysconfig.get_path("include"), sysconfig.get_path("platinclude")}
    if not any(Path(folder, "Python.h").exists() for folder in headers):
        raise Declined("Python's headers are not installed", HEADERS)
    spec = importlib.util.find_spec("nanobind")
    if spec is None or spec.origin is None:
        raise Declined("nanobind is not installed", NANOBIND)
    nanobind, theirs = Path(spec.origin).parent, Path(mx.__file__).parent
    linked = theirs / "lib" / "libmlx.so"
    if not linked.exists():
        raise Declined("this MLX does not bring its library and headers")
    folders = [*sorted(headers), nanobind / "include", nanobind / "ext" / "robin_map" / "include", theirs / "include"]
    includes = [f"-I{folder}" for folder in [*folders, SOURCE.parent]]
    versions = [metadata.version("mlx"), metadata.version("nanobind"), str(linked.stat().st_size)]
    recipe = Recipe(
        "extension",
        "C++",
        (SOURCE, nanobind / "src" / "nb_combined.cpp"),
        (library.KERNELS / "tq_cpu.h", SOURCE.with_name("continued.h")),
        (*FLAGS, *includes),
        (linked,),
        (*versions, sysconfig.get_config_var("SOABI")),
    )
    return build.build(recipe)
