// What the files of the kernel library ask of each other.
#pragma once
#include <stddef.h>
#include <stdint.h>

#include <type_traits>

#include "layout.h"
#include "tq_cpu.h"

namespace tq {

// pool.cpp: `part(context, i, n)` runs once for each i < n = threads(), on as many threads, the caller's among them. A
// call from inside a part, or while another thread has the pool, is one part, of n = 1, on the caller's own thread.
int threads();
void run(void (*part)(void *, int, int), void *context);

template <class F>
void parallel(F &&f) {
  using Part = std::remove_reference_t<F>;
  run([](void *context, int i, int n) { (*static_cast<Part *>(context))(i, n); },
      const_cast<void *>(static_cast<const void *>(&f)));
}

// The share of part i of n in `count` things, in units of `step`: [first, last).
struct Share {
  int64_t first, last;
  Share(int64_t count, int i, int n, int64_t step = 1) {
    const int64_t units = (count + step - 1) / step;
    first = units * i / n * step;
    last = units * (i + 1) / n * step;
    if (last > count) last = count;
  }
};

// pool.cpp: memory of this thread, 64-byte aligned, its contents undefined. The next call for the same slot on the same
// thread may move it.
enum Slot { ACTIVATIONS, PANEL, HIDDEN, SCORES, ACCUMULATORS, LAYER, EXPERTS = LAYER + 8, SLOTS = EXPERTS + 4 };
void *scratch_bytes(int slot, size_t bytes);
template <class T>
T *scratch(int slot, size_t count) {
  return static_cast<T *>(scratch_bytes(slot, count * sizeof(T)));
}

// Elements of an array. Where rows are expected, their axes may be several.
inline int64_t size_of(const tq_array &a) {
  int64_t size = 1;
  for (int axis = 0; axis < a.ndim; axis++) size *= a.shape[axis];
  return size;
}

// rotate.cpp: one row on the calling thread; y may be x.
void rotate_row(const tq_rotation &rotation, const float *x, float *y);
void unrotate_row(const tq_rotation &rotation, const float *x, float *y);

// pack.cpp: the codes of one block, byte c of steps[s][r] being that of row r, column 4 s + c, in memory order.
void pack_block(const uint32_t (&steps)[STEPS][TILE_ROWS], int bits, uint8_t *block);

// matmul.cpp: products of the same rotated rows x (rows, columns) with several matrices, as one parallel step:
// y = x W^T + bias. x is quantized to int8 once, unless exact.
struct Product {
  const tq_matrix *matrix;
  int expert;
  float *y;
  int64_t y_stride;
};
void multiply(const Product *products, int n_products, const float *x, int64_t x_stride, int rows, bool exact);

// gather.cpp: the same with a matrix per row: row i of y is x[x_row ? x_row[i] : i] times that of expert[i]. All
// matrices have the same columns and experts.
struct GatheredProduct {
  const tq_matrix *matrix;
  float *y;
  int64_t y_stride;
};
void multiply_gathered(const GatheredProduct *products, int n_products, const float *x, int64_t x_stride,
                       const int32_t *x_row, const uint32_t *expert, int rows, bool exact);

// experts.cpp: the sum (columns) of what the k experts of a token say (k, columns), times their weights.
void sum_experts(const float *terms, const float *weights, int k, int columns, float *sum);

// attention.cpp: queries q[h * head_stride + i * row_stride] (i < n_queries) of one sequence against the segments of
// `params`. key_batch and value_batch of the segments are not read. out has the layout of q, with value_dim.
struct Strided {
  float *data;
  int64_t head_stride, row_stride;
};
void attend(const tq_attend_params &params, Strided q, int n_queries, Strided out);

}  // namespace tq
