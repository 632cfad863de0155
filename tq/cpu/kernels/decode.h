// From the packed codes of a block (layout.h) to bytes: one decoder per width, written once over simd.h.
//
// A decoder looks codes up in a table of one byte per code and hands the 16 steps of a block, in order, to a callback,
// `use(step, Bytes)`: byte 4 r + c of a step is that of row r, column 4 step + c.
#pragma once
#include <stdint.h>

#include <array>
#include <utility>

#include "layout.h"
#include "simd.h"

#define TQ_INLINE_LAMBDA __attribute__((always_inline))

namespace tq {

// Calls f(0), f(1), ... f(N - 1) with compile-time constants.
template <int N, class F>
TQ_INLINE void unrolled(F &&f) {
  [&]<int... I>(std::integer_sequence<int, I...>) TQ_INLINE_LAMBDA {
    (f(std::integral_constant<int, I>{}), ...);
  }(std::make_integer_sequence<int, N>{});
}

// Lookups of codes of 1 to 4 bits that lie side by side in bytes. A lookup reads INDEX_BITS bits of a byte, which hold
// PER_INDEX codes; the table for each of these repeats its entries over the bits of the others, so that neither a mask
// nor, but for the codes that lie too high, a shift is needed.
template <int WIDTH>
class Codes {
 public:
  explicit Codes(const uint8_t *entries) {
    const Table all = load_table(entries);
    unrolled<PER_INDEX>([&](auto position) TQ_INLINE_LAMBDA {
      const Bytes repeated = lookup(all, load_bytes(REPEATED<WIDTH * position>.data()));
      tables_[position] = to_table(flip(repeated, splat_byte(SIGN_FLIP)));
    });
  }

  // The bytes of the codes at bits [WIDTH * N, WIDTH * (N + 1)).
  template <int N>
  TQ_INLINE Bytes at(const Bytes &packed) const {
    return lookup(tables_[N % PER_INDEX], shift<N / PER_INDEX * PER_INDEX * WIDTH>(packed));
  }

 private:
  static constexpr int PER_INDEX = INDEX_BITS / WIDTH;

  // Which code stands at bit OFFSET of every index.
  template <int OFFSET>
  static constexpr std::array<uint8_t, LANES> REPEATED = [] {
    std::array<uint8_t, LANES> code{};
    for (int i = 0; i < LANES; i++) code[i] = (i >> OFFSET) & ((1 << WIDTH) - 1);
    return code;
  }();

  Table tables_[PER_INDEX];
};

// Codes of 5 to 8 bits, one per byte of the index.
template <int WIDTH>
WideTable<WIDTH> wide_table(const uint8_t *entries) {
  alignas(LANES) uint8_t flipped[256];
  for (int i = 0; i < 256; i += LANES) store_bytes(flipped + i, flip(load_bytes(entries + i), splat_byte(SIGN_FLIP)));
  return WideTable<WIDTH>(flipped);
}

// 1, 2, 4 bits: 8 / BITS steps in each vector.
template <int BITS>
struct Decoder {
  Codes<BITS> codes;
  explicit Decoder(const uint8_t *table) : codes(table) {}

  template <class F>
  TQ_INLINE void operator()(const uint8_t *block, F &&use) const {
    constexpr int PER_BYTE = 8 / BITS;
    unrolled<STEPS / PER_BYTE>([&](auto v) TQ_INLINE_LAMBDA {
      const Bytes packed = load_bytes(block + LANES * v);
      unrolled<PER_BYTE>([&](auto n) TQ_INLINE_LAMBDA { use(PER_BYTE * v + n, codes.template at<n>(packed)); });
    });
  }
};

// 3 bits: two in each of three vectors, and two more in the top bits of all three.
template <>
struct Decoder<3> {
  Codes<3> codes;
  explicit Decoder(const uint8_t *table) : codes(table) {}

  template <class F>
  TQ_INLINE void operator()(const uint8_t *block, F &&use) const {
    unrolled<2>([&](auto half) TQ_INLINE_LAMBDA {
      const uint8_t *p = block + 3 * LANES * half;
      const Bytes packed[3] = {load_bytes(p), load_bytes(p + LANES), load_bytes(p + 2 * LANES)};
      unrolled<3>([&](auto v) TQ_INLINE_LAMBDA {
        use(8 * half + 2 * v, codes.template at<0>(packed[v]));
        use(8 * half + 2 * v + 1, codes.template at<1>(packed[v]));
      });
      const Bytes upper = select(splat_byte(0x0c), shift<4>(packed[1]), shift<2>(packed[2]));
      const Bytes top = select(splat_byte(0x03), shift<6>(packed[0]), upper);
      use(8 * half + 6, codes.template at<0>(top));
      use(8 * half + 7, codes.template at<1>(top));
    });
  }
};

// 5, 6, 7 bits: planes of 4, 2 and 1 bits, put together to an index.
template <int BITS>
  requires(BITS >= 5 && BITS <= 7)
struct Decoder<BITS> {
  WideTable<BITS> table;
  explicit Decoder(const uint8_t *entries) : table(wide_table<BITS>(entries)) {}

  template <class F>
  TQ_INLINE void operator()(const uint8_t *block, F &&use) const {
    constexpr bool TWO = BITS >= 6, ONE = BITS % 2 == 1;
    constexpr int TWO_AT = STEPS / 2 * LANES, ONE_AT = TWO_AT + (TWO ? STEPS / 4 * LANES : 0);
    Bytes four{}, two{}, one{};
    unrolled<STEPS>([&](auto step) TQ_INLINE_LAMBDA {
      if constexpr (step % 2 == 0) four = load_bytes(block + LANES * (step / 2));
      if constexpr (TWO && step % 4 == 0) two = load_bytes(block + TWO_AT + LANES * (step / 4));
      if constexpr (ONE && step % 8 == 0) one = load_bytes(block + ONE_AT + LANES * (step / 8));
      const Bytes high_two = shift<2 * (step % 4) - 4>(two);
      const Bytes high_one = shift<step % 8 - (BITS - 1)>(one);
      const Bytes high = !TWO ? high_one : !ONE ? high_two : select(splat_byte(0x30), high_two, high_one);
      use(step, lookup(table, select(splat_byte(0x0f), shift<4 * (step % 2)>(four), high)));
    });
  }
};

template <>
struct Decoder<8> {
  WideTable<8> table;
  explicit Decoder(const uint8_t *entries) : table(wide_table<8>(entries)) {}

  template <class F>
  TQ_INLINE void operator()(const uint8_t *block, F &&use) const {
    unrolled<STEPS>([&](auto step) TQ_INLINE_LAMBDA { use(step, lookup(table, load_bytes(block + LANES * step))); });
  }
};

// decode.cpp: the bytes [count][16][64] of consecutive blocks; table is [256]. Prefetches what follows them.
void decode_blocks(int bits, const uint8_t *table, const uint8_t *blocks, int count, uint8_t *bytes);

// Calls f.operator()<BITS>() for a width known at run time.
template <class F>
void with_bits(int bits, F &&f) {
  switch (bits) {
    case 1: return f.template operator()<1>();
    case 2: return f.template operator()<2>();
    case 3: return f.template operator()<3>();
    case 4: return f.template operator()<4>();
    case 5: return f.template operator()<5>();
    case 6: return f.template operator()<6>();
    case 7: return f.template operator()<7>();
    default: return f.template operator()<8>();
  }
}

}  // namespace tq
