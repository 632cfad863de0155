"""Compiles a variant to a shared library, loads it, and runs it in the emulator's runtime."""

import ctypes
import functools
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from . import toolchain

GUARD_BYTES = 256  # after every threadgroup variable; the same number in runtime/checker.cpp
MAX_BUFFERS = 31  # as in runtime/abi.h, and in Metal
_CODE = [
    *("-O1", "-ffp-contract=on", "-relaxed-aliasing", "-pic-level", "2", "-mrelocation-model", "pic"),
    *("-debug-info-kind=line-tables-only", "-dwarf-version=4"),
]
_RECOVERABLE = "array-bounds,float-cast-overflow"
_CHECKS = [
    "-fsanitize=thread",
    f"-fsanitize={_RECOVERABLE},integer-divide-by-zero",
    "-fsanitize-minimal-runtime",
    f"-fsanitize-recover={_RECOVERABLE}",
    "-ftrivial-auto-var-init=pattern",  # an uninitialised float of a thread is a NaN
    # Accesses that are merged have no line.
    *("-mllvm", "-simplifycfg-sink-common=false", "-mllvm", "-simplifycfg-hoist-common=false"),
    *("-mllvm", "-simplifycfg-merge-cond-stores=false"),
]


class CompileError(RuntimeError):
    """The compiler refuses the text."""


class Module(ctypes.Structure):
    """What a kernel's library says of itself: struct msl_module in runtime/abi.h."""

    _fields_ = [
        ("entry", ctypes.c_void_p),
        ("image", ctypes.c_void_p),
        ("constants_end", ctypes.c_void_p),
        ("arrays", ctypes.c_void_p),
        ("array_count", ctypes.c_long),
    ]


class Array(ctypes.Structure):
    """A threadgroup variable: struct msl_array."""

    _fields_ = [
        ("address", ctypes.c_void_p),
        ("bytes", ctypes.c_long),
        ("element_bytes", ctypes.c_long),
        ("name", ctypes.c_char_p),
    ]


class Buffer(ctypes.Structure):
    """An input or output: struct msl_buffer."""

    INPUT, OUTPUT, FILLED_OUTPUT = 0, 1, 2
    _fields_ = [
        ("address", ctypes.c_void_p),
        ("bytes", ctypes.c_long),
        ("element_bytes", ctypes.c_long),
        ("name", ctypes.c_char_p),
        ("kind", ctypes.c_int),
        ("unwritten", ctypes.c_long),
    ]


class Launch(ctypes.Structure):
    """What to run, and how: struct msl_launch."""

    _fields_ = [
        ("module", ctypes.c_void_p),
        ("grid", ctypes.c_int * 3),
        ("threads", ctypes.c_int * 3),
        ("order", ctypes.c_int),
        ("checking", ctypes.c_int),
        ("seed", ctypes.c_ulong),
        ("buffer_count", ctypes.c_long),
        ("buffers", Buffer * MAX_BUFFERS),
        ("accesses", ctypes.c_ulong),
    ]


@dataclass(frozen=True)
class Fault:
    """What a kernel did wrong.

    Attributes:
        kind: race, out of bounds, uninitialised, misaligned, divergence, unwritten, ...
        message: The array and what happened to it.
        line: Where in the text, as "name.body:12"; empty if that is not known.
        thread: Which thread did it; empty if that does not apply.
    """

    kind: str
    message: str
    line: str = ""
    thread: str = ""

    def __str__(self) -> str:
        return f"{self.kind}: {self.message}" + "".join(f", {part}" for part in (self.line, self.thread) if part)


@functools.lru_cache(maxsize=512)
def library(text: str, check: bool) -> "Library":
    """The library of a variant's executable text. With `check`, every load and store of it can be checked."""
    return Library(text, check)


class Library:
    """A compiled variant, loaded."""

    def __init__(self, text: str, check: bool):
        def make(folder: Path, path: Path) -> None:
            _compile(text, check, folder, path)

        made_from = (text, toolchain.front_end(generic_address_space=True), _CODE, _CHECKS if check else None)
        self.path = toolchain.cached("kernel", ".so", made_from, make)
        _runtime()  # its symbols must be there first
        self._module = Module.in_dll(ctypes.CDLL(str(self.path)), "msl_module")
        arrays = (Array * self._module.array_count).from_address(self._module.arrays or ctypes.addressof(self._module))
        self.threadgroup_bytes = sum(array.bytes for array in arrays)

    def run(self, launch: Launch) -> list[Fault]:
        launch.module = ctypes.addressof(self._module)
        faults = []
        for line in _runtime().msl_run(ctypes.byref(launch)).decode().splitlines():
            kind, address, thread, message = line.split("\t")
            faults.append(Fault(kind, message, self._line(int(address)), thread))
        for buffer in launch.buffers[: launch.buffer_count]:
            if buffer.unwritten:
                of = f"{buffer.unwritten} of {buffer.bytes} bytes of output {buffer.name.decode()}"
                faults.append(Fault("unwritten", f"{of} were never written"))
        return faults

    def _line(self, address: int) -> str:
        """The innermost place in the kernel's own text that an address in its code comes from."""
        program = shutil.which("addr2line")
        if not address or not program:
            return ""
        offset = hex(address - self._module.image - 1)
        command = [program, "--inlines", "--exe", str(self.path), offset]
        places = subprocess.run(command, capture_output=True, text=True).stdout.split("\n")
        names = [Path(place.split(" ")[0]).name for place in places]
        return next((name for name in names if re.search(r"\.(body|header):\d", name)), "")


@functools.cache
def _runtime() -> ctypes.CDLL:
    library = ctypes.CDLL(str(toolchain.runtime()), mode=ctypes.RTLD_GLOBAL)
    library.msl_run.restype = ctypes.c_char_p
    return library


def _compile(text: str, check: bool, folder: Path, path: Path) -> None:
    """Text to a library, by way of LLVM's intermediate text, where what clang can't express is changed."""
    source, middle, object_file = folder / "kernel.clcpp", folder / "kernel.ll", folder / "kernel.o"
    source.write_text(text)
    code = [*_CODE, *(_CHECKS if check else [])]
    front_end = toolchain.front_end(generic_address_space=True)
    done = toolchain.compile([*front_end, *code, "-disable-llvm-passes", "-emit-llvm", str(source), "-o", str(middle)])
    if done.returncode:
        raise CompileError(done.stderr)
    middle.write_text(_change(middle.read_text(), check))
    done = toolchain.compile(["-x", "ir", *toolchain.target(), *code, "-emit-obj", str(middle), "-o", str(object_file)])
    if done.returncode:
        raise RuntimeError(f"clang refuses the changed intermediate text:\n{done.stderr}")
    toolchain.link(object_file, path)


_SHARED = re.compile(r"^(@\S+) = internal (?:unnamed_addr )?global (.*) undef, align (\d+)", re.MULTILINE)
_MASKED = re.compile(r"^ +(%sh[lr]\.mask\w*) = and (i\d+|<\d+ x i\d+>) (\S+), .*?(, !dbg !\d+)?$", re.MULTILINE)
_BYTES = {"float": 4, "half": 2, "bfloat": 2, "i1": 1, "i8": 1, "i16": 2, "i32": 4, "i64": 8}


def _change(middle: str, check: bool) -> str:
    """Gives threadgroup variables a guard, lists them, and tells the runtime of shifts before they are masked."""
    arrays = []

    def guard(match: re.Match[str]) -> str:
        symbol, type, align = match.groups()
        arrays.append((symbol, type))
        return f"{symbol} = hidden global <{{ {type}, [{GUARD_BYTES} x i8] }}> undef, align {max(int(align), 64)}"

    middle = _SHARED.sub(guard, re.sub(r"\bspir_(kernel|func) ", "", middle))  # aarch64 has no such calling convention
    if check:
        middle = _MASKED.sub(_report_shift, middle) + "\ndeclare void @msl_shift(i64, i32)\n"
    return middle + _description(arrays)


def _report_shift(match: re.Match[str]) -> str:
    """OpenCL masks the count of a shift, where Metal leaves a count of the width or more undefined."""
    result, type, count, debug = match.groups()
    debug = debug or ""
    vector = re.fullmatch(r"<(\d+) x (i\d+)>", type)
    lanes, element = (int(vector[1]), vector[2]) if vector else (1, type)
    lines = []
    for i in range(lanes):
        value = count
        if vector:
            value = f"{result}.count{i}"
            lines.append(f"  {value} = extractelement {type} {count}, i32 {i}{debug}")
        if element != "i64":
            lines.append(f"  {result}.wide{i} = sext {element} {value} to i64{debug}")
            value = f"{result}.wide{i}"
        lines.append(f"  call void @msl_shift(i64 {value}, i32 {element[1:]}){debug}")
    return "\n".join([*lines, match[0]])


def _element_bytes(type: str) -> int:
    """Bytes of the innermost element of an array type, or 0 for a structure."""
    while match := re.fullmatch(r"\[\d+ x (.*)\]", type):
        type = match[1]
    if match := re.fullmatch(r"<(\d+) x (\w+)>", type):
        count = int(match[1])
        return (4 if count == 3 else count) * _BYTES.get(match[2], 0)
    return _BYTES.get(type, 0)


def _description(arrays: list[tuple[str, str]]) -> str:
    """struct msl_module, as a global of the library."""
    lines = ["@__ehdr_start = external hidden global i8", "@__bss_start = external hidden global i8"]
    entries = []
    for i, (symbol, type) in enumerate(arrays):
        name = re.sub(r"^@_ZZ\w*?msl_kernel\w*E\d+", "", symbol).lstrip("@")
        lines.append(f'@msl_name.{i} = private constant [{len(name) + 1} x i8] c"{name}\\00"')
        size = f"i64 ptrtoint (ptr getelementptr ({type}, ptr null, i32 1) to i64)"
        entries.append(f"%msl_array {{ ptr {symbol}, {size}, i64 {_element_bytes(type)}, ptr @msl_name.{i} }}")
    lines += [
        "%msl_array = type { ptr, i64, i64, ptr }",
        "%msl_module = type { ptr, ptr, ptr, ptr, i64 }",
        f"@msl_arrays = hidden global [{len(entries)} x %msl_array] [{', '.join(entries)}]",
        "@msl_module = global %msl_module "
        f"{{ ptr @msl_entry, ptr @__ehdr_start, ptr @__bss_start, ptr @msl_arrays, i64 {len(entries)} }}",
    ]
    return "\n" + "\n".join(lines) + "\n"
