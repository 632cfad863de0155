// The choice of the next token: one pass for the log-probabilities, and what temperature, top-p, min-p and top-k keep.
#include <math.h>

#include <algorithm>
#include <functional>

#include "elementwise.h"
#include "internal.h"

namespace tq {
namespace {

constexpr int BLOCK = 256;  // sums of so many weights lead to the sampled token without a long chain of additions

// weights[i] = exp((logits[i] - top) * inverse_temperature), or 0 below the threshold. Returns their sum.
double exponentials(const float *logits, int n, float top, float inverse_temperature, float threshold, float *weights) {
  double total = 0;
  for (int first = 0; first < n; first += BLOCK) {
    const int last = std::min(n, first + BLOCK);
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int i = first; i < last; i++) {
      const float weight = fast_exp((logits[i] - top) * inverse_temperature);
      weights[i] = logits[i] < threshold ? 0.0f : weight;  // NaN stays
      sum += weights[i];
    }
    total += sum;
  }
  return total;
}

// The smallest logit that top-p and top-k keep: tokens whose more likely ones sum to less than top_p, the first top_k.
// Only tokens near the top are sorted; the margin grows until they suffice.
float nucleus_threshold(const tq_sample_params &p, const float *logits, int n, float top, double total) {
  const int wanted = p.top_k > 0 ? std::min(p.top_k, n) : n;
  if (p.top_p >= 1.0f && wanted == n) return -INFINITY;
  float *kept = scratch<float>(HIDDEN, n);
  for (const float margin : {3.0f, 6.0f, 12.0f, 24.0f, INFINITY}) {
    int count = 0;
    for (int i = 0; i < n; i++) {
      kept[count] = logits[i];
      count += logits[i] >= top - margin;
    }
    std::sort(kept, kept + count, std::greater<float>());
    double before = 0;
    for (int i = 0; i < count; i++) {
      if (i == wanted || before >= p.top_p * total) return kept[i - 1];
      before += expf(kept[i] - top);
    }
    if (count == wanted) return kept[count - 1];
  }
  return -INFINITY;
}

}  // namespace
}  // namespace tq

using namespace tq;

void tq_sample(const void *params, const tq_array *in, const tq_array *out) {
  const auto &p = *static_cast<const tq_sample_params *>(params);
  const auto *logits = static_cast<const float *>(in[0].data);
  const float uniform = *static_cast<const float *>(in[1].data);
  const int n = in[0].shape[in[0].ndim - 1];
  float *weights = scratch<float>(SCORES, n);

  const float top = largest(logits, n);
  const double total = exponentials(logits, n, top, 1.0f, -INFINITY, weights);
  int token = 0;
  if (p.temperature == 0) {
    while (token < n - 1 && logits[token] != top) token++;
  } else {
    const float floor = p.min_p > 0 ? top + logf(p.min_p) : -INFINITY;
    const float threshold = std::max(floor, nucleus_threshold(p, logits, n, top, total));
    const double sum = exponentials(logits, n, top, 1.0f / p.temperature, threshold, weights);
    double rest = uniform * sum;
    int block = 0;
    for (; block + BLOCK < n; block += BLOCK) {
      float here = 0;
#pragma omp simd reduction(+ : here)
      for (int i = block; i < block + BLOCK; i++) here += weights[i];
      if (rest < here) break;
      rest -= here;
    }
    // Rounding may leave a rest after the last token: then it is the last one with a weight that was passed.
    for (int i = block, passed = -1; i < n; i++) {
      if (weights[i] > 0) passed = i;
      if (passed >= 0) token = passed;
      rest -= weights[i];
      if (rest < 0 && weights[i] > 0) break;
    }
    if (!(weights[token] > 0)) token = int(std::max_element(logits, logits + n) - logits);
  }
  *static_cast<uint32_t *>(out[0].data) = uint32_t(token);
  *static_cast<float *>(out[1].data) = logits[token] - top - float(log(total));
}
