// simd.h for AVX512 with AMX, whose tile unit multiplies eight rows of activations with a block of 16 rows of weights in
// one instruction. Only products of many rows use it (panel.cpp); the rest is that of AVX512, and so are all results.
#pragma once
#include "simd_avx512.h"

#ifdef TQ_TILES
#include TQ_TILES  // a test's stand-in for the intrinsics and for request_tiles()
#else
#include <sys/syscall.h>
#include <unistd.h>

namespace tq {

// Asks the system for the tile registers, which are large: a process that has not asked is killed when it uses them.
inline bool request_tiles() {
  constexpr int ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18;
  return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
}

}  // namespace tq
#endif

namespace tq {

constexpr bool HAS_TILE_UNIT = true;

// The shapes of the tile registers, for this thread while the object lives. 0 and 1 are sums: MAX_ROWS rows of 16 int32.
// 2 is as many rows of 64 int8 activations, 3 the 16 steps of 64 bytes of a block of weights; 4 and 5 are half of that.
class TileUnit {
 public:
  TileUnit() {
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {64, 64, 64, 64, 32, 64};
      uint8_t rows[16] = {MAX_ROWS, MAX_ROWS, MAX_ROWS, 16, MAX_ROWS, 8};
    } shapes;
    static_assert(sizeof shapes == 64);
    _tile_loadconfig(&shapes);
  }
  ~TileUnit() { _tile_release(); }
  TileUnit(const TileUnit &) = delete;
};

// sums[t][r][16] = the products of N_STEPS steps of tile t, which are byte_stride apart, with MAX_ROWS rows of codes.
// N_STEPS is 16 or 8: a block or half of one.
template <int TILES, int N_STEPS>
TQ_INLINE void tile_products(const uint8_t *bytes, int64_t byte_stride, const int8_t *codes, int32_t *sums) {
  static_assert(TILES <= 2 && (N_STEPS == 16 || N_STEPS == 8));
// Numbers of registers are part of the instructions.
#define TQ_PRODUCT(sum, rows, steps)                         \
  _tile_zero(sum);                                           \
  _tile_loadd(steps, bytes + sum * byte_stride, 64);         \
  _tile_dpbsud(sum, rows, steps); /* signed times unsigned */ \
  _tile_stored(sum, sums + sum * MAX_ROWS * 16, 64)
  if constexpr (N_STEPS == 16) {
    _tile_loadd(2, codes, 64);
    TQ_PRODUCT(0, 2, 3);
    if constexpr (TILES == 2) { TQ_PRODUCT(1, 2, 3); }
  } else {
    _tile_loadd(4, codes, 64);
    TQ_PRODUCT(0, 4, 5);
    if constexpr (TILES == 2) { TQ_PRODUCT(1, 4, 5); }
  }
#undef TQ_PRODUCT
}

TQ_INLINE Ints load_ints(const int32_t *p) { return {_mm512_loadu_si512(p)}; }

}  // namespace tq
