// Products of small float32 matrices in the caches, from register tiles.
#pragma once
#include "attention_simd.h"
#include "decode.h"
#include "layout.h"

namespace tq {

// c (R, 16 V) = a (R, k) b (k, 16 V), or that added to c.
template <int R, int V>
void product_tile(const float *a, int64_t a_row, const float *b, int64_t b_row, float *c, int64_t c_row, int k,
                  bool add) {
  Floats sums[R][V];
  unrolled<R>([&](auto r) TQ_INLINE_LAMBDA {
    unrolled<V>([&](auto v) TQ_INLINE_LAMBDA { sums[r][v] = add ? load(c + r * c_row + TILE_ROWS * v) : splat(0); });
  });
  for (int i = 0; i < k; i++) {
    Floats row[V];
    unrolled<V>([&](auto v) TQ_INLINE_LAMBDA { row[v] = load(b + i * b_row + TILE_ROWS * v); });
    unrolled<R>([&](auto r) TQ_INLINE_LAMBDA {
      const Floats factor = splat(a[r * a_row + i]);
      unrolled<V>([&](auto v) TQ_INLINE_LAMBDA { sums[r][v] = fma(factor, row[v], sums[r][v]); });
    });
  }
  unrolled<R>([&](auto r) TQ_INLINE_LAMBDA {
    unrolled<V>([&](auto v) TQ_INLINE_LAMBDA { store(c + r * c_row + TILE_ROWS * v, sums[r][v]); });
  });
}

// The same for any number of rows and vectors.
inline void product(const float *a, int64_t a_row, const float *b, int64_t b_row, float *c, int64_t c_row, int rows,
                    int vectors, int k, bool add) {
  for (int v = 0; v < vectors;) {
    with_all_or_one<GEMM_VECTORS>(vectors - v, [&]<int V>() {
      for (int r = 0; r < rows; r += GEMM_ROWS) {
        with_count<GEMM_ROWS>(rows - r, [&]<int R>() {
          product_tile<R, V>(a + r * a_row, a_row, b + TILE_ROWS * v, b_row, c + r * c_row + TILE_ROWS * v, c_row, k, add);
        });
      }
      v += V;
    });
  }
}

}  // namespace tq
