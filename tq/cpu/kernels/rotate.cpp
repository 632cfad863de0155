// The randomized Hadamard rotation y = H (signs * x) of tq/engine/quantize/rotation.py, and its inverse.
//
// H works on blocks of m * p values, p a power of two, as H_m on the rows and H_p on the columns of an (m, p) matrix.
// H_p is butterflies (a, b) -> (a + b, a - b) at distances 1, 2, 4 ... p / 2: within vectors first, then between them.
#include <math.h>
#include <string.h>

#include <utility>

#include "internal.h"

namespace tq {
namespace {

#if defined(TQ_ISA_AVX512)
constexpr int WIDTH = 16;
#elif defined(TQ_ISA_AVX2)
constexpr int WIDTH = 8;
#else
constexpr int WIDTH = 4;
#endif
typedef float Vector __attribute__((vector_size(4 * WIDTH)));

constexpr int64_t SERIAL = 1 << 14;  // floats that are not worth a second thread

inline Vector load(const float *x) {
  Vector v;
  memcpy(&v, x, sizeof v);
  return v;
}

inline void store(float *x, Vector v) { memcpy(x, &v, sizeof v); }

template <int distance, int... lane>
inline Vector butterfly(Vector v, std::integer_sequence<int, lane...>) {
  constexpr Vector sign = {(lane & distance ? -1.f : 1.f)...};
  return v * sign + __builtin_shufflevector(v, v, (lane ^ distance)...);
}

inline Vector butterflies_within(Vector v) {
  constexpr std::make_integer_sequence<int, WIDTH> lanes;
  v = butterfly<1>(v, lanes);
  v = butterfly<2>(v, lanes);
  if constexpr (WIDTH > 4) v = butterfly<4>(v, lanes);
  if constexpr (WIDTH > 8) v = butterfly<8>(v, lanes);
  return v;
}

// Two distances in one pass over memory; the last one alone if their number is odd.
void butterflies_between(float *x, int p) {
  int step = WIDTH;
  for (; 4 * step <= p; step *= 4) {
    for (int begin = 0; begin < p; begin += 4 * step) {
      for (int i = begin; i < begin + step; i += WIDTH) {
        const Vector a = load(x + i), b = load(x + i + step), c = load(x + i + 2 * step), d = load(x + i + 3 * step);
        const Vector ab = a + b, a_b = a - b, cd = c + d, c_d = c - d;
        store(x + i, ab + cd);
        store(x + i + step, a_b + c_d);
        store(x + i + 2 * step, ab - cd);
        store(x + i + 3 * step, a_b - c_d);
      }
    }
  }
  if (2 * step <= p) {
    for (int i = 0; i < step; i += WIDTH) {
      const Vector a = load(x + i), b = load(x + i + step);
      store(x + i, a + b);
      store(x + i + step, a - b);
    }
  }
}

// y = scale * H_p (signs * x), H_p of ones and minus ones; no signs if NULL. y may be x.
void power_of_two(const float *x, const float *signs, float scale, float *y, int p) {
  if (p < WIDTH) {
    for (int i = 0; i < p; i++) y[i] = scale * (signs ? signs[i] * x[i] : x[i]);
    for (int step = 1; step < p; step *= 2) {
      for (int i = 0; i < p; i++) {
        if (i & step) continue;
        const float a = y[i], b = y[i + step];
        y[i] = a + b;
        y[i + step] = a - b;
      }
    }
    return;
  }
  for (int i = 0; i < p; i += WIDTH) {
    const Vector scaled = load(x + i) * scale;
    store(y + i, butterflies_within(signs ? scaled * load(signs + i) : scaled));
  }
  butterflies_between(y, p);
}

// H_m, or its transpose, times one column (or WIDTH neighbouring ones) of an (m, p) matrix, in place.
template <int m, bool transposed, class T>
inline void multiply_columns(const float *factor, float *x, int p) {
  constexpr int row_stride = transposed ? 1 : m, column_stride = transposed ? m : 1;
  T column[m];
  for (int b = 0; b < m; b++) memcpy(&column[b], x + b * p, sizeof(T));
  for (int a = 0; a < m; a += 4) {  // four sums that do not wait for each other
    T sums[4] = {};
    for (int b = 0; b < m; b++) {
      for (int k = 0; k < 4; k++) sums[k] += column[b] * factor[(a + k) * row_stride + b * column_stride];
    }
    for (int k = 0; k < 4; k++) memcpy(x + (a + k) * p, &sums[k], sizeof(T));
  }
}

template <int m, bool transposed>
void multiply_block(const float *factor, float *x, int p) {
  int i = 0;
  for (; i + WIDTH <= p; i += WIDTH) multiply_columns<m, transposed, Vector>(factor, x + i, p);
  for (; i < p; i++) multiply_columns<m, transposed, float>(factor, x + i, p);
}

template <bool transposed>
void multiply_block(const tq_rotation &rotation, float *x) {
  const int p = rotation.block / rotation.m;
  switch (rotation.m) {
    case 12: return multiply_block<12, transposed>(rotation.factor, x, p);
    case 20: return multiply_block<20, transposed>(rotation.factor, x, p);
    case 28: return multiply_block<28, transposed>(rotation.factor, x, p);
  }
}

}  // namespace

void rotate_row(const tq_rotation &rotation, const float *x, float *y) {
  const int p = rotation.block / rotation.m;
  const float scale = 1.f / sqrtf(float(p));
  for (int begin = 0; begin < rotation.n; begin += rotation.block) {
    for (int i = begin; i < begin + rotation.block; i += p) power_of_two(x + i, rotation.signs + i, scale, y + i, p);
    multiply_block<false>(rotation, y + begin);
  }
}

void unrotate_row(const tq_rotation &rotation, const float *x, float *y) {
  const int p = rotation.block / rotation.m;
  const float scale = 1.f / sqrtf(float(p));
  for (int begin = 0; begin < rotation.n; begin += rotation.block) {
    for (int i = begin; i < begin + rotation.block; i += p) power_of_two(x + i, nullptr, scale, y + i, p);
    multiply_block<true>(rotation, y + begin);
  }
#pragma omp simd
  for (int i = 0; i < rotation.n; i++) y[i] *= rotation.signs[i];
}

}  // namespace tq

void tq_rotate(const void *params, const tq_array *in, const tq_array *out) {
  using namespace tq;
  const auto &rotate = *static_cast<const tq_rotate_params *>(params);
  const tq_rotation &rotation = rotate.rotation;
  const auto *x = static_cast<const float *>(in[0].data);
  auto *y = static_cast<float *>(out[0].data);
  int64_t size = 1;
  for (int axis = 0; axis < in[0].ndim; axis++) size *= in[0].shape[axis];
  if (rotation.n == 0) {
    memcpy(y, x, size * sizeof(float));
    return;
  }
  const auto rows = [&](int64_t first, int64_t last) {
    for (int64_t i = first * rotation.n; i < last * rotation.n; i += rotation.n) {
      rotate.inverse ? unrotate_row(rotation, x + i, y + i) : rotate_row(rotation, x + i, y + i);
    }
  };
  const int64_t count = size / rotation.n;
  if (size <= SERIAL) return rows(0, count);
  parallel([&](int i, int n) {
    const Share share(count, i, n);
    rows(share.first, share.last);
  });
}
