// Where the code of a weight lies in memory: the one place that knows.
//
// A matrix is cut into tiles of 16 rows; a tile is a run of blocks of 16 rows by 64 columns, in column order. Rows and
// columns are padded with code 0 (scales and activations there are 0). In a block, lane l = 4 * (row % 16) + column % 4
// is one byte of a 64-byte vector, and step s = (column % 64) / 4 counts the 16 vectors that a dot product of four
// columns at a time consumes. Widths 1, 5, 6 and 7 are sums of planes of 4, 2 and 1 bits, low bits in the first plane.
//   8 bits, 1024 bytes: byte 64 s + l.
//   4 bits, 512 bytes: byte 64 (s / 2) + l, bits 4 (s % 2) and up.
//   2 bits, 256 bytes: byte 64 (s / 4) + l, bits 2 (s % 4) and up.
//   1 bit, 128 bytes: byte 64 (s / 8) + l, bit s % 8.
//   3 bits, 384 bytes = 2 halves of vectors A, B, C; u = s % 8. u < 6: vector u / 2, bits 3 (u % 2) and up. Codes 6 and
//     7 fill the top two bits of A, B, C: c6 | c7 << 3 has its bits 0-1 in A, 2-3 in B, 4-5 in C.
//   5, 6, 7 bits: the 4-bit plane, then the 2-bit plane (6, 7), then the 1-bit plane (5, 7).
// In a cache, keys are such a matrix with tokens as rows; values one with tokens as columns.
#pragma once
#include <stdint.h>

namespace tq {

constexpr int TILE_ROWS = 16, BLOCK_COLUMNS = 64, LANES = 64, STEPS = 16;

constexpr int tiles(int rows) { return (rows + TILE_ROWS - 1) / TILE_ROWS; }
constexpr int blocks(int columns) { return (columns + BLOCK_COLUMNS - 1) / BLOCK_COLUMNS; }
constexpr int block_bytes(int bits) { return 128 * bits; }
constexpr int64_t tile_bytes(int columns, int bits) { return int64_t(blocks(columns)) * block_bytes(bits); }

}  // namespace tq
