// The mixture of experts of a layer: which experts a token goes to, and the sum of what they say.
#pragma once
#include "internal.h"
#include "tq_layer.h"

namespace tq {

inline float dot(const float *x, const float *y, int n) {
  float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
  for (int i = 0; i < n; i++) sum += x[i] * y[i];
  return sum;
}

// The k experts of each token, best first, and their weights, both (tokens, k); x (tokens, hidden).
void choose_experts(const tq_layer &layer, bool exact, const float *x, int tokens, uint32_t *chosen, float *weights);

// y (tokens, hidden) = the weighted sum over the experts of each token; x (tokens, hidden).
void mix_experts(const tq_layer &layer, bool exact, const float *x, int tokens, float *y);

}  // namespace tq
