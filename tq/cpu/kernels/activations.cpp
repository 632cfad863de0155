// Quantization of float rows to int8 for the integer products.
#include "activations.h"

#include <string.h>

#include <bit>
#include <limits>

#include "simd.h"

namespace tq {

namespace {

constexpr uint32_t INFINITE = 0x7f800000;  // bits of an infinity; those of a NaN are larger
constexpr int HALF = BLOCK_COLUMNS / 2;

// The largest |x| of a block, as its bits: as integers they order like the floats, and a NaN is above all.
uint32_t largest(const float *x) {
  int32_t bits = 0;
  for (int i = 0; i < BLOCK_COLUMNS; i++) {
    const int32_t magnitude = std::bit_cast<int32_t>(x[i]) & 0x7fffffff;
    bits = magnitude > bits ? magnitude : bits;
  }
  return static_cast<uint32_t>(bits);
}

// Codes of a block. Adding 1.5 * 2^23 leaves the integer nearest to a float (ties to even) in the low bits of the sum.
void encode(const float *x, float inverse, int8_t *codes) {
  constexpr float SHIFTER = 12582912.0f;
#pragma omp simd
  for (int i = 0; i < BLOCK_COLUMNS; i++) {
    codes[i] = static_cast<int8_t>(std::bit_cast<int32_t>(x[i] * inverse + SHIFTER) - std::bit_cast<int32_t>(SHIFTER));
  }
}

int32_t sum_of(const int8_t *codes) {
  int32_t sum = 0;
  for (int i = 0; i < HALF; i++) sum += codes[i];
  return sum;
}

}  // namespace

int Activations::width(int rows) {
  return rows >= MAX_ROWS ? MAX_ROWS : static_cast<int>(std::bit_ceil(static_cast<unsigned>(rows)));
}

int Activations::padded(int rows) {
  const int rest = rows % MAX_ROWS;
  return rows - rest + (rest ? width(rest) : 0);
}

Activations::Activations(int padded_rows, int columns) : blocks_(blocks(columns)) {
  const size_t n = size_t(padded_rows) * blocks_;
  uint8_t *memory = scratch<uint8_t>(ACTIVATIONS, n * (BLOCK_COLUMNS + sizeof(float) + 2 * sizeof(int32_t)));
  codes_ = reinterpret_cast<int8_t *>(memory);
  scales_ = reinterpret_cast<float *>(memory + n * BLOCK_COLUMNS);
  sums_ = reinterpret_cast<int32_t *>(scales_ + n);
}

RowGroup Activations::group(int first, int width) const {
  const size_t at = size_t(first) * blocks_;
  return {codes_ + at * BLOCK_COLUMNS, scales_ + at, sums_ + 2 * at, width};
}

void quantize_row(const float *x, int columns, const RowGroup &group, int row) {
  for (int b = 0; b < blocks(columns); b++) {
    int8_t *codes = group.codes + (int64_t(b) * group.width + row) * BLOCK_COLUMNS;
    int32_t *sums = group.sums + int64_t(b) * 2 * group.width + row;
    float &scale = group.scales[int64_t(b) * group.width + row];
    float padded[BLOCK_COLUMNS];
    const float *block = x + int64_t(b) * BLOCK_COLUMNS;
    const int n = columns - b * BLOCK_COLUMNS;
    if (x && n < BLOCK_COLUMNS) {
      memset(padded, 0, sizeof padded);
      memcpy(padded, block, n * sizeof(float));
      block = padded;
    }
    const uint32_t bits = x ? largest(block) : 0;
    const float most = std::bit_cast<float>(bits), inverse = 127.0f / most;
    if (bits < INFINITE && std::bit_cast<uint32_t>(inverse) < INFINITE) {
      scale = most / 127.0f;
      encode(block, inverse, codes);
      sums[group.width] = sum_of(codes + HALF);
      sums[0] = sum_of(codes) + sums[group.width];
    } else {
      scale = bits < INFINITE ? 0.0f : std::numeric_limits<float>::quiet_NaN();
      memset(codes, 0, BLOCK_COLUMNS);
      sums[0] = sums[group.width] = 0;
    }
  }
}

}  // namespace tq
