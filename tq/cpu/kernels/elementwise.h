// Simple functions of float vectors: exp, norms, activations, the pieces of a softmax. Plain loops that the compiler
// vectorizes for every instruction set. NaN stays NaN in all of them, so selections are written to keep it.
#pragma once
#include <bit>
#include <cmath>

#include "internal.h"

namespace tq {

// Both leave NaN alone: a comparison with it is false.
inline float at_least(float x, float low) { return low > x ? low : x; }
inline float at_most(float x, float high) { return high < x ? high : x; }

// e^x, relative error below 2e-7 where the result is normal; 0 below -104, infinity above 88.8. x = n ln 2 + r; adding
// 1.5 * 2^23 rounds to an integer and leaves it in the low bits. 2^n in two factors reaches the ends of the range.
inline float fast_exp(float x) {
  constexpr float ROUND = 12582912.f;
  x = at_most(at_least(x, -106.f), 89.f);
  const float shifted = x * 1.44269504f + ROUND;
  const float n = shifted - ROUND;
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;  // ln 2 in two parts: n times the first is exact
  float p = 1.9875691500e-4f;  // Cephes expf
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  const float y = p * r * r + r + 1.f;
  const uint32_t integer = std::bit_cast<uint32_t>(shifted) - std::bit_cast<uint32_t>(ROUND);
  const uint32_t half = uint32_t(int32_t(integer) >> 1);
  return y * std::bit_cast<float>((half + 127) << 23) * std::bit_cast<float>((integer - half + 127) << 23);
}

inline float sigmoid(float x) { return 1.f / (1.f + fast_exp(-x)); }

inline float silu(float x) { return x * sigmoid(x); }

// x/2 (1 + tanh u), and (1 + tanh u) / 2 = sigmoid(2 u), which does not cancel for negative u.
inline float gelu_tanh(float x) { return x * sigmoid(1.5957691216f * (x + 0.044715f * x * x * x)); }

// x Phi(x); Phi by Abramowitz and Stegun 7.1.26, absolute error below 1e-7.
inline float gelu(float x) {
  const float z = std::fabs(x) * 0.70710678f;
  const float t = 1.f / (1.f + 0.3275911f * z);
  float p = 1.061405429f;
  p = p * t - 1.453152027f;
  p = p * t + 1.421413741f;
  p = p * t - 0.284496736f;
  p = p * t + 0.254829592f;
  const float tail = 0.5f * p * t * fast_exp(-z * z);
  return x * (x < 0.f ? tail : 1.f - tail);
}

inline float relu(float x) { return at_least(x, 0.f); }

// y = activation(gate) * up; y may be either of them.
inline void gated(int activation, float alpha, float limit, const float *gate, const float *up, float *y, int64_t n) {
  const auto each = [=](auto function) {
#pragma omp simd
    for (int64_t i = 0; i < n; i++) y[i] = function(gate[i], up[i]);
  };
  switch (activation) {
    case TQ_SILU:
      return each([](float g, float u) { return silu(g) * u; });
    case TQ_GELU_TANH:
      return each([](float g, float u) { return gelu_tanh(g) * u; });
    case TQ_GELU:
      return each([](float g, float u) { return gelu(g) * u; });
    case TQ_RELU:
      return each([](float g, float u) { return relu(g) * u; });
    case TQ_RELU2:
      return each([](float g, float u) { return relu(g) * relu(g) * u; });
    case TQ_SWIGLU_OAI:
      return each([=](float g, float u) {
        const float clamped = at_most(g, limit);
        return clamped * sigmoid(alpha * clamped) * (at_most(at_least(u, -limit), limit) + 1.f);
      });
  }
}

// y = x / sqrt(mean(x^2) + eps) * weight; weight may be NULL, y may be x.
inline void rms_norm(const float *x, const float *weight, float eps, int n, float *y) {
  float squares = 0.f;
#pragma omp simd reduction(+ : squares)
  for (int i = 0; i < n; i++) squares += x[i] * x[i];
  const float inverse = 1.f / std::sqrt(squares / float(n) + eps);
  if (weight) {
#pragma omp simd
    for (int i = 0; i < n; i++) y[i] = x[i] * inverse * weight[i];
  } else {
#pragma omp simd
    for (int i = 0; i < n; i++) y[i] = x[i] * inverse;
  }
}

// The largest of x; -infinity if there is none. NaN may be passed over: it shows in the sum of the exponentials.
inline float largest(const float *x, int n) {
  float result = -INFINITY;
#pragma omp simd reduction(max : result)
  for (int i = 0; i < n; i++) result = x[i] > result ? x[i] : result;
  return result;
}

// x = e^(x - shift); returns the sum.
inline float exponentials(float *x, int n, float shift) {
  float sum = 0.f;
#pragma omp simd reduction(+ : sum)
  for (int i = 0; i < n; i++) {
    x[i] = fast_exp(x[i] - shift);
    sum += x[i];
  }
  return sum;
}

}  // namespace tq
