"""Rewrites Metal text as C++ for OpenCL 2021, and puts a variant's text into the forms that clang compiles.

Address spaces, vectors and SIMD-group functions need no rewriting: the headers in include/ declare them. What is left
is syntax that a header can't provide.
"""

import functools
import re
from collections.abc import Iterable
from pathlib import Path

from . import mlx_text
from .variant import Variant

_FOLDER = Path(__file__).parent
_ELEMENTS = ("char", "uchar", "short", "ushort", "int", "uint", "long", "ulong", "half", "bfloat", "float")
_VECTORS = [f"{element}{n}" for element in _ELEMENTS for n in (2, 3, 4)]
# What may be built from parts, or stand for a type that clang converts nothing else to: bfloat.
_BUILT = {*_VECTORS, "half", "bfloat", "float16_t", "bfloat16_t"}
_VECTOR = rf"(?:metal::)?(?:vec<[^<>;]*>|{'|'.join(_VECTORS)})"
_ALIAS = re.compile(rf"\busing\s+(\w+)\s*=\s*(?:const\s+)?{_VECTOR}\s*;|\btypedef\s+(?:const\s+)?{_VECTOR}\s+(\w+)\s*;")
_TYPE_PARAMETER = re.compile(r"\b(?:typename|class)\s+(\w+)")


def lower(text: str, types: Iterable[str] = ()) -> str:
    """Metal text as C++ for OpenCL; `types` are more names of types that may be vectors or bfloat."""
    # "void f() thread {": what a method is called on is in thread memory unless it says otherwise.
    text = re.sub(r"\)\s*(const\s+)?thread\b(?=\s*[:{;])", r") \1", text)
    text = re.sub(r"\breturn \*this;", "return msl_self(this);", text)
    # clang builds no vector from parts, and converts between half and bfloat not even when asked to.
    text = re.sub(r"\boperator\s+([\w:]+(?:<[^<>;(){}]*>)?)\s*\(", r"operator type_identity_t<\1>(", text)
    text = re.sub(r"\bstatic_cast<(\w+)>\s*\(", r"msl_make<\1>(", text)
    text = re.sub(r"\b(?:metal::)?vec<([^<>;(){}]*)>\s*\(", r"msl_make<metal::vec<\1>>(", text)
    names = "|".join(sorted({*_BUILT, *types}))
    # But "T (&values)[4]" declares a reference.
    text = re.sub(rf"\b(?:metal::)?({names})\s*\((?!&\w+\)\s*\[)", r"msl_make<\1>(", text)
    # An explicit instantiation may have no attributes there, and what metal_* headers declare is there already.
    text = re.sub(r"\[\[host_name\([^\]]*\)\]\]", " ", text)
    text = re.sub(r"(template[\s\\]*)\[\[kernel\]\]", r"\1 ", text)
    return re.sub(r"^[ \t]*#[ \t]*include[ \t]*<metal_\w+>", "", text, flags=re.MULTILINE)


def _types(variant: Variant) -> set[str]:
    """Names by which a kernel's text may build a vector or convert to bfloat: aliases and template parameters."""
    text = variant.header + variant.source
    aliases = {name for match in _ALIAS.finditer(text) for name in match.groups() if name}
    arguments = {name for kind, name, _ in variant.template_arguments() if kind == "typename"}
    return aliases | arguments | set(_TYPE_PARAMETER.findall(text))


@functools.cache
def prelude() -> str:
    """What is the same for all kernels, as one text: the headers, and MLX's utilities."""
    return _included("msl.h") + lower(mlx_text.utils_text())


def _included(name: str) -> str:
    """A header with those that it includes put in; no header is included twice."""
    text = next(path for path in (_FOLDER / "include" / name, _FOLDER / "runtime" / name) if path.exists()).read_text()
    text = re.sub(r'^#include "(.*)"$', lambda match: _included(match[1]), text, flags=re.MULTILINE)
    return f'#line 1 "{name}"\n{text}'.replace("#pragma once\n", "\n")


def _header(variant: Variant) -> str:
    return f'#line 1 "{variant.name}.header"\n{lower(variant.header, _types(variant))}\n'


def _body(variant: Variant) -> str:
    return f'#line 1 "{variant.name}.body"\n{lower(variant.source, _types(variant))}\n}}\n'


def _function(variant: Variant) -> str:
    """The kernel as a function that isn't a template: clang has no threadgroup variables in templates."""
    parameters = ", ".join(f"{p.type} {p.name}" for p in variant.parameters())
    constants = "".join(
        f"using {name} = {value};\n" if kind == "typename" else f"constexpr {kind} {name} = {value};\n"
        for kind, name, value in variant.template_arguments()
    )
    return f'#line 1 "{variant.name}.signature"\nkernel void msl_kernel({parameters}) {{\n{constants}{_body(variant)}'


@functools.lru_cache(maxsize=512)
def executable(variant: Variant) -> str:
    """The kernel, and an entry without parameters that takes each from the running thread."""
    arguments, buffers = [], 0
    for parameter in variant.parameters():
        if parameter.role == "attribute":
            value = f"t->{parameter.name}"
            arguments.append(value if parameter.type == "uint" else f"uint3{{{value}[0], {value}[1], {value}[2]}}")
        else:
            address = f"({parameter.type[:-1]}*)t->buffers[{buffers}]"
            arguments.append(address if parameter.type.endswith("*") else "*" + address)
            buffers += 1
    call = f"msl_thread* t = msl_current(); msl_kernel({', '.join(arguments)});"
    entry = f'#line 1 "entry"\nextern "C" void msl_entry() {{ {call} }}\n'
    return _header(variant) + _function(variant) + entry


def function_form(variant: Variant) -> str:
    """The kernel's text for the pass that allows no generic pointers."""
    return _header(variant) + _function(variant)


def both_forms(variant: Variant) -> str:
    """The kernel as a function, and in MLX's own form if that is a template."""
    text = function_form(variant)
    if variant.template:
        text += f'#line 1 "{variant.name}.signature"\n{lower(mlx_text.declaration(variant))}'
        text += f'{_body(variant)}#line 1 "{variant.name}.instantiation"\n{lower(mlx_text.instantiation(variant))}'
    return text
