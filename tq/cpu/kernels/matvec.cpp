// One row of int8 activations with a matrix: codes go from memory through registers into the sums.
#include "activations.h"
#include "decode.h"
#include "product.h"
#include "simd.h"
#include "tile.h"

namespace tq {
namespace {

// The sums of the halves of a block, for its 16 rows, on top of what is in them.
template <int BITS>
TQ_INLINE void dot_block(const Decoder<BITS> &decode, const uint8_t *block, const int8_t *x, Ints sums[2]) {
  Ints odd[2] = {splat_int(0), splat_int(0)};  // a second chain: an addition to a sum waits for the one before
  decode(block, [&](auto step, const Bytes &w) TQ_INLINE_LAMBDA {
    Ints &sum = step % 2 ? odd[step / 8] : sums[step / 8];
    sum = dot(sum, w, load_quad(x + 4 * step));
  });
  sums[0] = sums[0] + odd[0];
  sums[1] = sums[1] + odd[1];
}

// sum over blocks of table_scale * x_scale * scale * sum((byte - offset) * x) + bias * x_scale * sum(x): the product,
// but for the scale of the row where scaling is ROW.
template <int BITS>
Floats multiply_tile(const Decoder<BITS> &decode, const Decoder<BITS> *decode_low, const tq_matrix &matrix,
                     const Tile &tile, const RowGroup &x) {
  const int offset = matrix.offset - BYTE_ZERO;
  Floats total = splat(0), shifts = splat(0);
  const uint8_t *block = tile.codes;
  for (int b = 0; b < tile.blocks; b++, block += block_bytes(BITS)) {
    for (int line = 0; line < block_bytes(BITS); line += 64) prefetch(block + PREFETCH_BYTES + line);
    const int8_t *codes = x.codes + int64_t(b) * BLOCK_COLUMNS;
    const float x_scale = x.scales[b];
    const int32_t x_sums[2] = {x.sums[2 * b] - x.sums[2 * b + 1], x.sums[2 * b + 1]};
    Ints sums[2] = {splat_int(-offset * x_sums[0]), splat_int(-offset * x_sums[1])};
    dot_block(decode, block, codes, sums);
    Ints low[2] = {splat_int(0), splat_int(0)};
    if constexpr (BITS >= 7) {
      if (decode_low) {
        const int zero = 128 - BYTE_ZERO;
        for (int h = 0; h < 2; h++) low[h] = splat_int(-zero * x_sums[h]);
        dot_block(*decode_low, block, codes, low);
      }
    }
    const auto product = [&](const Ints &sum, const Ints &low_sum) {
      return BITS >= 7 ? fma(to_floats(low_sum), splat(1.0f / 256), to_floats(sum)) : to_floats(sum);
    };
    switch (tile.scaling) {
      case Scaling::ROW:
        total = fma(product(sums[0] + sums[1], low[0] + low[1]), splat(x_scale), total);
        break;
      case Scaling::BLOCK: {
        const int64_t at = int64_t(b >> tile.group_shift) * TILE_ROWS;
        const Floats scale = load_half(tile.scales + at) * splat(x_scale);
        total = fma(product(sums[0] + sums[1], low[0] + low[1]), scale, total);
        if (tile.biases) shifts = fma(load_half(tile.biases + at), splat(x_scale * float(x.sums[2 * b])), shifts);
        break;
      }
      case Scaling::HALF:
        for (int h = 0; h < 2; h++) {
          const int64_t at = int64_t(tile.half_group(b, h)) * TILE_ROWS;
          total = fma(product(sums[h], low[h]), load_half(tile.scales + at) * splat(x_scale), total);
          if (tile.biases) shifts = fma(load_half(tile.biases + at), splat(x_scale * float(x_sums[h])), shifts);
        }
    }
  }
  return fma(total, splat(matrix.table_scale), shifts);
}

template <int BITS>
void multiply_tiles(const Job &job, const RowGroup &x, int first_tile, int last_tile) {
  const tq_matrix &m = *job.matrix;
  const Decoder<BITS> decode(m.table), low(m.table_low ? m.table_low : m.table);
  for (int t = first_tile; t < last_tile; t++) {
    const Tile tile(m, job.expert, t);
    Floats product = multiply_tile<BITS>(decode, m.table_low ? &low : nullptr, m, tile, x);
    if (tile.scaling == Scaling::ROW) product = product * load_half(tile.scales);
    finish(job, t, 0, product);
  }
}

}  // namespace

void multiply_row(const Job &job, const Activations &activations, int first_tile, int last_tile) {
  const RowGroup x = activations.group(job.batch->first, 1);
  with_bits(job.matrix->bits, [&]<int BITS>() { multiply_tiles<BITS>(job, x, first_tile, last_tile); });
}

}  // namespace tq
