"""Random matrices in the memory order of kernels/layout.h, and what their products are in float64."""

import ctypes

import numpy as np

from tq.cpu import library

TILE_ROWS, BLOCK_COLUMNS = 16, 64
# Where a plane of some bits keeps step s of a block: 8 / bits steps share each vector of 64 bytes.
PLANES = {1: (1,), 2: (2,), 4: (4,), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1), 8: (8,)}


def pack_codes(codes: np.ndarray, bits: int) -> np.ndarray:
    """Bytes of a matrix of codes (rows, columns), written down from the description in layout.h."""
    rows, columns = codes.shape
    tiles, blocks = -(-rows // TILE_ROWS), -(-columns // BLOCK_COLUMNS)
    padded = np.zeros((tiles * TILE_ROWS, blocks * BLOCK_COLUMNS), np.uint32)
    padded[:rows, :columns] = codes
    # [tile][block][step][lane]
    steps = padded.reshape(tiles, TILE_ROWS, blocks, 16, 4).transpose(0, 2, 3, 1, 4).reshape(tiles, blocks, 16, 64)
    if bits == 3:
        packed = np.zeros((tiles, blocks, 2, 3, 64), np.uint32)
        for half in range(2):
            for u in range(6):
                packed[:, :, half, u // 2] |= steps[:, :, 8 * half + u] << 3 * (u % 2)
            both = steps[:, :, 8 * half + 6] | steps[:, :, 8 * half + 7] << 3
            for vector in range(3):
                packed[:, :, half, vector] |= (both >> 2 * vector & 3) << 6
        return packed.astype(np.uint8).reshape(tiles, blocks, -1)
    planes, low = [], 0
    for width in PLANES[bits]:
        per_byte = 8 // width
        plane = np.zeros((tiles, blocks, 16 // per_byte, 64), np.uint32)
        for step in range(16):
            plane[:, :, step // per_byte] |= (steps[:, :, step] >> low & ((1 << width) - 1)) << width * (
                step % per_byte
            )
        planes.append(plane.astype(np.uint8).reshape(tiles, blocks, -1))
        low += width
    return np.concatenate(planes, axis=2)


class PackedMatrix:
    """Experts of random codes, scales and, if asked for, biases; `dense` is (experts, rows, columns) in float64.

    A codebook has values of a normal distribution; an affine code stands for itself.
    """

    def __init__(
        self,
        rows: int,
        columns: int,
        bits: int,
        *,
        group: int = 0,
        affine: bool = False,
        low: bool = False,
        bias: bool = False,
        experts: int = 1,
        seed: int = 0,
    ):
        random = np.random.default_rng(seed)
        self.rows, self.columns, self.bits, self.group, self.experts = rows, columns, bits, group, experts
        n = 1 << bits
        self.codes = random.integers(0, n, (experts, rows, columns), dtype=np.uint32)
        self.packed = np.concatenate([pack_codes(expert, bits) for expert in self.codes])
        self.table, self.table_low = np.full(256, 77, np.uint8), None
        if affine:
            self.table[:n], self.table_scale, self.offset = np.arange(n), 1.0, 0
            self.values = np.arange(n, dtype=np.float32)
        else:
            self.values = np.sort(random.standard_normal(n)).astype(np.float32)
            self.table_scale, self.offset = float(np.float32(np.abs(self.values).max() / 127)), 128
            exact = self.values / self.table_scale
            self.table[:n] = np.rint(exact) + 128
            if low:
                self.table_low = np.full(256, 77, np.uint8)
                self.table_low[:n] = np.clip(np.rint((exact - np.rint(exact)) * 256), -128, 127) + 128
        tiles, groups = -(-rows // TILE_ROWS), -(-columns // group) if group else 1
        self.scales = self._per_row(random.uniform(0.5, 2, (experts, tiles, groups, TILE_ROWS)))
        self.biases = self._per_row(random.normal(0, n / 4, self.scales.shape)) if affine else None
        self.bias = random.standard_normal((experts, rows)).astype(np.float32) if bias else None

        scale = self._spread(self.scales)
        shift = 0 if self.biases is None else self._spread(self.biases)
        self.dense = self.values[self.codes].astype(np.float64) * scale + shift
        table = self.table[: 1 << bits].astype(np.float64) - self.offset
        if self.table_low is not None:
            table += (self.table_low[: 1 << bits].astype(np.float64) - 128) / 256
        self.dense_bytes = self.table_scale * table[self.codes] * scale + shift

    def _per_row(self, values: np.ndarray) -> np.ndarray:
        """Float16, 0 for the rows that fill up the last tile."""
        values = values.astype(np.float16)
        values[:, -1, :, (self.rows - 1) % TILE_ROWS + 1 :] = 0
        return values

    def _spread(self, per_group: np.ndarray) -> np.ndarray:
        """(experts, tiles, groups, 16) to (experts, rows, columns)."""
        by_row = per_group.astype(np.float64).transpose(0, 1, 3, 2).reshape(self.experts, -1, per_group.shape[2])
        return np.repeat(by_row, self.group or self.columns, axis=2)[:, : self.rows, : self.columns]

    @property
    def matrix(self) -> library.Matrix:
        """The C structure; valid as long as this object."""

        def address(array: np.ndarray | None) -> int | None:
            return None if array is None else array.ctypes.data

        return library.Matrix(
            codes=address(self.packed),
            scales=address(self.scales),
            biases=address(self.biases),
            table=address(self.table),
            table_low=address(self.table_low),
            values=address(self.values),
            bias=address(self.bias),
            table_scale=self.table_scale,
            offset=self.offset,
            rows=self.rows,
            columns=self.columns,
            experts=self.experts,
            bits=self.bits,
            group=self.group,
        )


def quantized(x: np.ndarray) -> np.ndarray:
    """Rows of activations as the kernels see them: int8 with one scale per 64 columns, back in float64."""
    rows, columns = x.shape
    padded = np.zeros((rows, -(-columns // BLOCK_COLUMNS) * BLOCK_COLUMNS), np.float32)
    padded[:, :columns] = x
    blocks = padded.reshape(rows, padded.shape[1] // BLOCK_COLUMNS, BLOCK_COLUMNS)
    most = np.abs(blocks).max(axis=2, keepdims=True)
    with np.errstate(all="ignore"):
        inverse = np.float32(127) / most
        codes = np.where(np.isfinite(inverse), np.rint(blocks * inverse), 0)
    return (codes.astype(np.float64) * (most / np.float32(127))).reshape(padded.shape)[:, :columns]


def operate(operation, params: ctypes.Structure, inputs: list[np.ndarray], output_shape: tuple[int, ...]) -> np.ndarray:
    """Calls an operation of the library with NumPy arrays; its float32 output was full of NaN before."""
    output = np.full(output_shape, np.nan, np.float32)
    dtypes = {"float32": 0, "float16": 1, "uint32": 2, "int32": 3, "uint8": 4, "bool": 5}

    def arrays(of: list[np.ndarray]) -> ctypes.Array:
        described = []
        for array in of:
            shape = (ctypes.c_int32 * array.ndim)(*array.shape)
            strides = (ctypes.c_int64 * array.ndim)(*(step // array.itemsize for step in array.strides))
            described.append(library.Array(array.ctypes.data, shape, strides, array.ndim, dtypes[str(array.dtype)]))
        return (library.Array * len(of))(*described)

    operation(ctypes.byref(params), arrays(inputs), arrays([output]))
    return output


def relative_error(result: np.ndarray, expected: np.ndarray) -> float:
    """Root of the mean square of the difference, relative to that of what was expected; 0 for nothing at all."""
    return float(np.linalg.norm(result - expected) / np.linalg.norm(expected)) if expected.size else 0.0
