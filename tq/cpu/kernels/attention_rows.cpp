// The online softmax of attention: weights of a chunk of scores, and the sum of two walks.
#include "attention_rows.h"

#include <float.h>
#include <math.h>
#include <string.h>

#include <algorithm>

#include "attention_packed.h"
#include "attention_vector.h"
#include "elementwise.h"

namespace tq {
namespace {

// The score of a token that a row does not see. Finite, so that a row that sees nothing takes the mean of all, as in MLX.
constexpr float UNSEEN = -FLT_MAX;

void scale_row(float factor, int n, float *x) {
#pragma omp simd
  for (int i = 0; i < n; i++) x[i] *= factor;
}

void add_row(float factor, const float *x, int n, float *y) {
#pragma omp simd
  for (int i = 0; i < n; i++) y[i] += factor * x[i];
}

// e^(x - largest), x <= largest, where both may be -infinity.
float weight_of(float x, float largest) { return exp_below(Vector{} + (x - (largest == -INFINITY ? 0.f : largest)))[0]; }

}  // namespace

void cut(Partial &partial, int count, int value_width, bool packed, Cutter &memory) {
  partial.largest = memory.take<float>(count);
  partial.weight = memory.take<float>(count);
  partial.sums = memory.take<float>(size_t(count) * value_width);
  partial.rotated = packed ? memory.take<float>(size_t(count) * value_width) : nullptr;
}

void Rows::cut(Cutter &memory) {
  queries = memory.take<float>(size_t(count) * head_width);
  scores = memory.take<float>(size_t(count) * CHUNK_TOKENS);
  if (!packed) return;
  turned = memory.take<float>(size_t(count) * head_width);
  const size_t n = size_t(count) * query_blocks(params->code.keys);
  codes = {memory.take<int8_t>(n * BLOCK_COLUMNS), memory.take<float>(n), memory.take<int32_t>(2 * n), count};
}

void Rows::begin() {
  std::fill_n(state.largest, count, -INFINITY);
  std::fill_n(state.weight, count, 0.f);
  std::fill_n(state.sums, size_t(count) * value_width, 0.f);
  if (packed) std::fill_n(state.rotated, size_t(count) * value_width, 0.f);
}

bool Rows::unseen(int r, int n, int position, int tokens) const {
  const int first = params->position + query(r), last = params->position + query(r + n - 1);
  const bool later = params->causal && last < position;
  const bool earlier = params->window > 0 && position + tokens - 1 <= first - params->window;
  return !blind && (later || earlier);
}

void Rows::weigh(int r, float *scores, int n, int position, int hidden) {
  const tq_attend_params &p = *params;
  if (p.softcap > 0) {  // cap * tanh(score / cap)
    const float factor = 2.f / p.softcap, cap = p.softcap;
#pragma omp simd
    for (int t = 0; t < n; t++) scores[t] = cap - 2.f * cap / (fast_exp(scores[t] * factor) + 1.f);
  }
  if (mask) {
    const int64_t at =
        batch * mask->batch_stride + head(r) * mask->head_stride + query(r) * mask->query_stride + position;
    if (mask->dtype == TQ_BOOL) {
      const uint8_t *visible = static_cast<const uint8_t *>(mask->data) + at;
#pragma omp simd
      for (int t = hidden; t < n; t++) scores[t] = visible[t] ? scores[t] : UNSEEN;
    } else {
      const float *added = static_cast<const float *>(mask->data) + at;
#pragma omp simd
      for (int t = hidden; t < n; t++) scores[t] += added[t];
    }
  }
  const int64_t own = int64_t(p.position) + query(r) - position;  // index of the query's own token in the chunk
  if (p.causal && own < n - 1) std::fill(scores + std::max<int64_t>(own + 1, 0), scores + n, UNSEEN);
  if (p.window > 0 && own - p.window >= 0) std::fill_n(scores, std::min<int64_t>(own - p.window + 1, n), UNSEEN);
  std::fill_n(scores, std::min(hidden, n), -INFINITY);

  const float before = state.largest[r], now = std::max(before, largest_of(scores, n));
  if (now > before) {
    const float factor = weight_of(before, now);
    state.largest[r] = now;
    state.weight[r] *= factor;
    scale_row(factor, value_width, state.sums + int64_t(r) * value_width);
    if (packed) scale_row(factor, value_width, state.rotated + int64_t(r) * value_width);
  }
  state.weight[r] += exponentials_of(scores, n, now == -INFINITY ? 0.f : now);
}

void merge(const Partial &from, int count, int value_width, Partial &into) {
  for (int r = 0; r < count; r++) {
    const float largest = std::max(from.largest[r], into.largest[r]);
    const float a = weight_of(from.largest[r], largest), b = weight_of(into.largest[r], largest);
    into.largest[r] = largest;
    into.weight[r] = b * into.weight[r] + a * from.weight[r];
    const int64_t at = int64_t(r) * value_width;
    for (float *Partial::*sums : {&Partial::sums, &Partial::rotated}) {
      if (!(into.*sums)) continue;
      scale_row(b, value_width, into.*sums + at);
      add_row(a, from.*sums + at, value_width, into.*sums + at);
    }
  }
}

}  // namespace tq
