"""Type check of a variant: the errors and warnings that a kernel must not have.

Two passes of clang with MLX's own headers, and rules of Metal that clang doesn't have. The first pass compiles the
function and MLX's template form of it as Metal would. The second has no generic address space, so that a pointer
without an address space is one into thread memory, and giving it another is an error.
"""

import re
from pathlib import Path

from . import lowering, toolchain
from .library import MAX_BUFFERS
from .lint import lint
from .variant import Variant

# MLX compiles as Metal 3.1 to 4.1, by the version of macOS; up to 3.2 that is C++14 (device.cpp).
_CXX14 = "-Wpre-c++17-compat"
# clang warns of each 1.0 in a text without double; Metal's literals are float.
_LITERAL = "double precision constant requires"
# In a kernel that is a template clang allows no threadgroup variables. Metal does.
_SHARED_IN_TEMPLATE = "cannot be declared in local address space"
# What clang says of temporaries and copies of structures where there is no generic address space.
_STRUCTURES = re.compile(r"no matching constructor|cannot initialize object parameter")
_ADDRESS_SPACE = re.compile(r"address space|\b(thread|device|threadgroup|constant)\b[^']*[*&]")
# "__private float *__private": a pointer into thread memory, which itself is in thread memory, as are all variables.
_METAL_NAMES = {
    "*__private": "*",
    "__private": "thread",
    "__global": "device",
    "__local": "threadgroup",
    "__constant": "constant",
    "__generic": "generic",
    "__bf16": "bfloat",
}
_NAMES = re.compile("|".join(re.escape(name) + r"\b" for name in _METAL_NAMES))


def typecheck(variant: Variant) -> list[str]:
    """Diagnostics, as "name.body:12: error: ..."; lines count from the start of the body or header."""
    found = _front_end(lowering.both_forms(variant), generic_address_space=True)
    # The other pass also meets what clang can't do without that address space, so only its own findings count.
    strict = _front_end(lowering.function_form(variant), generic_address_space=False)
    found += [line for line in strict if _ADDRESS_SPACE.search(line) and not _STRUCTURES.search(line)]
    types = [name for kind, name, _ in variant.template_arguments() if kind == "typename"]
    found += lint(variant.source, f"{variant.name}.body", types)
    found += lint(variant.header, f"{variant.name}.header", types)
    buffers = len(variant.buffers())
    if buffers > MAX_BUFFERS:
        found.append(f"{variant.name}: error: {buffers} buffers, Metal has {MAX_BUFFERS}")
    return list(dict.fromkeys(found))


def diagnostics(output: str) -> list[str]:
    """The lines of clang's output that are errors or warnings, with address spaces by their names in Metal."""
    lines = [line for line in output.splitlines() if re.search(r": (fatal )?(error|warning): ", line)]
    lines = [line for line in lines if _LITERAL not in line and _SHARED_IN_TEMPLATE not in line]
    return [_NAMES.sub(lambda match: _METAL_NAMES[match[0]], line) for line in lines]


def _front_end(text: str, generic_address_space: bool) -> list[str]:
    """What clang says of a text, which the cache remembers."""
    options = [*toolchain.front_end(generic_address_space), _CXX14]

    def make(folder: Path, path: Path) -> None:
        source = folder / "kernel.clcpp"
        source.write_text(text)
        done = toolchain.compile([*options, "-fsyntax-only", str(source)])
        path.write_text(done.stderr)
        if done.returncode not in (0, 1):  # it reports errors with 1
            raise RuntimeError(f"clang ended with {done.returncode}:\n{done.stderr}")

    return diagnostics(toolchain.cached("typecheck", ".txt", (text, options), make).read_text())
