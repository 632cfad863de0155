// Rows of a packed matrix as floats: the vectors of tokens.
#include <string.h>

#include <algorithm>

#include "internal.h"
#include "kv_half.h"
#include "tile.h"

namespace tq {
namespace {

constexpr int64_t SERIAL = 1 << 13;  // floats that are not worth a second thread

// A row's four codes of each step, one in each byte.
struct RowCodes {
  uint32_t steps[STEPS];

  RowCodes(const uint8_t *block, int row, int bits) : steps{} {
    const uint8_t *lane = block + 4 * row;
    if (bits == 3) read_3_bits(lane);
    for (int width = 8, low = 0; width > 0; width /= 2) {
      if (bits == 3 || !(bits & width)) continue;
      read_plane(lane, low, width);
      lane += 2 * width * LANES;
      low += width;
    }
  }

 private:
  static uint32_t vector(const uint8_t *lane, int index) {
    uint32_t word;
    memcpy(&word, lane + index * LANES, sizeof word);
    return word;
  }

  void read_plane(const uint8_t *lane, int low, int width) {
    const int shared = 8 / width;
    const uint32_t mask = EACH_BYTE * ((1u << width) - 1);
    for (int s = 0; s < STEPS; s++) steps[s] |= (vector(lane, s / shared) >> s % shared * width & mask) << low;
  }

  void read_3_bits(const uint8_t *lane) {
    for (int s = 0; s < STEPS; s += 8, lane += 3 * LANES) {
      uint32_t top = 0;
      for (int v = 0; v < 3; v++) {
        const uint32_t word = vector(lane, v);
        steps[s + 2 * v] = word & 7 * EACH_BYTE;
        steps[s + 2 * v + 1] = word >> 3 & 7 * EACH_BYTE;
        top |= (word >> 6 & 3 * EACH_BYTE) << 2 * v;
      }
      steps[s + 6] = top & 7 * EACH_BYTE;
      steps[s + 7] = top >> 3 & 7 * EACH_BYTE;
    }
  }

  static constexpr uint32_t EACH_BYTE = 0x01010101;
};

void decode_row(const tq_matrix &matrix, int row, float *y) {
  const Tile tile(matrix, 0, row / TILE_ROWS);
  const int lane = row % TILE_ROWS;
  for (int begin = 0; begin < matrix.columns; begin += BLOCK_COLUMNS) {
    const int64_t offset = int64_t(begin / BLOCK_COLUMNS) * block_bytes(matrix.bits);
    const RowCodes codes(tile.codes + offset, lane, matrix.bits);
    uint8_t code[BLOCK_COLUMNS];
    memcpy(code, codes.steps, sizeof code);
    const int count = std::min(BLOCK_COLUMNS, matrix.columns - begin);
    const int shared = matrix.group == 32 ? 32 : BLOCK_COLUMNS;  // columns of a block with one scale
    for (int c = 0; c < count; c += shared) {
      const int at = (matrix.group ? (begin + c) / matrix.group : 0) * TILE_ROWS + lane;
      const float scale = float_of(tile.scales[at]), bias = tile.biases ? float_of(tile.biases[at]) : 0.f;
      for (int i = c; i < std::min(c + shared, count); i++) {
        y[begin + i] = matrix.values[code[i]] * scale + bias;
      }
    }
  }
}

}  // namespace
}  // namespace tq

void tq_embed(const void *params, const tq_array *in, const tq_array *out) {
  using namespace tq;
  const tq_matrix &matrix = static_cast<const tq_embed_params *>(params)->matrix;
  const tq_rotation &rotation = static_cast<const tq_embed_params *>(params)->rotation;
  const auto *ids = static_cast<const int32_t *>(in[0].data);
  auto *y = static_cast<float *>(out[0].data);
  int64_t count = 1;
  for (int axis = 0; axis < in[0].ndim; axis++) count *= in[0].shape[axis];
  const auto rows = [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; i++) {
      float *row = y + i * matrix.columns;
      decode_row(matrix, ids[i], row);
      if (rotation.n > 0) unrotate_row(rotation, row, row);
    }
  };
  if (count * matrix.columns <= SERIAL) return rows(0, count);
  parallel([&](int i, int n) {
    const Share share(count, i, n);
    rows(share.first, share.last);
  });
}
