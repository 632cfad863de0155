"""The scale of a group that minimises the error of the codes chosen with it. Never just the RMS.

For fixed codes with levels q the best scale is <x, q> / <q, q>, and the error left is |x|^2 - <x, q>^2 / <q, q>. Codes
and scale depend on each other, with many local minima, so a grid of start scales is tried, each with its least-squares
scale, and the best is refined. The grid lies around the RMS and, where there are levels enough, reaches up to the scale
at which the highest level meets the largest value: the best scale of a group with outliers lies on the way there.

On N(0,1) in groups of 64 this leaves .1105, .0291 and .0068 at 2, 3 and 4 bits, where one least-squares loop from the
RMS leaves .1116, .0307 and .0081, and the RMS .1147, .0334, .0092 (benchmarks/distortion.json).
"""

import ctypes
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from tq import settings
from tq.cpu import library
from tq.engine.quantize.nearest import NearestLevel

# Start scales in RMS, by number of levels. One bit has one minimum; trits and two bits have few, and clip outliers.
NARROW_GRID = np.linspace(0.85, 1.15, 5, dtype=np.float32)
FEW_LEVELS = {2: np.ones(1, np.float32), 3: NARROW_GRID, 4: NARROW_GRID}
LOWEST, HIGHEST, N_STARTS = 0.65, 1.1, 12  # of the grid for more levels
# Values worked on at a time. NumPy's loops must be long enough to run in parallel: between them the interpreter's lock
# passes from thread to thread. At 2^15 two threads are no faster than one, at 2^18 nearly twice as fast.
BLOCK = 1 << 18


def n_threads() -> int:
    """Threads for encoding: ``TQ_THREADS``, or the CPUs that this process may use."""
    if asked := settings.threads():
        return asked
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def row_blocks(n_rows: int, row_length: int) -> Iterator[slice]:
    """Slices of rows that hold about BLOCK values each."""
    step = max(1, BLOCK // row_length)
    for start in range(0, n_rows, step):
        yield slice(start, min(start + step, n_rows))


def for_each_block(work: Callable[[slice], None], n_rows: int, row_length: int) -> None:
    """Run ``work`` on every block of rows, on all threads (NumPy releases the interpreter's lock)."""
    blocks = list(row_blocks(n_rows, row_length))
    if len(blocks) == 1:
        return work(blocks[0])
    with ThreadPoolExecutor(n_threads()) as pool:
        list(pool.map(work, blocks))


def best_scales(groups: np.ndarray, nearest: NearestLevel) -> tuple[np.ndarray, np.ndarray]:
    """Search scales and codes of groups that share one scale each.

    Args:
        groups: float32 (n_groups, group_size), within the range of float16.
        nearest: The codebook.

    Returns:
        scales: float32 (n_groups,), each exact in float16, 0 for a group of zeros.
        codes: uint8 (n_groups, group_size), nearest for those scales.
    """
    scales = np.empty(len(groups), np.float32)
    codes = np.empty(groups.shape, np.uint8)
    if library.state().active:
        _compiled(np.ascontiguousarray(groups), nearest, scales, codes)
        return scales, codes

    def work(rows: slice) -> None:
        x = groups[rows]
        scales[rows] = _search(x, nearest).astype(np.float16)
        codes[rows] = nearest.codes(x * inverse(scales[rows])[:, None])

    for_each_block(work, *groups.shape)
    return scales, codes


def _compiled(groups: np.ndarray, nearest: NearestLevel, scales: np.ndarray, codes: np.ndarray) -> None:
    """The same by tq/cpu/kernels/encode.cpp, which is 4 to 15 times as fast and differs in the order of sums only."""
    few = FEW_LEVELS.get(len(nearest.levels))
    search = library.ScaleSearch(
        nearest=nearest.compiled,
        lowest=LOWEST if few is None else few[0],
        highest=HIGHEST if few is None else few[-1],
        to_largest=few is None,
        n_starts=N_STARTS if few is None else len(few),
        size=groups.shape[1],
        n_groups=len(groups),
    )
    library.library().tq_best_scales(ctypes.byref(search), groups.ctypes, scales.ctypes, codes.ctypes)


def _start_scales(x: np.ndarray, rms: np.ndarray, levels: np.ndarray) -> Iterator[np.ndarray]:
    if len(levels) in FEW_LEVELS:
        yield from (rms * factor for factor in FEW_LEVELS[len(levels)])
        return
    low, high = LOWEST * rms, np.maximum(HIGHEST * rms, np.abs(x).max(axis=1) / levels[-1])
    yield from (low + (high - low) * share for share in np.linspace(0, 1, N_STARTS, dtype=np.float32))


def _search(x: np.ndarray, nearest: NearestLevel) -> np.ndarray:
    rms = np.sqrt(np.einsum("ij,ij->i", x, x) / x.shape[1])
    best, best_gain = rms.copy(), np.zeros_like(rms)

    levels, cell = np.empty_like(x), np.empty(x.shape, np.int32)

    def try_scale(scale: np.ndarray) -> None:
        q = nearest.rough_levels(x, inverse(scale), levels, cell)
        xq, qq = np.einsum("ij,ij->i", x, q), np.einsum("ij,ij->i", q, q)
        fitted = xq / np.maximum(qq, np.float32(1e-30))
        gain = fitted * xq
        better = gain > best_gain
        np.copyto(best, fitted, where=better)
        np.copyto(best_gain, gain, where=better)

    for start in _start_scales(x, rms, nearest.levels):
        try_scale(start)
    try_scale(best.copy())
    # Levels are antisymmetric, so a scale is positive; float16 ends at 65504.
    return np.minimum(best, np.float32(65504))


def inverse(scale: np.ndarray) -> np.ndarray:
    """1/scale, and 0 for a scale of 0 (a group of zeros) or one whose inverse float32 cannot hold."""
    return np.divide(1, scale, out=np.zeros_like(scale), where=scale >= np.finfo(np.float32).tiny)
