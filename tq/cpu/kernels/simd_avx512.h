// simd.h for AVX512 with VNNI and VBMI: a vector is one register, a lookup one instruction.
#pragma once

// GCC before 13 takes the undefined vectors in its own header for uninitialized ones.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#ifndef __clang__
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>
#pragma GCC diagnostic pop

namespace tq {

constexpr int INDEX_BITS = 6;      // of a byte that lookup(Table) reads; it ignores the others
constexpr uint8_t SIGN_FLIP = 0;   // vpdpbusd multiplies unsigned weights with signed activations
constexpr int MAX_ROWS = 8;        // rows of x that a register-blocked product takes at once
constexpr int MAX_TILES = 2;       // and tiles of 16 rows of the matrix
constexpr int CHAINS = 8;          // independent sums that keep dot() busy

struct Bytes { __m512i v; };
struct Ints { __m512i v; };
struct Floats { __m512 v; };
struct Quad { __m512i v; };
struct Table { __m512i v; };

// --- bytes ---------------------------------------------------------------------------------------------------------

TQ_INLINE Bytes load_bytes(const uint8_t *p) { return {_mm512_loadu_si512(p)}; }
TQ_INLINE void store_bytes(uint8_t *p, Bytes a) { _mm512_storeu_si512(p, a.v); }
TQ_INLINE Bytes splat_byte(uint8_t a) { return {_mm512_set1_epi8(static_cast<char>(a))}; }
TQ_INLINE Bytes flip(Bytes a, Bytes mask) { return {_mm512_xor_si512(a.v, mask.v)}; }

// mask ? a : b, bit by bit.
TQ_INLINE Bytes select(Bytes mask, Bytes a, Bytes b) {
  return {_mm512_ternarylogic_epi64(mask.v, a.v, b.v, 0xca)};
}

// Every byte shifted right by N bits, left if N < 0. Bits from the neighbouring byte may come in.
template <int N>
TQ_INLINE Bytes shift(Bytes a) {
  if constexpr (N > 0) return {_mm512_srli_epi16(a.v, N)};
  if constexpr (N < 0) return {_mm512_slli_epi16(a.v, -N)};
  return a;
}

TQ_INLINE Table load_table(const uint8_t *entries) { return {_mm512_loadu_si512(entries)}; }
TQ_INLINE Table to_table(Bytes entries) { return {entries.v}; }
TQ_INLINE Bytes lookup(const Table &table, Bytes index) { return {_mm512_permutexvar_epi8(index.v, table.v)}; }

template <int WIDTH>
struct WideTable {
  __m512i part[WIDTH <= 6 ? 1 : 1 << (WIDTH - 6)];

  explicit WideTable(const uint8_t *entries) {
    if constexpr (WIDTH == 5) {
      part[0] = _mm512_broadcast_i64x4(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(entries)));
    } else {
      for (int i = 0; i < (1 << (WIDTH - 6)); i++) part[i] = _mm512_loadu_si512(entries + 64 * i);
    }
  }
};

// The entry at the low WIDTH bits of each byte.
template <int WIDTH>
TQ_INLINE Bytes lookup(const WideTable<WIDTH> &table, Bytes index) {
  if constexpr (WIDTH <= 6) {
    return {_mm512_permutexvar_epi8(index.v, table.part[0])};
  } else if constexpr (WIDTH == 7) {
    return {_mm512_permutex2var_epi8(table.part[0], index.v, table.part[1])};
  } else {
    const __m512i low = _mm512_permutex2var_epi8(table.part[0], index.v, table.part[1]);
    const __m512i high = _mm512_permutex2var_epi8(table.part[2], index.v, table.part[3]);
    return {_mm512_mask_blend_epi8(_mm512_movepi8_mask(index.v), low, high)};
  }
}

// --- integers ------------------------------------------------------------------------------------------------------

TQ_INLINE Ints splat_int(int32_t a) { return {_mm512_set1_epi32(a)}; }
TQ_INLINE Ints operator+(Ints a, Ints b) { return {_mm512_add_epi32(a.v, b.v)}; }

TQ_INLINE Quad load_quad(const int8_t *p) {
  int32_t four;
  memcpy(&four, p, 4);
  return {_mm512_set1_epi32(four)};
}

// acc[r] + sum of w[4 r + j] * x[j] over j < 4, exact. Not the intrinsic: in loops GCC 12 copies its sums to and fro.
TQ_INLINE Ints dot(Ints acc, Bytes w, Quad x) {
  asm("vpdpbusd %2, %1, %0" : "+v"(acc.v) : "v"(w.v), "v"(x.v));
  return acc;
}

// Byte 4 r + COLUMN of each row.
template <int COLUMN>
TQ_INLINE Ints column(Bytes a) {
  return {_mm512_and_si512(_mm512_srli_epi32(a.v, 8 * COLUMN), _mm512_set1_epi32(255))};
}

// --- floats --------------------------------------------------------------------------------------------------------

TQ_INLINE Floats splat(float a) { return {_mm512_set1_ps(a)}; }
TQ_INLINE Floats load(const float *p) { return {_mm512_loadu_ps(p)}; }
TQ_INLINE void store(float *p, Floats a) { _mm512_storeu_ps(p, a.v); }
TQ_INLINE Floats load_half(const uint16_t *p) {
  return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(p)))};
}
TQ_INLINE Floats to_floats(Ints a) { return {_mm512_cvtepi32_ps(a.v)}; }
TQ_INLINE Floats operator+(Floats a, Floats b) { return {_mm512_add_ps(a.v, b.v)}; }
TQ_INLINE Floats operator*(Floats a, Floats b) { return {_mm512_mul_ps(a.v, b.v)}; }
TQ_INLINE Floats fma(Floats a, Floats b, Floats c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
TQ_INLINE Floats gather(const float *p, Ints index) { return {_mm512_i32gather_ps(index.v, p, 4)}; }

}  // namespace tq
