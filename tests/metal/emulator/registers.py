"""Arrays of a thread that optimized code keeps in memory: one is indexed where a loop was not unrolled.

On a GPU such memory lies in the device's. LLVM decides here as it does in Apple's compiler, but for thresholds that
are not known: arrays that a kernel wants in registers need `#pragma unroll` wherever they are indexed.
"""

import re
from pathlib import Path

from . import lowering, toolchain
from .variant import Variant

_ALLOCA = re.compile(r"%(\w+?)(?:\.i)*\d* = alloca ")


def arrays_in_memory(variant: Variant) -> set[str]:
    """Their names.

    Raises:
        RuntimeError: The text does not compile.
    """
    text = lowering.executable(variant)
    options = [*toolchain.front_end(generic_address_space=True), "-O2", "-ffp-contract=on", "-emit-llvm"]

    def make(folder: Path, path: Path) -> None:
        source = folder / "kernel.clcpp"
        source.write_text(text)
        done = toolchain.compile([*options, str(source), "-o", str(path)])
        if done.returncode:
            raise RuntimeError(done.stderr)

    code = toolchain.cached("registers", ".ll", (text, options), make).read_text()
    own = variant.header + variant.source
    # The runtime's variables are not the kernel's.
    return {name for name in _ALLOCA.findall(code) if re.search(rf"\b{name}\[", own)}
