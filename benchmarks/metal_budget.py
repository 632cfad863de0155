"""Arithmetic and bytes per weight of the kernels that decode, counted in what they compile to. No GPU takes part.

A kernel is compiled to LLVM's intermediate text, as optimised as it gets before a processor is chosen, every block of
which then counts how often it runs. What runs more for a wider matrix, by the weights that this adds, is the cost of a
weight: loops and the loads of activations and scales are in it, prologues and reductions are not.

    slots   instructions: arithmetic, comparisons, selections, loads, stores, conditional branches. Not counted are
            addresses (a part of loads), integers that change size, vectors taken apart and put together (registers
            under another name), absolute values, negations and half operands (free on Apple GPUs).
    cycles  the same, each by its cycles on an Apple GPU (github.com/philipturner/metal-benchmarks). Not published:
            loads of threadgroup memory and of arrays in thread memory, taken as 6.
    loaded  bytes that the lanes read from buffers, again and again where they do: codes, scales, activations.
    stored  bytes of codes and scales, each read once: what comes from memory if caches hold the rest.

    python benchmarks/metal_budget.py [--peer FOLDER]

FOLDER is where turboquant_mlx_full 0.30.0 is installed (site-packages): its kernels are counted in the same way.
"""

import argparse
import ctypes
import importlib
import re
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import common
import mlx.core as mx
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "metal"))

from emulator import Kernel, library, lowering, toolchain

from tq.engine.quantize.codebooks import stored_codebook
from tq.metal import fit, matvec
from tq.metal.expert_variants import Layer
from tq.metal.expert_variants import variants as expert_variants
from tq.metal.variants import Codes, random_matrix, random_rows

# No SIMD-group lacks rows at this height, no lane columns at these widths.
ROWS, NARROW, WIDE = 64, 5120, 10240
GROUP = 64
BITS = (0, 1, 2, 3, 4, 5, 6, 8)
MOST_BLOCKS = 4096

FREE = {
    "phi", "getelementptr", "bitcast", "zext", "sext", "trunc", "freeze", "extractelement", "insertelement",
    "shufflevector", "fpext half", "fneg", "fabs", "br", "ret", "unreachable", "lifetime", "assume", "dbg",
    "experimental",
}  # fmt: skip
CYCLES = {
    "shl": 4, "lshr": 4, "ashr": 4, "fshl": 4, "mul": 4, "fptosi": 4, "fptoui": 4, "sitofp": 4, "uitofp": 4,
    "fptrunc": 4, "fdiv": 7, "udiv": 12, "urem": 16, "sdiv": 12, "srem": 16, "lshr by register": 8,
    "load threadgroup": 6, "load thread": 6, "store threadgroup": 6, "store thread": 6, "simd": 2,
}  # fmt: skip
SIZES = {"float": 4, "half": 2, "bfloat": 2, "i1": 1, "i8": 1, "i16": 2, "i32": 4, "i64": 8, "ptr": 8}
TYPE = r"(?:<(\d+) x (\w+)>|(\w+))"


@dataclass
class Cost:
    """Of one block, or of a launch."""

    slots: float = 0
    cycles: float = 0
    loaded: float = 0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.slots + other.slots, self.cycles + other.cycles, self.loaded + other.loaded)

    def __mul__(self, factor: float) -> "Cost":
        return Cost(self.slots * factor, self.cycles * factor, self.loaded * factor)


def cost(line: str, memory: dict[str, str]) -> Cost:
    """The cost of one instruction. memory: what pointers point to; grows by those that are made here."""
    match = re.match(r"  (?:(%\S+) = )?(?:(?:tail|musttail|notail) )?([a-z]+)\b(.*)", line)
    if not match:
        return Cost()
    result, name, rest = match.groups()
    if name in ("getelementptr", "phi", "select", "alloca", "bitcast") and result:
        sources = [source for source in re.findall(r"[@%][\w.\-]+", rest) if source in memory]
        if name == "alloca" or sources:
            memory[result] = "thread" if name == "alloca" else memory[sources[0]]
    if name == "alloca":
        return Cost()
    lanes, loaded = 1, 0
    if name == "call":
        callee = re.search(r"@([\w.$]+)\(", rest)
        called = callee[1] if callee else "?"
        intrinsic = re.match(r"llvm\.([a-z]+)", called)
        name = intrinsic[1] if intrinsic else "simd"
    elif name == "br":
        name = "branch" if rest.startswith(" i1") else "br"
    elif name in ("load", "store"):
        pointer = re.search(r"ptr ([@%][\w.\-]+)", rest)
        place = memory.get(pointer[1], "device") if pointer else "device"
        width = re.match(rf" (?:volatile )?{TYPE}", rest)
        size = int(width[1] or 1) * SIZES[width[2] or width[3]]
        if name == "load" and place == "device":
            loaded = size
        name = name if place == "device" else f"{name} {place}"
    elif name == "fpext" and " half " in rest:
        name = "fpext half"
    elif name == "lshr" and not re.search(r", \d+", rest):
        name = "lshr by register"
    else:
        vector = re.match(rf"(?: [a-z]+)* {TYPE}", rest)
        lanes = int(vector[1]) if vector and vector[1] else 1
    if name in FREE:
        return Cost()
    return Cost(lanes, lanes * CYCLES.get(name, 1), loaded)


def instrument(text: str) -> tuple[str, list[Cost]]:
    """The text of a module whose blocks count their runs in @counts, and what each costs."""
    lines: list[str] = []
    costs: list[Cost] = []
    shared = dict.fromkeys(re.findall(r"^(@_ZZ\S+) =", text, re.MULTILINE), "threadgroup")
    memory: dict[str, str] = {}
    inside = fresh = False
    for line in text.splitlines():
        if line.startswith("define"):
            inside, memory = True, dict(shared)
        if inside and (line.startswith("define") or re.match(r"[\w.\-]+:", line)) and line != "entry:":
            fresh = True
            costs.append(Cost())
        elif inside and fresh and line.startswith("  ") and " phi " not in line:
            fresh = False
            n = len(costs) - 1
            at = f"getelementptr inbounds ([{MOST_BLOCKS} x i64], ptr @counts, i64 0, i64 {n})"
            lines += [f"  %old.{n} = load i64, ptr {at}", f"  %new.{n} = add i64 %old.{n}, 1"]
            lines += [f"  store i64 %new.{n}, ptr {at}"]
        if inside and line.startswith("  "):
            costs[-1] += cost(line, memory)
        inside = inside and line != "}"
        lines.append(line)
    assert len(costs) <= MOST_BLOCKS
    return "\n".join([*lines, f"@counts = global [{MOST_BLOCKS} x i64] zeroinitializer"]) + "\n", costs


class Counted(library.Library):
    """A compiled variant that counts what it runs."""

    def __init__(self, variant: Any):
        library._runtime()  # its symbols must be there first
        with tempfile.TemporaryDirectory() as folder:
            self.path = Path(folder) / "kernel.so"
            self.costs = _compile(lowering.executable(variant), self.path)
            loaded = ctypes.CDLL(str(self.path))
        self._counts = (ctypes.c_int64 * len(self.costs)).in_dll(loaded, "counts")
        self._module = library.Module.in_dll(loaded, "msl_module")
        self.threadgroup_bytes = 0

    def run(self, launch: Any) -> list:
        ctypes.memset(self._counts, 0, ctypes.sizeof(self._counts))
        faults = super().run(launch)
        CountingKernel.last = sum((c * n for c, n in zip(self.costs, self._counts, strict=True)), Cost())
        return faults


def _compile(text: str, path: Path) -> list[Cost]:
    source, middle, optimised, object_file = (path.with_suffix(end) for end in (".clcpp", ".ll", ".opt.ll", ".o"))
    source.write_text(text)
    options = ["-ffp-contract=on", "-relaxed-aliasing", "-pic-level", "2", "-mrelocation-model", "pic"]
    front_end = toolchain.front_end(generic_address_space=True)
    _run([*front_end, "-O2", *options, "-disable-llvm-passes", "-emit-llvm", str(source), "-o", str(middle)])
    middle.write_text(library._change(middle.read_text(), False))
    from_text = ["-x", "ir", *toolchain.target(), *options]
    _run([*from_text, "-O2", "-emit-llvm", str(middle), "-o", str(optimised)])
    counting, costs = instrument(optimised.read_text())
    middle.write_text(counting)
    _run([*from_text, "-O1", "-emit-obj", str(middle), "-o", str(object_file)])
    toolchain.link(object_file, path)
    return costs


def _run(arguments: list[str]) -> None:
    done = toolchain.compile(arguments)
    if done.returncode:
        raise SystemExit(done.stderr)


class CountingKernel(Kernel):
    """mx.fast.metal_kernel whose calls leave their cost in `last`."""

    last = Cost()

    def __call__(self, **arguments: Any) -> list[Any]:
        return super().__call__(**{**arguments, "check": False})

    def _compiled(self, variant: Any, check: bool) -> Counted:
        return Counted(variant)


def per_weight(launch: Callable[[int], Any], matrices: int = 1) -> dict[str, float]:
    """What a weight costs. launch: runs ``matrices`` matrices of ROWS rows and that many columns."""
    totals = []
    for columns in (NARROW, WIDE):
        launch(columns)
        totals.append(CountingKernel.last)
    difference = (totals[1] + totals[0] * -1) * (1 / (matrices * ROWS * (WIDE - NARROW)))
    return {name: round(value, 2) for name, value in asdict(difference).items()}


def tq_rows(all_codes: Sequence[Codes], dtype: mx.Dtype, tokens: Sequence[int], table: bool = False) -> Iterator[dict]:
    """The kernel of tq/metal/matvec.py, with the form that it chooses, or from tables."""
    decoding = partial(fit.decoding, half_error=-1.0) if table else fit.decoding
    matvec.decoding = decoding
    rng = np.random.default_rng(0)
    for codes in all_codes:
        for rows in tokens:
            stored = [0.0]

            def launch(columns: int, rows=rows, codes=codes, stored=stored) -> None:
                matrix = random_matrix(rng, codes, (ROWS, columns))
                stored[0] = matrix.size_bytes / (ROWS * columns)
                matvec.matvec(random_rows(rng, (rows, columns), dtype)[0], *matrix.stored)

            costs = per_weight(launch)
            how = decoding(mx.array(codes.codebook).astype(mx.float16), codes.bits, dtype)
            yield {
                "kernel": "tq matvec",
                "codes": codes.label,
                "rows_of_x": rows,
                "levels": name_of(how.form),
                "levels_error": float(f"{how.error:.2g}"),
                **costs,
                "stored": round(stored[0], 4),
                "stored_by_exact": round(stored[0] / exact_bytes(codes.bits), 3),
            }
    matvec.decoding = fit.decoding


def expert_rows(all_codes: Sequence[Codes], dtype: mx.Dtype) -> Iterator[dict]:
    """The kernels of experts that one token chose: one matrix of each, and gate and up with their activation."""
    for codes in all_codes:
        for kernel, matrices in (("gather_matvec", 4), ("gate_up", 8)):

            def launch(columns: int, codes=codes, kernel=kernel) -> None:
                layer = Layer(codes, dtype, (4, ROWS, columns), (2, 0, 3, 1), pairs_per_x=4)
                variant = next(v for v in expert_variants(layer) if v.kernel == kernel)
                variant.prepare(np.random.default_rng(0)).launch()

            how = fit.decoding(mx.array(codes.codebook).astype(mx.float16), codes.bits, dtype)
            yield {
                "kernel": f"tq {kernel}",
                "codes": codes.label,
                "rows_of_x": 1,
                "levels": name_of(how.form),
                "levels_error": float(f"{how.error:.2g}"),
                **per_weight(launch, matrices),
            }


def peer_rows(folder: str, dtype: mx.Dtype) -> Iterator[dict]:
    """The one-row kernel of turboquant_mlx_full: floor(32 / bits) codes in a word."""
    sys.path.insert(0, folder)
    kernel = importlib.import_module("turboquant_mlx.kernels.polar_qmv")
    rng = np.random.default_rng(0)
    for bits in (2, 3, 4):
        words_per_group = -(-GROUP // (32 // bits))

        def launch(columns: int, bits=bits, words_per_group=words_per_group) -> None:
            groups = columns // GROUP
            words = mx.array(rng.integers(0, 2**32, (ROWS, groups * words_per_group), np.uint32))
            scales = mx.ones((ROWS, groups), dtype=mx.float16)
            codebook = mx.array(stored_codebook("lloyd-max", bits)).astype(mx.float16)
            kernel.polar_qmv(words, scales, codebook, random_rows(rng, (columns,), dtype)[0], bits, GROUP)

        stored = (4 * words_per_group + 2) / GROUP
        yield {
            "kernel": "turboquant_mlx_full 0.30.0 polar_qmv",
            "codes": f"{bits} bits, groups of {GROUP}",
            "rows_of_x": 1,
            "levels": "table in thread memory",
            "levels_error": 0.0,
            **per_weight(launch),
            "stored": round(stored, 4),
            "stored_by_exact": round(stored / exact_bytes(bits), 3),
        }


def name_of(form: int) -> str:
    if form == fit.FROM_TABLE:
        return "table"
    return "quartic" if form >= fit.QUARTIC else f"polynomial of degree {2 * form + 1}"


def exact_bytes(bits: int) -> float:
    """Of a weight with its share of a scale, if codes took exactly their bits."""
    return (bits or np.log2(3)) / 8 + 2 / GROUP


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", metavar="FOLDER", help="where turboquant_mlx_full 0.30.0 is installed")
    arguments = parser.parse_args()
    mx.fast.metal_kernel = CountingKernel
    all_codes = [Codes(bits, GROUP, stored_codebook("lloyd-max" if bits else "ternary", bits)) for bits in BITS]
    v = (np.arange(16) - 7.5) / 8 * 13 / 16
    quartic = Codes(4, GROUP, 2.48 * (v + np.abs(v) ** 3 * v))
    rows = [
        *tq_rows(all_codes, mx.float16, (1, 4, 8)),
        *tq_rows([quartic], mx.float16, (1,)),
        *tq_rows(all_codes, mx.float16, (1,), table=True),
        *expert_rows([codes for codes in all_codes if codes.bits in (0, 3, 4)], mx.float16),
    ]
    if arguments.peer:
        rows += peer_rows(arguments.peer, mx.float16)
    for row in rows:
        print(*row.values(), sep=" | ")
    common.write("metal_budget", {"shape": [ROWS, WIDE], "activations": "float16", "rows": rows})


if __name__ == "__main__":
    main()
