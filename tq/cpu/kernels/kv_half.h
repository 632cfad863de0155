// float16 rows from and to float32, round to nearest even, in plain integer operations that vectorize everywhere.
#pragma once
#include <stdint.h>

#include <bit>

namespace tq {

inline uint16_t half_of(float x) {
  constexpr uint32_t ONE_HALF = 0x3f000000, INFINITE = 0x7f800000;
  const uint32_t bits = std::bit_cast<uint32_t>(x), magnitude = bits & 0x7fffffff;
  const uint32_t normal = (magnitude + 0xfff + (magnitude >> 13 & 1) - (112u << 23)) >> 13;
  // Below 2^-14 the unit is 2^-24, which is the last bit of floats from 0.5 on: their sum is rounded there.
  const uint32_t tiny = std::bit_cast<uint32_t>(std::bit_cast<float>(magnitude) + 0.5f) - ONE_HALF;
  uint32_t half = magnitude < 0x38800000 ? tiny : normal;
  half = magnitude >= 0x477ff000 ? 0x7c00 : half;  // from 65520 on it rounds to infinity
  half = magnitude > INFINITE ? 0x7e00 : half;
  return static_cast<uint16_t>(half | (bits >> 16 & 0x8000));
}

inline float float_of(uint16_t half) {
  const uint32_t magnitude = uint32_t(half & 0x7fff) << 13;
  const float scaled = std::bit_cast<float>(magnitude) * 0x1p112f;  // right for subnormal numbers too
  const uint32_t finite = std::bit_cast<uint32_t>(scaled);
  const uint32_t bits = (half & 0x7c00) == 0x7c00 ? magnitude | 0x7f800000 : finite;
  return std::bit_cast<float>(bits | uint32_t(half & 0x8000) << 16);
}

inline void to_half(const float *from, int64_t n, uint16_t *to) {
#pragma omp simd
  for (int64_t i = 0; i < n; i++) to[i] = half_of(from[i]);
}

inline void to_float(const uint16_t *from, int64_t n, float *to) {
#pragma omp simd
  for (int64_t i = 0; i < n; i++) to[i] = float_of(from[i]);
}

}  // namespace tq
