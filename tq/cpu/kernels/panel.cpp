// Several rows of int8 activations with a matrix: the codes of a few tiles are decoded once, to bytes that stay in a
// near cache, and then multiplied by one group of rows after the other, with all sums in registers.
#include <algorithm>

#include "activations.h"
#include "decode.h"
#include "product.h"
#include "simd.h"
#include "tile.h"

namespace tq {
namespace {

constexpr int BLOCK_BYTES = TILE_ROWS * BLOCK_COLUMNS;  // of a decoded block
// Up to this many rows, memory is the limit: tiles are read in one stream, a few blocks at a time.
constexpr int SKINNY_ROWS = 2 * MAX_ROWS;
constexpr int SKINNY_BLOCKS = 8;
// Bytes of a panel for more rows: it should stay in the second-level cache beside the activations.
constexpr int64_t PANEL_BYTES = 128 << 10;

// Decoded tiles, with scales as floats. Strides are in elements from tile to tile.
struct Panel {
  uint8_t *bytes;        // [tile][block][1024]
  float *scales;         // [tile][block][segments][16], with the scale of the table in them; NULL: one scale per row
  float *biases;         // like scales, or NULL
  int64_t byte_stride, scale_stride;
  int offset;            // of the bytes
  int segments;          // of a block, with a scale each: 1 or 2

  Panel from_tile(int tile) const {
    Panel rest = *this;
    rest.bytes += tile * byte_stride;
    if (scales) rest.scales += tile * scale_stride;
    if (biases) rest.biases += tile * scale_stride;
    return rest;
  }
};

// The panel of a matrix, and that of its low bytes if it has them, in the scratch memory of this thread: room for
// `n_tiles` tiles of `n_blocks` blocks.
class Panels {
 public:
  Panels(const tq_matrix &m, int n_tiles, int n_blocks) : matrix_(m), has_low_(m.table_low) {
    // The two differ in their scales.
    const Scaling scaling = Tile(m, 0, 0).scaling;
    const bool scaled = scaling != Scaling::ROW || has_low_;
    const int segments = scaling == Scaling::HALF ? 2 : 1;
    const int64_t bytes = int64_t(n_tiles) * n_blocks * BLOCK_BYTES;
    const int64_t floats = int64_t(n_tiles) * n_blocks * segments * TILE_ROWS;
    const int64_t size = bytes + 2 * floats * int64_t(sizeof(float));
    uint8_t *memory = scratch<uint8_t>(PANEL, size * (1 + has_low_));
    const auto panel = [&](uint8_t *at, bool biases, int offset) {
      float *scales = reinterpret_cast<float *>(at + bytes);
      return Panel{at, scaled ? scales : nullptr, biases ? scales + floats : nullptr, bytes / n_tiles, floats / n_tiles,
                   offset, segments};
    };
    main_ = panel(memory, m.biases, m.offset - BYTE_ZERO);
    if (has_low_) low_ = panel(memory + size, false, 128 - BYTE_ZERO);
  }

  void decode(const Tile &tile, int to_tile, int first_block, int n_blocks) const {
    fill(main_.from_tile(to_tile), matrix_.table, matrix_.table_scale, tile, first_block, n_blocks);
    if (!has_low_) return;
    fill(low_.from_tile(to_tile), matrix_.table_low, matrix_.table_scale / 256, tile, first_block, n_blocks);
  }

  // sums [count][x.width][16] += products of `count` tiles from `tile` on with a group of rows.
  void multiply(int tile, int count, const RowGroup &x, int first_block, int n_blocks, float *sums) const;

  bool scaled() const { return main_.scales; }

 private:
  void fill(const Panel &to, const uint8_t *table, float factor, const Tile &tile, int first, int n) const {
    decode_blocks(matrix_.bits, table, tile.codes + int64_t(first) * block_bytes(matrix_.bits), n, to.bytes);
    if (to.scales) to_floats(tile, tile.scales, first, n, to.segments, factor, to.scales);
    if (to.biases) to_floats(tile, tile.biases, first, n, to.segments, 1, to.biases);
  }

  // Scales or biases of each block, or of each half of it.
  static void to_floats(const Tile &tile, const uint16_t *halves, int first, int n, int segments, float factor,
                        float *out) {
    for (int b = first; b < first + n; b++) {
      for (int s = 0; s < segments; s++, out += TILE_ROWS) {
        const int64_t group = segments == 2 ? tile.half_group(b, s) : b >> tile.group_shift;
        store(out, load_half(halves + group * TILE_ROWS) * splat(factor));
      }
    }
  }

  const tq_matrix &matrix_;
  const bool has_low_;
  Panel main_, low_;
};

// dots[t][r] = the products of STEP_COUNT steps of tile t, which are byte_stride apart, with row r of codes, + start[r].
template <int TILES, int WIDTH, int STEP_COUNT>
TQ_INLINE void multiply_steps(const uint8_t *bytes, int64_t byte_stride, const int8_t *codes, const Ints (&start)[WIDTH],
                              Ints (&dots)[TILES][WIDTH]) {
  if constexpr (HAS_TILE_UNIT && WIDTH == MAX_ROWS) {
    alignas(64) int32_t products[TILES][WIDTH][TILE_ROWS];
    tile_products<TILES, STEP_COUNT>(bytes, byte_stride, codes, products[0][0]);
    unrolled<TILES * WIDTH>([&](auto i) TQ_INLINE_LAMBDA {
      dots[i / WIDTH][i % WIDTH] = load_ints(products[i / WIDTH][i % WIDTH]) + start[i % WIDTH];
    });
  } else {
    constexpr int SPLIT = std::clamp(CHAINS / (TILES * WIDTH), 1, 4);  // sums that share the steps, dots among them
    Ints more[SPLIT][TILES][WIDTH];
    unrolled<TILES * WIDTH>([&](auto i) TQ_INLINE_LAMBDA {
      dots[i / WIDTH][i % WIDTH] = start[i % WIDTH];
      unrolled<SPLIT - 1>([&](auto j) TQ_INLINE_LAMBDA { more[j][i / WIDTH][i % WIDTH] = splat_int(0); });
    });
    for (int step = 0; step < STEP_COUNT; step += SPLIT, bytes += SPLIT * LANES, codes += SPLIT * 4) {
      unrolled<SPLIT>([&](auto i) TQ_INLINE_LAMBDA {
        auto &sums = i == 0 ? dots : more[i - (i > 0)];
        Bytes w[TILES];
        unrolled<TILES>([&](auto t) TQ_INLINE_LAMBDA { w[t] = load_bytes(bytes + t * byte_stride + i * LANES); });
        unrolled<WIDTH>([&](auto r) TQ_INLINE_LAMBDA {
          const Quad quad = load_quad(codes + r * BLOCK_COLUMNS + i * 4);
          unrolled<TILES>([&](auto t) TQ_INLINE_LAMBDA { sums[t][r] = dot(sums[t][r], w[t], quad); });
        });
      });
    }
    unrolled<TILES * WIDTH>([&](auto i) TQ_INLINE_LAMBDA {
      Ints &sum = dots[i / WIDTH][i % WIDTH];
      unrolled<SPLIT - 1>([&](auto j) TQ_INLINE_LAMBDA { sum = sum + more[j][i / WIDTH][i % WIDTH]; });
    });
  }
}

// sums [TILES][WIDTH][16] += the products of `n_blocks` blocks of a panel with the rows of a group from `first_block`.
template <int TILES, int WIDTH, int SEGMENTS, bool SCALED>
void multiply_panel(const Panel &panel, const RowGroup &x, int first_block, int n_blocks, float *sums) {
  constexpr int SEGMENT_STEPS = STEPS / SEGMENTS;
  Floats total[TILES][WIDTH];
  unrolled<TILES * WIDTH>([&](auto i) TQ_INLINE_LAMBDA { total[i / WIDTH][i % WIDTH] = load(sums + 16 * i); });
  const uint8_t *bytes = panel.bytes;
  const float *scales = panel.scales, *biases = panel.biases;
  const int8_t *codes = x.codes + int64_t(first_block) * WIDTH * BLOCK_COLUMNS;
  const float *x_scales = x.scales + int64_t(first_block) * WIDTH;
  const int32_t *x_sums = x.sums + int64_t(first_block) * 2 * WIDTH;
  for (int b = 0; b < n_blocks; b++, x_scales += WIDTH, x_sums += 2 * WIDTH) {
    for (int segment = 0; segment < SEGMENTS; segment++) {
      int32_t x_sum[WIDTH];
      Ints start[WIDTH], dots[TILES][WIDTH];
      unrolled<WIDTH>([&](auto r) TQ_INLINE_LAMBDA {
        x_sum[r] = SEGMENTS == 1 ? x_sums[r] : segment ? x_sums[WIDTH + r] : x_sums[r] - x_sums[WIDTH + r];
        start[r] = splat_int(-panel.offset * x_sum[r]);
      });
      multiply_steps<TILES, WIDTH, SEGMENT_STEPS>(bytes, panel.byte_stride, codes, start, dots);
      bytes += SEGMENT_STEPS * LANES, codes += SEGMENT_STEPS * 4;
      unrolled<TILES * WIDTH>([&](auto i) TQ_INLINE_LAMBDA {
        constexpr int T = i / WIDTH, R = i % WIDTH;
        Floats product = to_floats(dots[T][R]);
        if constexpr (SCALED) product = product * load(scales + T * panel.scale_stride);
        total[T][R] = fma(product, splat(x_scales[R]), total[T][R]);
      });
      if constexpr (SCALED) scales += TILE_ROWS;
      if (SCALED && biases) {
        unrolled<TILES * WIDTH>([&](auto i) TQ_INLINE_LAMBDA {
          constexpr int T = i / WIDTH, R = i % WIDTH;
          const float x_shift = x_scales[R] * static_cast<float>(x_sum[R]);
          total[T][R] = fma(load(biases + T * panel.scale_stride), splat(x_shift), total[T][R]);
        });
        biases += TILE_ROWS;
      }
    }
    codes += (WIDTH - 1) * BLOCK_COLUMNS;
  }
  unrolled<TILES * WIDTH>([&](auto i) TQ_INLINE_LAMBDA { store(sums + 16 * i, total[i / WIDTH][i % WIDTH]); });
}

void Panels::multiply(int tile, int count, const RowGroup &x, int first_block, int n_blocks, float *sums) const {
  const auto run = [&]<int WIDTH, int SEGMENTS, bool SCALED>() {
    const auto kernel = count == MAX_TILES ? multiply_panel<MAX_TILES, WIDTH, SEGMENTS, SCALED>
                                           : multiply_panel<1, WIDTH, SEGMENTS, SCALED>;
    kernel(main_.from_tile(tile), x, first_block, n_blocks, sums);
    if (has_low_) kernel(low_.from_tile(tile), x, first_block, n_blocks, sums);
  };
  with_width(x.width, [&]<int WIDTH>() {
    if (main_.segments == 2) run.template operator()<WIDTH, 2, true>();
    else if (main_.scales) run.template operator()<WIDTH, 1, true>();
    else run.template operator()<WIDTH, 1, false>();
  });
}

// How many tiles and blocks are decoded at once.
struct Step {
  int tiles, blocks;

  Step(const tq_matrix &m, int rows, int n_tiles) {
    const int all = tq::blocks(m.columns);
    if (rows <= SKINNY_ROWS) {
      tiles = 1;
      blocks = std::min(SKINNY_BLOCKS, all);
    } else {
      const int64_t fit = PANEL_BYTES / (int64_t(all) * BLOCK_BYTES) / MAX_TILES * MAX_TILES;
      tiles = static_cast<int>(std::clamp<int64_t>(fit, MAX_TILES, std::max(MAX_TILES, n_tiles)));
      blocks = all;
    }
  }
};

}  // namespace

void multiply_rows(const Job &job, const Activations &activations, int first_tile, int last_tile) {
  const tq_matrix &m = *job.matrix;
  const Batch &batch = *job.batch;
  const Step step(m, batch.rows, last_tile - first_tile);
  const Panels panels(m, step.tiles, step.blocks);
  [[maybe_unused]] const TileUnit unit{};
  const int all_blocks = blocks(m.columns);
  // The sums of every group of rows if not all blocks are multiplied at once.
  constexpr int64_t GROUP_SUMS = MAX_TILES * MAX_ROWS * TILE_ROWS;
  const bool keep = step.blocks < all_blocks;
  float *sums = scratch<float>(ACCUMULATORS, GROUP_SUMS * (keep ? SKINNY_ROWS / MAX_ROWS : 1));

  for (int tile = first_tile; tile < last_tile; tile += step.tiles) {
    const int n_tiles = std::min(step.tiles, last_tile - tile);
    for (int block = 0; block < all_blocks; block += step.blocks) {
      const int n_blocks = std::min(step.blocks, all_blocks - block);
      for (int t = 0; t < n_tiles; t++) panels.decode(Tile(m, job.expert, tile + t), t, block, n_blocks);
      for (int row = 0; row < batch.rows; row += MAX_ROWS) {
        const RowGroup x = activations.group(batch.first + row, Activations::width(batch.rows - row));
        float *group_sums = sums + (keep ? row / MAX_ROWS * GROUP_SUMS : 0);
        for (int t = 0; t < n_tiles; t += MAX_TILES) {
          const int count = std::min(MAX_TILES, n_tiles - t);
          if (block == 0) std::fill_n(group_sums, count * x.width * TILE_ROWS, 0.0f);
          panels.multiply(t, count, x, block, n_blocks, group_sums);
          if (block + n_blocks < all_blocks) continue;
          for (int c = 0; c < count; c++) {
            const int this_tile = tile + t + c;
            const Floats scale = panels.scaled()
                                     ? splat(1)
                                     : load_half(Tile(m, job.expert, this_tile).scales) * splat(m.table_scale);
            for (int r = 0; r < std::min(x.width, batch.rows - row); r++) {
              finish(job, this_tile, row + r, load(group_sums + (c * x.width + r) * TILE_ROWS) * scale);
            }
          }
        }
      }
    }
  }
}

}  // namespace tq
