// simd.h in plain C++, for any processor: the compiler's own vectors, which it cuts down to what there is.
#pragma once
#include <bit>

namespace tq {

static_assert(std::endian::native == std::endian::little, "vectors are taken apart, and layouts are little-endian");

constexpr int INDEX_BITS = 6;  // of a byte that lookup(Table) reads; it ignores the others
constexpr uint8_t SIGN_FLIP = 0;
constexpr int MAX_ROWS = 4;    // rows of x that a register-blocked product takes at once
constexpr int MAX_TILES = 1;   // and tiles of 16 rows of the matrix
constexpr int CHAINS = 1;      // independent sums that keep dot() busy

struct Bytes { uint8_t v __attribute__((vector_size(64))); };
struct Ints { int32_t v __attribute__((vector_size(64))); };
struct Floats { float v __attribute__((vector_size(64))); };
struct Quad { int8_t v[4]; };
struct Table { uint8_t v[64]; };

template <class T>
TQ_INLINE T load_as(const void *p) {
  T a;
  memcpy(&a, p, sizeof a);
  return a;
}

// --- bytes ---------------------------------------------------------------------------------------------------------

TQ_INLINE Bytes load_bytes(const uint8_t *p) { return load_as<Bytes>(p); }
TQ_INLINE void store_bytes(uint8_t *p, const Bytes &a) { memcpy(p, &a, sizeof a); }
TQ_INLINE Bytes splat_byte(uint8_t a) { return {a - decltype(Bytes::v){}}; }
TQ_INLINE Bytes flip(const Bytes &a, const Bytes &mask) { return {a.v ^ mask.v}; }

// mask ? a : b, bit by bit.
TQ_INLINE Bytes select(const Bytes &mask, const Bytes &a, const Bytes &b) { return {(mask.v & a.v) | (~mask.v & b.v)}; }

// Every byte shifted right by N bits, left if N < 0.
template <int N>
TQ_INLINE Bytes shift(const Bytes &a) {
  if constexpr (N > 0) return {a.v >> N};
  if constexpr (N < 0) return {a.v << -N};
  return a;
}

TQ_INLINE Table load_table(const uint8_t *entries) { return load_as<Table>(entries); }
TQ_INLINE Table to_table(const Bytes &entries) { return load_as<Table>(&entries); }

// Not inline: there is nothing to gain, and a decoder has dozens of them.
__attribute__((noinline)) inline void lookup_all(const uint8_t *entries, int mask, const uint8_t *index, uint8_t *to) {
  for (int i = 0; i < 64; i++) to[i] = entries[index[i] & mask];
}

TQ_INLINE Bytes lookup_masked(const uint8_t *entries, int mask, const Bytes &index) {
  uint8_t from[64], to[64];
  store_bytes(from, index);
  lookup_all(entries, mask, from, to);
  return load_bytes(to);
}
TQ_INLINE Bytes lookup(const Table &table, const Bytes &index) { return lookup_masked(table.v, 63, index); }

template <int WIDTH>
struct WideTable {
  uint8_t entries[1 << WIDTH];

  explicit WideTable(const uint8_t *from) { memcpy(entries, from, sizeof entries); }
};

// The entry at the low WIDTH bits of each byte.
template <int WIDTH>
TQ_INLINE Bytes lookup(const WideTable<WIDTH> &table, const Bytes &index) {
  return lookup_masked(table.entries, (1 << WIDTH) - 1, index);
}

// --- integers ------------------------------------------------------------------------------------------------------

TQ_INLINE Ints splat_int(int32_t a) { return {a - decltype(Ints::v){}}; }
TQ_INLINE Ints operator+(const Ints &a, const Ints &b) { return {a.v + b.v}; }
TQ_INLINE Quad load_quad(const int8_t *p) { return load_as<Quad>(p); }

struct Pairs { int16_t v __attribute__((vector_size(64))); };  // two per row
// Products of two columns with x, and their sum: a product of 8 bits and 8 bits fits 16.
TQ_INLINE Ints dot_pairs(const Pairs &w, int first, int second) {
  const Ints x = splat_int((first & 0xffff) | second * 65536);
  const Pairs products = {w.v * load_as<Pairs>(&x).v};
  const Ints both = load_as<Ints>(&products);
  return {(both.v << 16 >> 16) + (both.v >> 16)};
}
// acc[r] + sum of w[4 r + j] * x[j] over j < 4, exact.
TQ_INLINE Ints dot(const Ints &acc, const Bytes &w, Quad x) {
  const Pairs bytes = load_as<Pairs>(&w);
  return acc + dot_pairs({bytes.v & 255}, x.v[0], x.v[2]) + dot_pairs({bytes.v >> 8 & 255}, x.v[1], x.v[3]);
}

// Byte 4 r + COLUMN of each row.
template <int COLUMN>
TQ_INLINE Ints column(const Bytes &a) {
  return {load_as<Ints>(&a).v >> 8 * COLUMN & 255};
}

// --- floats --------------------------------------------------------------------------------------------------------

TQ_INLINE Floats splat(float a) { return {a - decltype(Floats::v){}}; }
TQ_INLINE Floats load(const float *p) { return load_as<Floats>(p); }
TQ_INLINE void store(float *p, const Floats &a) { memcpy(p, &a, sizeof a); }

// The exponent of a half, moved to that of a float, is 112 too small; infinities and NaNs keep the largest one.
inline float half_to_float(uint16_t half) {
  const uint32_t magnitude = (half & 0x7fffu) << 13;
  const float finite = std::bit_cast<float>(magnitude) * 0x1p112f;
  const uint32_t bits = magnitude >= 0x0f800000u ? magnitude | 0x7f800000u : std::bit_cast<uint32_t>(finite);
  return std::bit_cast<float>(bits | (half & 0x8000u) << 16);
}
__attribute__((noinline)) inline void load_halves(const uint16_t *p, float *to) {
  for (int i = 0; i < 16; i++) to[i] = half_to_float(p[i]);
}
TQ_INLINE Floats load_half(const uint16_t *p) {
  float values[16];
  load_halves(p, values);
  return load(values);
}
TQ_INLINE Floats to_floats(const Ints &a) { return {__builtin_convertvector(a.v, decltype(Floats::v))}; }
TQ_INLINE Floats operator+(const Floats &a, const Floats &b) { return {a.v + b.v}; }
TQ_INLINE Floats operator*(const Floats &a, const Floats &b) { return {a.v * b.v}; }
TQ_INLINE Floats fma(const Floats &a, const Floats &b, const Floats &c) { return {a.v * b.v + c.v}; }
TQ_INLINE Floats gather(const float *p, const Ints &index) {
  float values[16];
  for (int i = 0; i < 16; i++) values[i] = p[index.v[i]];
  return load(values);
}

}  // namespace tq
