// Passes over the scores of a row, in the compiler's own vectors: it ends each sum of a plain loop lane by lane, which
// takes longer than the loop.
#pragma once
#include <math.h>
#include <stdint.h>
#include <string.h>

namespace tq {

#if defined(TQ_ISA_AVX512)
constexpr int VECTOR_WIDTH = 16;
#elif defined(TQ_ISA_AVX2)
constexpr int VECTOR_WIDTH = 8;
#else
constexpr int VECTOR_WIDTH = 4;
#endif
typedef float Vector __attribute__((vector_size(4 * VECTOR_WIDTH)));
typedef int32_t IntQuarter __attribute__((vector_size(16)));
typedef int32_t IntVector __attribute__((vector_size(4 * VECTOR_WIDTH)));

inline Vector load_vector(const float *p) {
  Vector v;
  memcpy(&v, p, sizeof v);
  return v;
}
inline void store_vector(float *p, Vector v) { memcpy(p, &v, sizeof v); }

// All lanes put together by `join`, which takes vectors of four.
template <class V, class Join>
auto reduce(V v, Join join) {
  typedef decltype(v[0] + 0) Quarter __attribute__((vector_size(16)));  // a register of every instruction set
  Quarter part[VECTOR_WIDTH / 4];
  memcpy(part, &v, sizeof part);
  for (int n = VECTOR_WIDTH / 8; n > 0; n /= 2) {
    for (int i = 0; i < n; i++) part[i] = join(part[i], part[i + n]);
  }
  const Quarter pairs = join(part[0], __builtin_shuffle(part[0], IntQuarter{2, 3, 0, 1}));
  return join(pairs, __builtin_shuffle(pairs, IntQuarter{1, 0, 3, 2}))[0];
}

// e^x for x <= 0, relative error 3e-7; below -87 it stays as it is there. x = n ln 2 + r; adding 1.5 * 2^23 rounds to an
// integer and leaves it in the low bits, from where it goes to the exponent of e^r. NaN stays NaN.
inline Vector exp_below(Vector x) {
  constexpr float ROUND = 12582912.f;
  const Vector least = Vector{} - 87.f;
  x = x < least ? least : x;
  const Vector shifted = x * 1.44269504f + ROUND, n = shifted - ROUND;
  const Vector r = (x - n * 0.693359375f) + n * 2.12194440e-4f;  // ln 2 in two parts, the first short: n times it is exact
  Vector p = r * 1.3981999507e-3f + 8.3334519073e-3f;            // Cephes expf
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.f;
  return (Vector)((IntVector)p + ((IntVector)shifted << 23));
}

// The functions below work on whole vectors: x goes on behind its n values.

// The largest; NaN may be passed over.
inline float largest_of(float *x, int n) {
  for (int i = n; i % VECTOR_WIDTH != 0; i++) x[i] = -INFINITY;
  Vector most = Vector{} - INFINITY;
  for (int i = 0; i < n; i += VECTOR_WIDTH) {
    const Vector v = load_vector(x + i);
    most = v > most ? v : most;
  }
  return reduce(most, [](auto a, auto b) { return a > b ? a : b; });
}

// x = e^(x - shift), whose sum is returned. What lies behind the n values must be -infinity.
inline float exponentials_of(float *x, int n, float shift) {
  Vector sum = {};
  for (int i = 0; i < n; i += VECTOR_WIDTH) {
    const Vector e = exp_below(load_vector(x + i) - shift);
    store_vector(x + i, e);
    sum += e;
  }
  return reduce(sum, [](auto a, auto b) { return a + b; });
}

// z = x * y; returns the bits of the largest |z|, which order like the floats, NaN above all.
inline int32_t products_of(const float *x, const float *y, int n, float *z) {
  IntVector most = {};
  for (int i = 0; i < n; i += VECTOR_WIDTH) {
    const Vector product = load_vector(x + i) * load_vector(y + i);
    store_vector(z + i, product);
    const IntVector bits = (IntVector)product & 0x7fffffff;
    most = bits > most ? bits : most;
  }
  return reduce(most, [](auto a, auto b) { return a > b ? a : b; });
}

}  // namespace tq
