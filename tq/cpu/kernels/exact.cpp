// Products in float32: activations and codebook as they are. For comparison with the reference; not made for speed.
#include <algorithm>

#include "activations.h"
#include "decode.h"
#include "product.h"
#include "simd.h"
#include "tile.h"

namespace tq {
namespace {

// The weights of a block as floats, [column][16]: value * scale (+ bias). `codes` is a decoded block.
void to_weights(const tq_matrix &m, const Tile &tile, int block, const uint8_t *codes, float *weights) {
  for (int half = 0; half < 2; half++) {
    const int64_t group = tile.scaling == Scaling::HALF ? tile.half_group(block, half) : block >> tile.group_shift;
    const Floats scale = load_half(tile.scales + group * TILE_ROWS);
    const Floats bias = tile.biases ? load_half(tile.biases + group * TILE_ROWS) : splat(0);
    for (int step = 0; step < STEPS / 2; step++, codes += LANES) {
      const Bytes four = load_bytes(codes);
      unrolled<4>([&](auto c) TQ_INLINE_LAMBDA {
        const Ints code = column<c>(four);
        store(weights, fma(tile.biases ? to_floats(code) * splat(m.table_scale) : gather(m.values, code), scale, bias));
        weights += TILE_ROWS;
      });
    }
  }
}

// sums [row][16] += the products of a block of float weights with columns of the rows x[row].
template <int WIDTH>
void multiply_block(const float *weights, const float *const *x, int64_t first_column, int columns, float *sums) {
  Floats total[WIDTH];
  for (int r = 0; r < WIDTH; r++) total[r] = splat(0);
  for (int c = 0; c < columns; c++, weights += TILE_ROWS) {
    const Floats w = load(weights);
    for (int r = 0; r < WIDTH; r++) total[r] = fma(w, splat(x[r][first_column + c]), total[r]);
  }
  for (int r = 0; r < WIDTH; r++) store(sums + 16 * r, load(sums + 16 * r) + total[r]);
}

}  // namespace

void multiply_exact(const Job &job, int first_tile, int last_tile) {
  const tq_matrix &m = *job.matrix;
  const Batch &batch = *job.batch;
  alignas(LANES) uint8_t identity[256];
  for (int i = 0; i < 256; i++) identity[i] = static_cast<uint8_t>(i) ^ SIGN_FLIP;
  constexpr int BLOCK = TILE_ROWS * BLOCK_COLUMNS;
  uint8_t *codes = scratch<uint8_t>(PANEL, BLOCK * (1 + sizeof(float)));
  float *weights = reinterpret_cast<float *>(codes + BLOCK);
  const int64_t n_sums = int64_t(Activations::padded(batch.rows)) * TILE_ROWS;
  float *sums = scratch<float>(ACCUMULATORS, n_sums);
  for (int t = first_tile; t < last_tile; t++) {
    const Tile tile(m, job.expert, t);
    std::fill_n(sums, n_sums, 0.0f);
    for (int b = 0; b < tile.blocks; b++) {
      decode_blocks(m.bits, identity, tile.codes + int64_t(b) * block_bytes(m.bits), 1, codes);
      to_weights(m, tile, b, codes, weights);
      const int columns = std::min(BLOCK_COLUMNS, m.columns - b * BLOCK_COLUMNS);
      for (int row = 0; row < batch.rows; row += MAX_ROWS) {
        const float *x[MAX_ROWS];
        for (int r = 0; r < MAX_ROWS; r++) x[r] = batch.input(std::min(row + r, batch.rows - 1));
        with_width(Activations::width(batch.rows - row), [&]<int WIDTH>() {
          multiply_block<WIDTH>(weights, x, int64_t(b) * BLOCK_COLUMNS, columns, sums + row * TILE_ROWS);
        });
      }
    }
    for (int r = 0; r < batch.rows; r++) finish(job, t, r, load(sums + r * TILE_ROWS));
  }
}

}  // namespace tq
