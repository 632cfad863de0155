// The mixture of experts of a layer: logits, the choice of experts, their weights, and the experts themselves.
#include "layer_experts.h"

#include <math.h>

#include <algorithm>
#include <vector>

#include "elementwise.h"

namespace tq {
namespace {

constexpr int64_t SERIAL = 1 << 15;  // multiplications that are not worth a second thread
constexpr int TOGETHER = 4;

// Logits of one token for `count` <= TOGETHER experts from `first` on, which share each read of x.
void logits_of_row(const tq_router &router, const float *x, int hidden, int64_t first, int count, float *logits) {
  const float *w[TOGETHER];
  for (int i = 0; i < TOGETHER; i++) w[i] = router.weight + (first + std::min(i, count - 1)) * hidden;
  const float *w0 = w[0], *w1 = w[1], *w2 = w[2], *w3 = w[3];
  float a = 0.0f, b = 0.0f, c = 0.0f, d = 0.0f;
#pragma omp simd reduction(+ : a, b, c, d)
  for (int i = 0; i < hidden; i++) {
    a += x[i] * w0[i];
    b += x[i] * w1[i];
    c += x[i] * w2[i];
    d += x[i] * w3[i];
  }
  const float sums[TOGETHER] = {a, b, c, d};
  for (int i = 0; i < count; i++) logits[i] = sums[i] + (router.bias ? router.bias[first + i] : 0.0f);
}

// logits (tokens, experts).
void logits_of(const tq_layer &layer, bool exact, const float *x, int tokens, float *logits) {
  const tq_router &router = layer.router;
  const int hidden = layer.hidden, experts = router.experts;
  if (router.packed.matrix.rows > 0) {
    std::vector<float> rotated;
    if (router.packed.rotation.n > 0) {
      rotated.resize(int64_t(tokens) * hidden);
      for (int64_t t = 0; t < tokens; t++) rotate_row(router.packed.rotation, x + t * hidden, &rotated[t * hidden]);
      x = rotated.data();
    }
    const Product product{&router.packed.matrix, 0, logits, experts};
    return multiply(&product, 1, x, hidden, tokens, exact);
  }
  const auto part = [&](int i, int n) {
    const Share share(int64_t(tokens) * experts, i, n, TOGETHER);
    for (int64_t at = share.first; at < share.last;) {
      const int64_t token = at / experts, expert = at % experts;
      const int count = int(std::min({share.last - at, experts - expert, int64_t(TOGETHER)}));
      logits_of_row(router, x + token * hidden, hidden, expert, count, logits + at);
      at += count;
    }
  };
  if (int64_t(tokens) * experts * hidden <= SERIAL) {
    part(0, 1);
  } else {
    parallel(part);
  }
}

// Logits of one token become scores.
void score(const tq_router &router, float *logits) {
  const int n = router.experts;
  if (router.sigmoid) {
#pragma omp simd
    for (int i = 0; i < n; i++) logits[i] = sigmoid(logits[i]);
    return;
  }
  const float sum = exponentials(logits, n, largest(logits, n));
#pragma omp simd
  for (int i = 0; i < n; i++) logits[i] /= sum;
}

// Zeros for the values of all groups but the best.
void drop_groups(const tq_router &router, float *values) {
  const int size = router.experts / router.groups;
  std::vector<float> best(router.groups);
  for (int g = 0; g < router.groups; g++) {
    float first = -INFINITY, second = -INFINITY;
    for (int i = g * size; i < (g + 1) * size; i++) {
      second = std::max(second, std::min(first, values[i]));
      first = std::max(first, values[i]);
    }
    best[g] = first + second;
  }
  for (int dropped = router.groups - router.kept_groups; dropped > 0; dropped--) {
    const int g = std::min_element(best.begin(), best.end()) - best.begin();
    best[g] = INFINITY;
    std::fill_n(values + g * size, size, 0.0f);
  }
}

// The k best of one token, best first. Without numbers it is the first experts, with weights that are no numbers.
void choose(const tq_router &router, const float *scores, float *values, uint32_t *chosen, float *weights) {
  const int k = router.k, experts = router.experts;
  for (int i = 0; i < experts; i++) values[i] = scores[i] + (router.correction ? router.correction[i] : 0.0f);
  if (router.groups > 1) drop_groups(router, values);
  for (int i = 0; i < k; i++) weights[i] = -INFINITY, chosen[i] = i;
  for (int expert = 0; expert < experts; expert++) {
    const float value = values[expert];
    if (!(value > weights[k - 1])) continue;
    int at = k - 1;
    for (; at > 0 && value > weights[at - 1]; at--) weights[at] = weights[at - 1], chosen[at] = chosen[at - 1];
    weights[at] = value, chosen[at] = expert;
  }
  float sum = 0.0f;
  for (int i = 0; i < k; i++) sum += weights[i] = scores[chosen[i]];
  const float factor = router.normalize ? router.factor / sum : router.factor;
  for (int i = 0; i < k; i++) weights[i] *= factor;
}

}  // namespace

void choose_experts(const tq_layer &layer, bool exact, const float *x, int tokens, uint32_t *chosen, float *weights) {
  const tq_router &router = layer.router;
  const int experts = router.experts, k = router.k;
  std::vector<float> logits(int64_t(tokens) * experts);
  logits_of(layer, exact, x, tokens, logits.data());
  const auto part = [&](int i, int n) {
    const Share share(tokens, i, n);
    std::vector<float> values(experts);
    for (int64_t t = share.first; t < share.last; t++) {
      score(router, &logits[t * experts]);
      choose(router, &logits[t * experts], values.data(), chosen + t * k, weights + t * k);
    }
  };
  if (tokens == 1) {
    part(0, 1);
  } else {
    parallel(part);
  }
}

void mix_experts(const tq_layer &layer, bool exact, const float *x, int tokens, float *y) {
  const int k = layer.router.k;
  std::vector<float> weights(int64_t(tokens) * k);
  std::vector<uint32_t> chosen(int64_t(tokens) * k);
  choose_experts(layer, exact, x, tokens, chosen.data(), weights.data());
  tq_experts_params params = layer.experts;
  params.exact = exact;
  const int32_t rows[] = {tokens, layer.hidden}, choices[] = {tokens, k};
  const int64_t row_strides[] = {layer.hidden, 1}, choice_strides[] = {k, 1};
  const tq_array in[] = {
      {const_cast<float *>(x), rows, row_strides, 2, TQ_F32},
      {chosen.data(), choices, choice_strides, 2, TQ_U32},
      {weights.data(), choices, choice_strides, 2, TQ_F32},
  };
  const tq_array out[] = {{y, rows, row_strides, 2, TQ_F32}};
  tq_experts(&params, in, out);
}

}  // namespace tq
