// What attention asks of an instruction set beyond simd.h.
#pragma once
#include <utility>

#include "decode.h"
#include "layout.h"
#include "simd.h"

namespace tq {

// A product of float matrices is made in tiles of GEMM_ROWS x GEMM_VECTORS Floats, which leave some registers free; a
// few rows of queries meet VALUE_VECTORS vectors of a value at once.
#if defined(TQ_ISA_AVX512)
constexpr int GEMM_ROWS = 6, GEMM_VECTORS = 4, VALUE_VECTORS = 4;
#elif defined(TQ_ISA_GENERIC)
constexpr int GEMM_ROWS = 2, GEMM_VECTORS = 1, VALUE_VECTORS = 1;
#else
constexpr int GEMM_ROWS = 6, GEMM_VECTORS = 1, VALUE_VECTORS = 1;
#endif

// Values multiply weights that are unsigned bytes. A stored code (value + 128), flipped with VALUE_FLIP, stands for
// `value + VALUE_ZERO` in dot_values.
#if defined(TQ_ISA_NEON) || defined(TQ_ISA_GENERIC)
constexpr uint8_t VALUE_FLIP = 0;
constexpr int VALUE_ZERO = 128;
#else
constexpr uint8_t VALUE_FLIP = 0x80;
constexpr int VALUE_ZERO = 0;
#endif

TQ_INLINE Quad load_quad(const uint8_t *p) { return load_quad(reinterpret_cast<const int8_t *>(p)); }

// acc[r] + sum of w[4 r + j] * x[j] over j < 4, exact, for unsigned x.
#if defined(TQ_ISA_AVX512)
TQ_INLINE Ints dot_values(Ints acc, Bytes w, Quad x) { return {_mm512_dpbusd_epi32(acc.v, x.v, w.v)}; }
#elif defined(TQ_ISA_AVX2)
TQ_INLINE Ints dot_values(Ints acc, Bytes w, Quad x) {
#ifndef __AVXVNNI__
  // One product in each 16 bits, where a sum of two would not fit.
  const __m256i low = _mm256_set1_epi16(255), one = _mm256_set1_epi16(1);
  const __m256i even = _mm256_and_si256(x.v, low), odd = _mm256_andnot_si256(low, x.v);
#endif
  for (int i = 0; i < 2; i++) {
#ifdef __AVXVNNI__
    acc.v[i] = _mm256_dpbusd_avx_epi32(acc.v[i], x.v, w.v[i]);
#else
    acc.v[i] = _mm256_add_epi32(acc.v[i], _mm256_madd_epi16(_mm256_maddubs_epi16(even, w.v[i]), one));
    acc.v[i] = _mm256_add_epi32(acc.v[i], _mm256_madd_epi16(_mm256_maddubs_epi16(odd, w.v[i]), one));
#endif
  }
  return acc;
}
#elif defined(TQ_ISA_NEON)
TQ_INLINE Ints dot_values(Ints acc, Bytes w, Quad x) {
  for (int i = 0; i < 4; i++) {
    const uint32x4_t sum = vreinterpretq_u32_s32(acc.v[i]);
    acc.v[i] = vreinterpretq_s32_u32(vdotq_u32(sum, w.v[i], vreinterpretq_u8_s8(x.v)));
  }
  return acc;
}
#else
TQ_INLINE Ints dot_values(Ints acc, const Bytes &w, Quad x) {
  for (int r = 0; r < TILE_ROWS; r++) {
    for (int j = 0; j < 4; j++) acc.v[r] += w.v[4 * r + j] * uint8_t(x.v[j]);
  }
  return acc;
}
#endif

// Four lanes: a register of every instruction set.
typedef float Four __attribute__((vector_size(16)));

TQ_INLINE Four load_four(const float *p) {
  Four x;
  memcpy(&x, p, sizeof x);
  return x;
}
TQ_INLINE void store_four(float *p, Four x) { memcpy(p, &x, sizeof x); }

// Lanes 4 i to 4 i + 3 of the result have the same sum as all lanes of x[i], i < 4.
#if defined(TQ_ISA_AVX512)
TQ_INLINE Floats fold(const Floats (&x)[4]) {
  const auto halves = [](__m512 a, __m512 b) TQ_INLINE_LAMBDA {
    return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xee));
  };
  const __m512 ab = halves(x[0].v, x[1].v), cd = halves(x[2].v, x[3].v);
  return {_mm512_add_ps(_mm512_shuffle_f32x4(ab, cd, 0x88), _mm512_shuffle_f32x4(ab, cd, 0xdd))};
}
#else
TQ_INLINE Floats fold(const Floats (&x)[4]) {
  float lanes[TILE_ROWS], folded[TILE_ROWS];
  for (int i = 0; i < 4; i++) {
    store(lanes, x[i]);
    store_four(folded + 4 * i, (load_four(lanes) + load_four(lanes + 4)) + (load_four(lanes + 8) + load_four(lanes + 12)));
  }
  return load(folded);
}
#endif

// Calls f.operator()<min(count, MOST)>(), count > 0.
template <int MOST, class F>
TQ_INLINE void with_count(int count, F &&f) {
  [&]<int... I>(std::integer_sequence<int, I...>) {
    const int chosen = count < MOST ? count : MOST;
    ((chosen == I + 1 && (f.template operator()<I + 1>(), true)) || ...);
  }(std::make_integer_sequence<int, MOST>{});
}

// f.operator()<MOST>() if count allows, else one at a time: for what seldom leaves a rest.
template <int MOST, class F>
TQ_INLINE void with_all_or_one(int count, F &&f) {
  if (count >= MOST) {
    f.template operator()<MOST>();
  } else {
    f.template operator()<1>();
  }
}

}  // namespace tq
