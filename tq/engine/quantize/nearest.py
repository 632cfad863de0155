"""Nearest level of a codebook, by table. Encoding spends its time here."""

import numpy as np

CELLS = 8192


class NearestLevel:
    """Maps values to the code of the nearest level of an ascending codebook, exactly.

    The range of the boundaries is cut into cells so small that each holds at most one boundary; the cell gives the
    code below that boundary, one comparison decides. Cost does not depend on the number of levels.

    Args:
        codebook: float32 (n_levels,), ascending, 2 to 256 levels.
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

    def _cell(self, values: np.ndarray) -> np.ndarray:
        cell = values * self._cells_per_unit
        cell += self._offset
        # fmax and fmin send NaN to a valid cell: a NaN weight must not read outside the table.
        np.fmax(cell, 0, out=cell)
        np.fmin(cell, CELLS - 1, out=cell)
        return cell.astype(np.int32)

    def codes(self, values: np.ndarray) -> np.ndarray:
        """Codes (uint8) of float32 ``values`` of any shape. NaN gives some valid code."""
        codes = self._below.take(self._cell(values))
        codes += values > self._boundary.take(codes)
        return codes

    def rough_levels(self, values: np.ndarray) -> np.ndarray:
        """The nearest levels, except within 1/8192 of the range beside a boundary: enough to rank scales."""
        return self._level_of_cell.take(self._cell(values))
