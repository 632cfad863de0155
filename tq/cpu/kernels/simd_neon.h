// simd.h for aarch64 with the dot product instructions: a vector is four registers.
#pragma once
#include <arm_neon.h>

namespace tq {

constexpr int INDEX_BITS = 4;         // of a byte that lookup(Table) reads; it ignores the others
constexpr uint8_t SIGN_FLIP = 0x80;   // sdot multiplies signed with signed
constexpr int MAX_ROWS = 4;           // rows of x that a register-blocked product takes at once
constexpr int MAX_TILES = 1;          // and tiles of 16 rows of the matrix
constexpr int CHAINS = 2;             // independent sums that keep dot() busy

struct Bytes { uint8x16_t v[4]; };
struct Ints { int32x4_t v[4]; };
struct Floats { float32x4_t v[4]; };
struct Quad { int8x16_t v; };
struct Table { uint8x16_t v; };

// --- bytes ---------------------------------------------------------------------------------------------------------

TQ_INLINE Bytes load_bytes(const uint8_t *p) {
  return {{vld1q_u8(p), vld1q_u8(p + 16), vld1q_u8(p + 32), vld1q_u8(p + 48)}};
}
TQ_INLINE void store_bytes(uint8_t *p, Bytes a) {
  for (int i = 0; i < 4; i++) vst1q_u8(p + 16 * i, a.v[i]);
}
TQ_INLINE Bytes splat_byte(uint8_t a) {
  const uint8x16_t v = vdupq_n_u8(a);
  return {{v, v, v, v}};
}
TQ_INLINE Bytes flip(Bytes a, Bytes mask) {
  for (int i = 0; i < 4; i++) a.v[i] = veorq_u8(a.v[i], mask.v[i]);
  return a;
}

// mask ? a : b, bit by bit.
TQ_INLINE Bytes select(Bytes mask, Bytes a, Bytes b) {
  for (int i = 0; i < 4; i++) a.v[i] = vbslq_u8(mask.v[i], a.v[i], b.v[i]);
  return a;
}

// Every byte shifted right by N bits, left if N < 0.
template <int N>
TQ_INLINE Bytes shift(Bytes a) {
  for (int i = 0; i < 4; i++) {
    if constexpr (N > 0) a.v[i] = vshrq_n_u8(a.v[i], N);
    if constexpr (N < 0) a.v[i] = vshlq_n_u8(a.v[i], -N);
  }
  return a;
}

TQ_INLINE Table load_table(const uint8_t *entries) { return {vld1q_u8(entries)}; }
TQ_INLINE Table to_table(Bytes entries) { return {entries.v[0]}; }
TQ_INLINE Bytes lookup(const Table &table, Bytes index) {
  for (int i = 0; i < 4; i++) index.v[i] = vqtbl1q_u8(table.v, vandq_u8(index.v[i], vdupq_n_u8(15)));
  return index;
}

template <int WIDTH>
struct WideTable {
  uint8_t entries[1 << WIDTH];

  explicit WideTable(const uint8_t *from) { memcpy(entries, from, sizeof entries); }
};

// The entry at the low WIDTH bits of each byte.
template <int WIDTH>
TQ_INLINE Bytes lookup(const WideTable<WIDTH> &table, Bytes index) {
  for (int i = 0; i < 4; i++) {
    uint8x16_t at = vandq_u8(index.v[i], vdupq_n_u8((1 << WIDTH) - 1));
    if constexpr (WIDTH == 5) {
      index.v[i] = vqtbl2q_u8(vld1q_u8_x2(table.entries), at);
    } else {
      // An index past the 64 entries gives 0 with the first instruction, and leaves what is there with the others.
      uint8x16_t found = vqtbl4q_u8(vld1q_u8_x4(table.entries), at);
      for (int part = 64; part < (1 << WIDTH); part += 64) {
        at = vsubq_u8(at, vdupq_n_u8(64));
        found = vqtbx4q_u8(found, vld1q_u8_x4(table.entries + part), at);
      }
      index.v[i] = found;
    }
  }
  return index;
}

// --- integers ------------------------------------------------------------------------------------------------------

TQ_INLINE Ints splat_int(int32_t a) {
  const int32x4_t v = vdupq_n_s32(a);
  return {{v, v, v, v}};
}
TQ_INLINE Ints operator+(Ints a, Ints b) {
  for (int i = 0; i < 4; i++) a.v[i] = vaddq_s32(a.v[i], b.v[i]);
  return a;
}

TQ_INLINE Quad load_quad(const int8_t *p) {
  int32_t four;
  memcpy(&four, p, 4);
  return {vreinterpretq_s8_s32(vdupq_n_s32(four))};
}

// acc[r] + sum of w[4 r + j] * x[j] over j < 4, exact.
TQ_INLINE Ints dot(Ints acc, Bytes w, Quad x) {
  for (int i = 0; i < 4; i++) acc.v[i] = vdotq_s32(acc.v[i], vreinterpretq_s8_u8(w.v[i]), x.v);
  return acc;
}

// Byte 4 r + COLUMN of each row.
template <int COLUMN>
TQ_INLINE Ints column(Bytes a) {
  Ints result;
  for (int i = 0; i < 4; i++) {
    uint32x4_t v = vreinterpretq_u32_u8(a.v[i]);
    if constexpr (COLUMN > 0) v = vshrq_n_u32(v, 8 * COLUMN);
    result.v[i] = vreinterpretq_s32_u32(vandq_u32(v, vdupq_n_u32(255)));
  }
  return result;
}

// --- floats --------------------------------------------------------------------------------------------------------

TQ_INLINE Floats splat(float a) {
  const float32x4_t v = vdupq_n_f32(a);
  return {{v, v, v, v}};
}
TQ_INLINE Floats load(const float *p) {
  return {{vld1q_f32(p), vld1q_f32(p + 4), vld1q_f32(p + 8), vld1q_f32(p + 12)}};
}
TQ_INLINE void store(float *p, Floats a) {
  for (int i = 0; i < 4; i++) vst1q_f32(p + 4 * i, a.v[i]);
}
TQ_INLINE Floats load_half(const uint16_t *p) {
  Floats result;
  for (int i = 0; i < 4; i++) result.v[i] = vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p + 4 * i)));
  return result;
}
TQ_INLINE Floats to_floats(Ints a) {
  Floats result;
  for (int i = 0; i < 4; i++) result.v[i] = vcvtq_f32_s32(a.v[i]);
  return result;
}
TQ_INLINE Floats operator+(Floats a, Floats b) {
  for (int i = 0; i < 4; i++) a.v[i] = vaddq_f32(a.v[i], b.v[i]);
  return a;
}
TQ_INLINE Floats operator*(Floats a, Floats b) {
  for (int i = 0; i < 4; i++) a.v[i] = vmulq_f32(a.v[i], b.v[i]);
  return a;
}
TQ_INLINE Floats fma(Floats a, Floats b, Floats c) {
  for (int i = 0; i < 4; i++) c.v[i] = vfmaq_f32(c.v[i], a.v[i], b.v[i]);
  return c;
}
TQ_INLINE Floats gather(const float *p, Ints index) {
  int32_t at[16];
  float values[16];
  for (int i = 0; i < 4; i++) vst1q_s32(at + 4 * i, index.v[i]);
  for (int i = 0; i < 16; i++) values[i] = p[at[i]];
  return load(values);
}

}  // namespace tq
