"""The text of a kernel as CUDA, for ``mx.fast.cuda_kernel``: cuda.h has most of what differs.

Kernels with 8x8 matrices (``simdgroup_matrix``) are Metal only.
"""

import re

from tq.metal.kernel import FOLDER

# An array in threadgroup memory, not a pointer to some.
SHARED_ARRAY = re.compile(r"^(\s*)threadgroup (?=[\w<>:, ]+\[)", re.MULTILINE)


def as_cuda(header: str, source: str) -> tuple[str, str]:
    """Helpers and body of a kernel (``tq.metal.kernel.text``), in CUDA."""
    # Overloads for `constant` and `device` memory, which CUDA does not tell apart, must stay different functions.
    header = header.replace("const constant ", "const volatile ")
    return (FOLDER / "cuda.h").read_text() + header, SHARED_ARRAY.sub(r"\1__shared__ ", source)
