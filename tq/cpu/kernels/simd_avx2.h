// simd.h for AVX2, with AVX-VNNI if the compiler may use it: a vector is two registers.
#pragma once
#include <immintrin.h>

#include <utility>

namespace tq {

constexpr int INDEX_BITS = 4;  // of a byte that lookup(Table) reads; it ignores the others
constexpr int MAX_ROWS = 4;    // rows of x that a register-blocked product takes at once
constexpr int MAX_TILES = 1;   // and tiles of 16 rows of the matrix
#ifdef __AVXVNNI__
constexpr uint8_t SIGN_FLIP = 0;  // vpdpbusd multiplies unsigned weights with signed activations
constexpr int CHAINS = 4;         // independent sums that keep dot() busy
#else
constexpr uint8_t SIGN_FLIP = 0x80;
constexpr int CHAINS = 1;
#endif

struct Bytes { __m256i v[2]; };
struct Ints { __m256i v[2]; };
struct Floats { __m256 v[2]; };
struct Quad { __m256i v; };
struct Table { __m256i v; };  // the same 16 bytes twice

// --- bytes ---------------------------------------------------------------------------------------------------------

TQ_INLINE __m256i load_256(const void *p) { return _mm256_loadu_si256(static_cast<const __m256i *>(p)); }
TQ_INLINE __m256i load_twice(const void *p) {
  return _mm256_broadcastsi128_si256(_mm_loadu_si128(static_cast<const __m128i *>(p)));
}

TQ_INLINE Bytes load_bytes(const uint8_t *p) { return {{load_256(p), load_256(p + 32)}}; }
TQ_INLINE void store_bytes(uint8_t *p, Bytes a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i *>(p), a.v[0]);
  _mm256_storeu_si256(reinterpret_cast<__m256i *>(p + 32), a.v[1]);
}
TQ_INLINE Bytes splat_byte(uint8_t a) {
  const __m256i v = _mm256_set1_epi8(static_cast<char>(a));
  return {{v, v}};
}
TQ_INLINE Bytes flip(Bytes a, Bytes mask) {
  return {{_mm256_xor_si256(a.v[0], mask.v[0]), _mm256_xor_si256(a.v[1], mask.v[1])}};
}

TQ_INLINE __m256i select(__m256i mask, __m256i a, __m256i b) {
  return _mm256_or_si256(_mm256_and_si256(mask, a), _mm256_andnot_si256(mask, b));
}
// mask ? a : b, bit by bit.
TQ_INLINE Bytes select(Bytes mask, Bytes a, Bytes b) {
  return {{select(mask.v[0], a.v[0], b.v[0]), select(mask.v[1], a.v[1], b.v[1])}};
}

// Every byte shifted right by N bits, left if N < 0. Bits from the neighbouring byte may come in.
template <int N>
TQ_INLINE Bytes shift(Bytes a) {
  if constexpr (N > 0) return {{_mm256_srli_epi16(a.v[0], N), _mm256_srli_epi16(a.v[1], N)}};
  if constexpr (N < 0) return {{_mm256_slli_epi16(a.v[0], -N), _mm256_slli_epi16(a.v[1], -N)}};
  return a;
}

TQ_INLINE Table load_table(const uint8_t *entries) { return {load_twice(entries)}; }
TQ_INLINE Table to_table(Bytes entries) { return {_mm256_permute2x128_si256(entries.v[0], entries.v[0], 0)}; }
TQ_INLINE Bytes lookup(const Table &table, Bytes index) {
  const __m256i low = _mm256_set1_epi8(15);
  return {{_mm256_shuffle_epi8(table.v, _mm256_and_si256(index.v[0], low)),
           _mm256_shuffle_epi8(table.v, _mm256_and_si256(index.v[1], low))}};
}

template <int WIDTH>
struct WideTable {
  uint8_t entries[1 << WIDTH];

  explicit WideTable(const uint8_t *from) { memcpy(entries, from, sizeof entries); }
};

// The entry at the low WIDTH bits of each byte: of both halves of the table, the one that bit WIDTH - 1 names.
template <int WIDTH>
TQ_INLINE __m256i lookup_wide(const uint8_t *entries, __m256i index, __m256i low) {
  if constexpr (WIDTH == 4) {
    return _mm256_shuffle_epi8(load_twice(entries), low);
  } else {
    const __m256i chosen = _mm256_slli_epi16(index, 8 - WIDTH);  // the bit on top, where blendv looks
    return _mm256_blendv_epi8(lookup_wide<WIDTH - 1>(entries, index, low),
                              lookup_wide<WIDTH - 1>(entries + (1 << (WIDTH - 1)), index, low), chosen);
  }
}

template <int WIDTH>
TQ_INLINE Bytes lookup(const WideTable<WIDTH> &table, Bytes index) {
  const __m256i low = _mm256_set1_epi8(15);
  return {{lookup_wide<WIDTH>(table.entries, index.v[0], _mm256_and_si256(index.v[0], low)),
           lookup_wide<WIDTH>(table.entries, index.v[1], _mm256_and_si256(index.v[1], low))}};
}

// --- integers ------------------------------------------------------------------------------------------------------

TQ_INLINE Ints splat_int(int32_t a) {
  const __m256i v = _mm256_set1_epi32(a);
  return {{v, v}};
}
TQ_INLINE Ints operator+(Ints a, Ints b) {
  return {{_mm256_add_epi32(a.v[0], b.v[0]), _mm256_add_epi32(a.v[1], b.v[1])}};
}

TQ_INLINE Quad load_quad(const int8_t *p) {
  int32_t four;
  memcpy(&four, p, 4);
  return {_mm256_set1_epi32(four)};
}

TQ_INLINE __m256i dot(__m256i acc, __m256i w, __m256i x) {
#ifdef __AVXVNNI__
  return _mm256_dpbusd_avx_epi32(acc, w, x);
#else
  // |w| * (x with the sign of w). |x| <= 127, so that no negation overflows and a pair of products fits 16 bits:
  // 2 * 128 * 127.
  const __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(x, w));
  return _mm256_add_epi32(acc, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
#endif
}
// acc[r] + sum of w[4 r + j] * x[j] over j < 4, exact.
TQ_INLINE Ints dot(Ints acc, Bytes w, Quad x) {
  return {{dot(acc.v[0], w.v[0], x.v), dot(acc.v[1], w.v[1], x.v)}};
}

// Byte 4 r + COLUMN of each row.
template <int COLUMN>
TQ_INLINE Ints column(Bytes a) {
  const __m256i byte = _mm256_set1_epi32(255);
  return {{_mm256_and_si256(_mm256_srli_epi32(a.v[0], 8 * COLUMN), byte),
           _mm256_and_si256(_mm256_srli_epi32(a.v[1], 8 * COLUMN), byte)}};
}

// --- floats --------------------------------------------------------------------------------------------------------

TQ_INLINE Floats splat(float a) {
  const __m256 v = _mm256_set1_ps(a);
  return {{v, v}};
}
TQ_INLINE Floats load(const float *p) { return {{_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}}; }
TQ_INLINE void store(float *p, Floats a) {
  _mm256_storeu_ps(p, a.v[0]);
  _mm256_storeu_ps(p + 8, a.v[1]);
}
TQ_INLINE Floats load_half(const uint16_t *p) {
  const auto *halves = reinterpret_cast<const __m128i *>(p);
  return {{_mm256_cvtph_ps(_mm_loadu_si128(halves)), _mm256_cvtph_ps(_mm_loadu_si128(halves + 1))}};
}
TQ_INLINE Floats to_floats(Ints a) { return {{_mm256_cvtepi32_ps(a.v[0]), _mm256_cvtepi32_ps(a.v[1])}}; }
TQ_INLINE Floats operator+(Floats a, Floats b) {
  return {{_mm256_add_ps(a.v[0], b.v[0]), _mm256_add_ps(a.v[1], b.v[1])}};
}
TQ_INLINE Floats operator*(Floats a, Floats b) {
  return {{_mm256_mul_ps(a.v[0], b.v[0]), _mm256_mul_ps(a.v[1], b.v[1])}};
}
TQ_INLINE Floats fma(Floats a, Floats b, Floats c) {
  return {{_mm256_fmadd_ps(a.v[0], b.v[0], c.v[0]), _mm256_fmadd_ps(a.v[1], b.v[1], c.v[1])}};
}
TQ_INLINE Floats gather(const float *p, Ints index) {
  return {{_mm256_i32gather_ps(p, index.v[0], 4), _mm256_i32gather_ps(p, index.v[1], 4)}};
}

}  // namespace tq
