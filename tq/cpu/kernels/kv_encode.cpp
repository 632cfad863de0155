// Scales and codes of key and value vectors, and their packing to blocks.
//
// The best scale for given codes is <x, q> / <q, q>, q their levels. Codes and scale depend on each other, with many local
// minima: some start scales around the root mean square are tried, each with its best scale, and the best of those once
// more (tq/engine/quantize/scales.py says what that is worth).
#include "kv_encode.h"

#include <float.h>
#include <math.h>
#include <string.h>

#include <algorithm>
#include <bit>

#include "kv_half.h"
#include "kv_layout.h"

namespace tq {
namespace {

constexpr int PIECE = 64;  // values worked on at a time
constexpr float LARGEST_HALF = 65504.f;
constexpr uint16_t NOT_A_NUMBER = 0x7e00;  // in float16
constexpr float SHIFTER = 12582912.f;      // 1.5 * 2^23: the sum with it is rounded to an integer, in the low bits

// Start scales in root mean squares; from 3 bits on the last one lets the highest level meet the largest value.
constexpr float FIRST_START = 0.7f, LAST_START = 1.1f;
constexpr int STARTS[] = {0, 1, 3, 8, 8, 8, 8, 8};  // by bits

float inverse_of(float scale) { return scale >= FLT_MIN ? 1.f / scale : 0.f; }

// |x[i]| as bits: ordered like the floats, NaN above all.
uint32_t largest_magnitude(const float *x, int n) {
  int32_t most = 0;
#pragma omp simd reduction(max : most)
  for (int i = 0; i < n; i++) {
    const int32_t bits = std::bit_cast<int32_t>(x[i]) & 0x7fffffff;
    most = bits > most ? bits : most;
  }
  return static_cast<uint32_t>(most);
}

}  // namespace

VectorCoder::VectorCoder(const tq_kv_part &part)
    : dim_(part.dim), group_(part.group ? part.group : part.dim), bits_(part.bits), affine_(part.affine) {
  if (bits_ == 8 || affine_) return;
  half_ = 1 << (bits_ - 1);
  for (int i = 0; i < half_; i++) levels_[i] = part.values[half_ + i];
  for (int i = 0; i + 1 < half_; i++) borders_[i] = (levels_[i] + levels_[i + 1]) / 2;
}

void VectorCoder::encode(const float *x, uint8_t *codes, uint16_t *scales, int64_t stride) const {
  uint16_t *minima = scales + dim_ / group_ * stride;
  for (int first = 0; first < dim_; first += group_, scales += stride, minima += stride) {
    *scales = affine_ ? encode_affine(x + first, group_, codes + first, *minima)
                      : encode_levels(x + first, group_, codes + first);
  }
}

uint16_t VectorCoder::encode_affine(const float *x, int n, uint8_t *codes, uint16_t &least) const {
  const auto limited = [](float v) { return v > LARGEST_HALF ? LARGEST_HALF : v < -LARGEST_HALF ? -LARGEST_HALF : v; };
  float low = x[0], high = x[0];
#pragma omp simd reduction(min : low) reduction(max : high)
  for (int i = 0; i < n; i++) {
    low = x[i] < low ? x[i] : low;
    high = x[i] > high ? x[i] : high;
  }
  if (largest_magnitude(x, n) >= 0x7f800000) {
    std::fill_n(codes, n, uint8_t(0));
    least = NOT_A_NUMBER;
    return NOT_A_NUMBER;
  }
  const float last = float((1 << bits_) - 1);
  least = half_of(limited(low));
  const float from = float_of(least);
  const uint16_t half = half_of(limited((high - from) / last));
  const float step = float_of(half), divisor = step > 0.f ? step : 1.f;
#pragma omp simd
  for (int i = 0; i < n; i++) {
    float scaled = (x[i] - from) / divisor;
    scaled = scaled > last ? last : scaled;
    scaled = scaled < 0.f ? 0.f : scaled;
    codes[i] = uint8_t(std::bit_cast<uint32_t>(scaled + SHIFTER));
  }
  return half;
}

void VectorCoder::gain(const float *x, int n, float inverse, float &xq, float &qq) const {
  float product = 0, square = 0;
  for (int first = 0; first < n; first += PIECE) {
    const int count = std::min(n - first, PIECE);
    float magnitude[PIECE], level[PIECE];
#pragma omp simd
    for (int i = 0; i < count; i++) {
      magnitude[i] = fabsf(x[first + i]);
      level[i] = levels_[0];
    }
    for (int b = 0; b + 1 < half_; b++) {
      const float border = borders_[b], step = levels_[b + 1] - levels_[b];
#pragma omp simd
      for (int i = 0; i < count; i++) level[i] += magnitude[i] * inverse > border ? step : 0.f;
    }
#pragma omp simd reduction(+ : product, square)
    for (int i = 0; i < count; i++) {
      product += magnitude[i] * level[i];
      square += level[i] * level[i];
    }
  }
  xq = product, qq = square;
}

float VectorCoder::search(const float *x, int n, float largest) const {
  float squares = 0;
#pragma omp simd reduction(+ : squares)
  for (int i = 0; i < n; i++) squares += x[i] * x[i];
  const float rms = sqrtf(squares / float(n));
  float best = rms, best_gain = 0;
  const auto attempt = [&](float scale) {
    float xq, qq;
    gain(x, n, inverse_of(scale), xq, qq);
    const float fitted = xq / std::max(qq, FLT_MIN);
    if (fitted * xq > best_gain) best = fitted, best_gain = fitted * xq;
  };
  const int starts = STARTS[bits_];
  const float first = starts == 1 ? rms : FIRST_START * rms;
  const float last = bits_ < 3 ? LAST_START * rms : std::max(LAST_START * rms, largest / levels_[half_ - 1]);
  for (int i = 0; i < starts; i++) attempt(first + (last - first) * float(i) / float(std::max(starts - 1, 1)));
  attempt(best);
  return std::min(best, LARGEST_HALF);
}

uint16_t VectorCoder::encode_levels(const float *x, int n, uint8_t *codes) const {
  const uint32_t bits = largest_magnitude(x, n);
  const float largest = std::bit_cast<float>(bits);
  const bool finite = bits < 0x7f800000;
  const float wanted = !finite ? 0.f : bits_ == 8 ? std::min(largest / 127.f, LARGEST_HALF) : search(x, n, largest);
  const uint16_t half = half_of(wanted);
  const float inverse = finite ? inverse_of(float_of(half)) : 0.f;
  if (bits_ == 8) {
#pragma omp simd
    for (int i = 0; i < n; i++) {
      float scaled = finite ? x[i] * inverse : 0.f;
      scaled = scaled > 127.f ? 127.f : scaled;
      scaled = scaled < -127.f ? -127.f : scaled;
      codes[i] = uint8_t(std::bit_cast<uint32_t>(scaled + SHIFTER) + 128);
    }
  } else {
    for (int first = 0; first < n; first += PIECE) {
      const int count = std::min(n - first, PIECE);
      int32_t above[PIECE] = {};
      for (int b = 0; b + 1 < half_; b++) {
        const float border = borders_[b];
#pragma omp simd
        for (int i = 0; i < count; i++) above[i] += fabsf(x[first + i]) * inverse > border;
      }
#pragma omp simd
      for (int i = 0; i < count; i++) codes[first + i] = uint8_t(x[first + i] < 0 ? half_ - 1 - above[i] : half_ + above[i]);
    }
  }
  return finite ? half : NOT_A_NUMBER;
}

void pack_keys(const uint8_t *codes, int64_t row, int head_dim, int bits, uint8_t *block) {
  const int steps = key_steps(head_dim, bits);
  for (int tile = 0; tile < BLOCK_TILES; tile++, block += key_tile_bytes(head_dim, bits)) {
    for (int b = 0; STEPS * b < steps; b++) {
      uint32_t lanes[STEPS][TILE_ROWS];
      for (int r = 0; r < TILE_ROWS; r++) {
        const uint8_t *from = codes + (tile * TILE_ROWS + r) * row + b * BLOCK_COLUMNS;
        for (int s = 0; s < STEPS; s++) memcpy(&lanes[s][r], from + 4 * s, 4);
      }
      if (bits == 8) {
        memcpy(block + int64_t(b) * sizeof lanes, lanes, std::min(STEPS, steps - STEPS * b) * LANES);
      } else {
        pack_block(lanes, bits, block + int64_t(b) * block_bytes(bits));
      }
    }
  }
}

void pack_values(const uint8_t *codes, int64_t row, int value_dim, int bits, uint8_t *block) {
  for (int tile = 0; tile < tiles(value_dim); tile++, block += block_bytes(bits)) {
    uint32_t lanes[STEPS][TILE_ROWS];
    for (int s = 0; s < STEPS; s++) {
      const uint8_t *from = codes + 4 * s * row + tile * TILE_ROWS;
#pragma omp simd
      for (int r = 0; r < TILE_ROWS; r++) {
        lanes[s][r] = from[r] | from[row + r] << 8 | from[2 * row + r] << 16 | uint32_t(from[3 * row + r]) << 24;
      }
    }
    pack_block(lanes, bits, block);
  }
}

}  // namespace tq
