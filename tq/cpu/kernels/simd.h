// The seam between kernels and instruction sets: a kernel includes this file and names no instruction.
//
// Each simd_<isa>.h defines the same names in namespace tq:
//   Bytes   64 bytes: one byte of 16 rows x 4 columns (layout.h), or any packed vector of a block
//   Ints    16 int32, one per row            Floats  16 float32, one per row
//   Quad    four int8 activations, repeated  Table   a lookup table of 2^INDEX_BITS bytes
//   WideTable<WIDTH>  a lookup table of 2^WIDTH bytes, WIDTH 5 to 8
// SIGN_FLIP is 0x80 where dot() reads its bytes as signed: tables are then stored with that bit inverted, so that a
// decoded byte always stands for `byte - BYTE_ZERO`.
#pragma once
#include <stdint.h>
#include <string.h>

#define TQ_INLINE inline __attribute__((always_inline))

#if defined(TQ_ISA_AMX)
#include "simd_amx.h"
#elif defined(TQ_ISA_AVX512)
#include "simd_avx512.h"
#elif defined(TQ_ISA_AVX2)
#include "simd_avx2.h"
#elif defined(TQ_ISA_NEON)
#include "simd_neon.h"
#elif defined(TQ_ISA_GENERIC)
#include "simd_generic.h"
#else
#error "define one of TQ_ISA_AVX512 (with or without TQ_ISA_AMX), TQ_ISA_AVX2, TQ_ISA_NEON, TQ_ISA_GENERIC"
#endif

namespace tq {

constexpr int BYTE_ZERO = SIGN_FLIP ? 128 : 0;

#if !defined(TQ_ISA_AMX)
constexpr bool HAS_TILE_UNIT = false;
struct TileUnit {};
#endif

// Into the second-level cache, which can wait for more lines at once than the first. The address may lie past the end
// of its array.
TQ_INLINE void prefetch(const void *p) { __builtin_prefetch(p, 0, 2); }

}  // namespace tq
