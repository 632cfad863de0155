"""Nearest level of a codebook, by table. Encoding spends its time here."""

import numpy as np

from tq.cpu import library

CELLS = 8192


class NearestLevel:
    """Maps values to the code of the nearest level of an ascending codebook, exactly.

    The range of the boundaries is cut into cells so small that each holds at most one boundary; the cell gives the
    code below that boundary, one comparison decides. Cost does not depend on the number of levels.

    Args:
        codebook: float32 (n_levels,), ascending, 2 to 256 levels, none closer than a thousandth of their range.
    """

    def __init__(self, codebook: np.ndarray):
        self.levels = np.ascontiguousarray(codebook, dtype=np.float32)
        boundaries = (self.levels[1:] + self.levels[:-1]) / 2
        low, high = float(boundaries[0]), float(boundaries[-1])
        width = max(high - low, 1e-3) / (CELLS - 4)
        self._cells_per_unit = np.float32(1 / width)
        self._offset = np.float32(2 - low / width)
        edges = (np.arange(CELLS) - 2) * width + low
        # Float32 may place a value one cell too high: start one cell lower, the comparison repairs it.
        self._below = np.searchsorted(boundaries, edges - width).astype(np.uint8)
        self._boundary = np.append(boundaries, np.float32(np.inf))
        self._level_of_cell = self.levels[np.searchsorted(boundaries, edges + width / 2)]

    @property
    def compiled(self) -> library.Nearest:
        """The same tables for compiled code; valid as long as this object lives."""
        return library.Nearest(
            levels=self.levels.ctypes.data,
            boundaries=self._boundary.ctypes.data,
            below=self._below.ctypes.data,
            level_of_cell=self._level_of_cell.ctypes.data,
            cells_per_unit=self._cells_per_unit,
            offset=self._offset,
            n_levels=len(self.levels),
            n_cells=CELLS,
        )

    def codes(self, values: np.ndarray) -> np.ndarray:
        """Codes (uint8) of float32 ``values`` of any shape. NaN gives some valid code."""
        cell = values * self._cells_per_unit
        cell += self._offset
        # fmax and fmin send NaN to a valid cell: a NaN weight must not read outside the table.
        np.fmax(cell, 0, out=cell)
        np.fmin(cell, CELLS - 1, out=cell)
        codes = self._below.take(cell.astype(np.int32), mode="clip")
        codes += values > self._boundary.take(codes, mode="clip")
        return codes

    def rough_levels(self, x: np.ndarray, inverse: np.ndarray, out: np.ndarray, cell: np.ndarray) -> np.ndarray:
        """The levels nearest to ``x * inverse``, except within 1/8192 of the range beside a boundary.

        Enough to rank scales, and the inner loop of ranking them: it allocates nothing and clips in the look-up only,
        so ``x * inverse`` must stay below 10^5.

        Args:
            x: float32 (groups, group_size).
            inverse: float32 (groups,), one over the scale.
            out: float32, as ``x``: receives the levels.
            cell: int32, as ``x``: work space.
        """
        np.multiply(x, (inverse * self._cells_per_unit)[:, None], out=out)
        np.add(out, self._offset, out=out)
        np.copyto(cell, out, casting="unsafe")
        return self._level_of_cell.take(cell, out=out, mode="clip")
