"""Packed matrices times one vector on the CPU: the share of the measured read bandwidth that the kernels reach.

    python benchmarks/cpu_matvec.py

Matrices take turns until they have filled 512 MB, so that every one comes from memory. The codes are random, as are
the scales; reading all weights once is the least a product can take.
"""

import argparse
import ctypes
import json
import statistics
import time
from ctypes import byref, c_int32, c_int64
from dataclasses import dataclass

import numpy as np
from common import write

from tq.cpu import library
from tq.cpu.library import Array, MatmulParams, Matrix

SHAPES = ((4096, 4096), (2048, 8192))  # rows, columns
BITS, GROUPS = (2, 3, 4), (0, 64)
WORKING_SET = 512_000_000
TILE_ROWS = 16
OFFSET, TABLE_SCALE = 128, 1 / 64  # value = scale * (byte - offset)
TARGETS = {4: 0.75, 3: 0.65}
LARGEST_ERROR = 0.01
F32 = 0  # tq_dtype


def random_bytes(generator: np.random.Generator, size: int) -> np.ndarray:
    """At a multiple of 64, as the kernels want it."""
    memory = np.empty(size + 64, np.uint8)
    start = -memory.ctypes.data % 64
    memory[start : start + size] = generator.integers(0, 256, size, np.uint8)
    return memory[start : start + size]


def array(values: np.ndarray) -> Array:
    shape, strides = (c_int32 * values.ndim)(*values.shape), [s // values.itemsize for s in values.strides]
    return Array(values.ctypes.data, shape, (c_int64 * values.ndim)(*strides), values.ndim, F32)


@dataclass
class Product:
    """A matrix with its own memory, and the vectors."""

    kept: list
    out: np.ndarray
    params: MatmulParams
    x: Array
    y: Array

    def run(self, kernels: ctypes.CDLL) -> None:
        kernels.tq_matmul(byref(self.params), byref(self.x), byref(self.y))


def products(kernels: ctypes.CDLL, rows: int, columns: int, bits: int, group: int) -> tuple[list[Product], int]:
    """As many as fill the working set, and the bytes of one."""
    generator = np.random.default_rng(0)
    codes_bytes = kernels.tq_codes_bytes(rows, columns, bits)
    groups = columns // group if group else 1
    size = codes_bytes + 2 * groups * rows
    table = np.zeros(256, np.uint8)
    table[: 2**bits] = np.linspace(1, 255, 2**bits)
    values = (table[: 2**bits].astype(np.float32) - OFFSET) * TABLE_SCALE
    x, y = generator.normal(size=(1, columns)).astype(np.float32), np.empty((1, rows), np.float32)
    made = []
    for _ in range(-(-WORKING_SET // size)):
        codes = random_bytes(generator, codes_bytes)
        scales = generator.uniform(0.5, 1, (rows // TILE_ROWS, groups, TILE_ROWS)).astype(np.float16)
        matrix = Matrix(
            codes=codes.ctypes.data,
            scales=scales.ctypes.data,
            table=table.ctypes.data,
            values=values.ctypes.data,
            table_scale=TABLE_SCALE,
            offset=OFFSET,
            rows=rows,
            columns=columns,
            experts=1,
            bits=bits,
            group=group,
        )
        made.append(Product([codes, scales, table, values, x], y, MatmulParams(matrix, 0), array(x), array(y)))
    return made, size


def error_of(product: Product, kernels: ctypes.CDLL) -> float:
    """RMS error of 8-bit activations, relative to the product with float32 ones."""
    results = []
    for exact in (1, 0):
        product.params.exact = exact
        product.out[:] = np.nan
        product.run(kernels)
        results.append(product.out.copy())
    return float(np.linalg.norm(results[1] - results[0]) / np.linalg.norm(results[0]))


def measure(
    kernels: ctypes.CDLL, rows: int, columns: int, bits: int, group: int, passes: int
) -> tuple[dict, list[float]]:
    """GB/s of weights, and bytes per second of plain reading measured in between."""
    made, size = products(kernels, rows, columns, bits, group)
    error = error_of(made[0], kernels)
    if not error <= LARGEST_ERROR:
        raise SystemExit(f"{rows} x {columns}, {bits} bits: the relative error is {error}")
    rates, reads = [], []
    for _ in range(passes):
        reads.append(kernels.tq_read_bandwidth(WORKING_SET))
        started = time.perf_counter()
        for product in made:
            product.run(kernels)
        rates.append(len(made) * size / (time.perf_counter() - started))
    row = {"shape": f"{rows} x {columns}", "bits": bits, "group": group or "row", "error": round(error, 5)}
    return {**row, "gb_s": {"best": max(rates) / 1e9, "median": statistics.median(rates) / 1e9}}, reads


def share(row: dict, read_gb_s: dict) -> dict:
    """A row with its share of the bandwidth, to three digits."""
    shares = {key: round(row["gb_s"][key] / read_gb_s[key], 3) for key in read_gb_s}
    rates = {key: round(value, 2) for key, value in row["gb_s"].items()}
    return {**row, "gb_s": rates, "share": shares, "target": TARGETS.get(row["bits"])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two passes each; nothing is written")
    options = parser.parse_args()
    kernels = library.library()
    found, reads = [], []
    for rows, columns in SHAPES:
        for bits in BITS:
            for group in GROUPS:
                row, read = measure(kernels, rows, columns, bits, group, 2 if options.quick else 40)
                found.append(row)
                reads += read
                print(f"{row['shape']}, {bits} bits, group {row['group']}: {row['gb_s']['best']:.1f} GB/s")
    read_gb_s = {"best": max(reads) / 1e9, "median": statistics.median(reads) / 1e9}
    found = [share(row, read_gb_s) for row in found]
    print(json.dumps(found, indent=1))
    if not options.quick:
        about = {"kernels": library.state().reason, "working_set_bytes": WORKING_SET, "read_gb_s": read_gb_s}
        write("cpu_matvec", {**about, "rows": found})


if __name__ == "__main__":
    main()
