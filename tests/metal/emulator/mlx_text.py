"""The text that MLX hands to Apple's compiler for a kernel: mlx/backend/common/metal_kernel.cpp, and metal::utils().

test_emulator_text.py holds it against what the installed MLX generates.
"""

import functools
import importlib.util
import math
import re
from pathlib import Path

from .variant import CONSTANT_ELEMENTS, METAL_TYPES, Variant


def kernel_name(variant: Variant) -> str:
    """The function's name, which MLX makes from the name given and from all types."""
    name = "custom_kernel_" + variant.name
    if variant.template:
        name += "__" + "_".join(value.replace("-", "_") for _, _, value in variant.template_arguments())
    for shape, dtype in variant.inputs:
        name += "_" + METAL_TYPES[dtype] + ("" if math.prod(shape) >= CONSTANT_ELEMENTS else "c" if shape else "s")
    return name + "".join("_" + METAL_TYPES[dtype] for dtype in variant.output_dtypes)


def declaration(variant: Variant) -> str:
    """From `template` or `[[kernel]]` to the brace that opens the body."""
    template = ", ".join(f"{kind} {name}" for kind, name, _ in variant.template_arguments())
    parameters = ",\n".join(f"  {p.type} {p.name} [[{p.attribute}]]" for p in variant.parameters())
    first = f"template <{template}>\n" if template else ""
    return f"{first}[[kernel]] void {kernel_name(variant)}(\n{parameters}) {{\n"


def instantiation(variant: Variant) -> str:
    """What follows the body of a kernel with template arguments."""
    if not variant.template:
        return ""
    name = kernel_name(variant)
    function = f"{name}<{', '.join(value for _, _, value in variant.template_arguments())}>"
    return f'\ntemplate [[host_name("{name}")]] [[kernel]] decltype({function}) {function};\n'


def metal_source(variant: Variant) -> str:
    """The whole text, without metal::utils(), which comes before it."""
    return variant.header + declaration(variant) + variant.source + "\n}\n" + instantiation(variant)


@functools.cache
def utils_text() -> str:
    """metal::utils(): MLX's utils.h with what it includes."""
    return "\n".join(_with_included("utils.h").values())


def header_text(name: str) -> str:
    """A header in mlx/backend/metal/kernels with what it includes, except for what utils.h includes."""
    known = _with_included("utils.h")
    return "\n".join(text for path, text in _with_included(name).items() if path not in known)


def _with_included(name: str) -> dict[str, str]:
    """The texts of a header in the installed wheel and of those that it includes, by their paths, in order."""
    specification = importlib.util.find_spec("mlx")
    assert specification is not None and specification.submodule_search_locations is not None
    root = Path(next(iter(specification.submodule_search_locations))) / "include"
    seen: set[str] = set()
    texts: dict[str, str] = {}

    def visit(path: str) -> None:
        if path in seen:
            return
        seen.add(path)
        text = (root / path).read_text()
        for included in re.findall(r'^\s*#include "(.*\.h)"', text, re.MULTILINE):
            visit(included)
        lines = [line for line in text.split("\n") if not re.search(r'#include ".*\.h"|#pragma once', line)]
        texts[path] = f'#line 1 "{path}"\n' + "\n".join(lines) + "\n"

    visit(f"mlx/backend/metal/kernels/{name}")
    return texts
