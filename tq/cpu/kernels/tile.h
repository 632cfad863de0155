// One tile of a packed matrix (16 rows), as products read it and write its part of a row of the result.
#pragma once
#include <stdint.h>

#include <algorithm>

#include "product.h"
#include "simd.h"

namespace tq {

// How often a product is scaled: per row (at the end), per block of 64 columns or more, or per half block.
enum class Scaling { ROW, BLOCK, HALF };

// How far ahead of the block in work codes are brought into the second-level cache: some microseconds of reading, and
// past the page, where hardware prefetchers stop.
constexpr int PREFETCH_BYTES = 8192;

struct Tile {
  const uint8_t *codes;
  const uint16_t *scales;  // [groups][16]
  const uint16_t *biases;  // [groups][16] or NULL
  Scaling scaling;
  int blocks;              // of 64 columns
  int groups;
  int group_shift;         // block >> group_shift is the group of a block

  Tile(const tq_matrix &m, int expert, int tile) {
    const int64_t index = int64_t(expert) * tiles(m.rows) + tile;
    scaling = m.group == 32 ? Scaling::HALF : m.group || m.biases ? Scaling::BLOCK : Scaling::ROW;
    blocks = tq::blocks(m.columns);
    groups = m.group ? (m.columns + m.group - 1) / m.group : 1;
    group_shift = m.group == 64 ? 0 : m.group == 128 ? 1 : 31;
    codes = m.codes + index * tile_bytes(m.columns, m.bits);
    scales = m.scales + index * groups * TILE_ROWS;
    biases = m.biases ? m.biases + index * groups * TILE_ROWS : nullptr;
  }

  // The group of a half block; a second half past the last column has none of its own.
  int half_group(int block, int half) const {
    const int group = 2 * block + half;
    return group < groups ? group : groups - 1;
  }
};

// Row i of the batch times tile `tile`: what is left is the bias of the layer.
inline void finish(const Job &job, int tile, int i, const Floats &product) {
  const tq_matrix &m = *job.matrix;
  const int first = tile * TILE_ROWS, n = std::min(TILE_ROWS, m.rows - first);
  float *y = job.y + job.batch->output(i) * job.y_stride + first;
  const float *bias = m.bias ? m.bias + int64_t(job.expert) * m.rows + first : nullptr;
  if (n == TILE_ROWS) {
    store(y, bias ? product + load(bias) : product);
  } else {
    float values[TILE_ROWS];
    store(values, product);
    for (int r = 0; r < n; r++) y[r] = values[r] + (bias ? bias[r] : 0.0f);
  }
}

}  // namespace tq
