// Scales and codes of groups of weights: tq/engine/quantize/scales.py `best_scales`, which says what is searched and
// why, compiled. It differs from it in the order of sums only.
#include <float.h>
#include <math.h>

#include "internal.h"
#include "kv_half.h"

namespace tq {
namespace {

// The vectors of this processor, in the compiler's own terms: loops over a codebook inside loops over weights are more
// than it vectorizes by itself.
#if defined(TQ_ISA_AVX512)
constexpr int WIDTH = 16;
#elif defined(TQ_ISA_AVX2)
constexpr int WIDTH = 8;
#else
constexpr int WIDTH = 4;
#endif
typedef float Lanes __attribute__((vector_size(4 * WIDTH), aligned(4), may_alias));
typedef int32_t Counts __attribute__((vector_size(4 * WIDTH)));
typedef uint8_t Codes __attribute__((vector_size(WIDTH), aligned(1), may_alias));

constexpr int FEW_LEVELS = 16;  // up to which comparisons are cheaper than a table

Lanes load(const float *x) { return *reinterpret_cast<const Lanes *>(x); }

float sum_of(Lanes lanes) {
  float sum = 0;
  for (int i = 0; i < WIDTH; i++) sum += lanes[i];
  return sum;
}

// Levels by comparison with each boundary between magnitudes.
template <int BOUNDARIES>
struct ByComparison {
  float first, boundaries[BOUNDARIES + 1], steps[BOUNDARIES + 1];
  explicit ByComparison(const tq_nearest &nearest) {
    const int n = nearest.n_levels, middle = (n - 1) / 2;  // the level below, or at, zero
    const float *positive = nearest.levels + n / 2;        // from the one at or above zero
    first = positive[0];
    for (int i = 0; i < BOUNDARIES; i++) {
      boundaries[i] = nearest.boundaries[middle + 1 - (n % 2) + i];
      steps[i] = positive[i + 1] - positive[i];
    }
  }
  // Sums of |x| level and level^2 over a group, with levels nearest to x * inverse.
  void sums(const float *x, int n, float inverse, float &xq, float &qq) const {
    const auto add = [&](Lanes values, Lanes &product, Lanes &square) __attribute__((always_inline)) {
      const Lanes magnitude = values < 0.0f ? -values : values, scaled = magnitude * inverse;
      Lanes level = Lanes{} + first;
#pragma GCC unroll 8
      for (int b = 0; b < BOUNDARIES; b++) level += scaled > boundaries[b] ? Lanes{} + steps[b] : Lanes{};
      product += magnitude * level;
      square += level * level;
    };
    Lanes product = {}, square = {};
    int i = 0;
    for (; i + WIDTH <= n; i += WIDTH) add(load(x + i), product, square);
    xq = sum_of(product), qq = sum_of(square);
    for (; i < n; i++) {
      Lanes one_product = {}, one_square = {};
      add(Lanes{} + x[i], one_product, one_square);
      xq += one_product[0], qq += one_square[0];
    }
  }
};

// Levels by a table of small cells, as NearestLevel.rough_levels.
struct ByTable {
  const tq_nearest &nearest;
  explicit ByTable(const tq_nearest &nearest) : nearest(nearest) {}
  void sums(const float *x, int n, float inverse, float &xq, float &qq) const {
    const float factor = inverse * nearest.cells_per_unit, offset = nearest.offset, last = float(nearest.n_cells - 1);
    float product = 0, square = 0;
#pragma omp simd reduction(+ : product, square)
    for (int i = 0; i < n; i++) {
      float cell = x[i] * factor + offset;
      cell = cell > 0 ? cell : 0;
      cell = cell < last ? cell : last;
      const float level = nearest.level_of_cell[int(cell)];
      product += x[i] * level;
      square += level * level;
    }
    xq = product, qq = square;
  }
};

float inverse_of(float scale) { return scale >= FLT_MIN ? 1.0f / scale : 0.0f; }

template <class Levels>
float search(const Levels &levels, const tq_scale_search &p, const float *x) {
  float squares = 0, largest = 0;
#pragma omp simd reduction(+ : squares) reduction(max : largest)
  for (int i = 0; i < p.size; i++) {
    squares += x[i] * x[i];
    largest = fabsf(x[i]) > largest ? fabsf(x[i]) : largest;
  }
  const float rms = sqrtf(squares / float(p.size));
  float best = rms, best_gain = 0;
  const auto attempt = [&](float scale) {
    float xq, qq;
    levels.sums(x, p.size, inverse_of(scale), xq, qq);
    const float fitted = xq / (qq > 1e-30f ? qq : 1e-30f), gain = fitted * xq;
    if (gain > best_gain) best = fitted, best_gain = gain;
  };
  const float low = p.lowest * rms;
  float high = p.highest * rms;
  if (p.to_largest) high = fmaxf(high, largest / p.nearest.levels[p.nearest.n_levels - 1]);
  for (int i = 0; i < p.n_starts; i++) {
    const float share = p.n_starts > 1 ? float(i) / float(p.n_starts - 1) : 0.0f;
    attempt(low + (high - low) * share);
  }
  attempt(best);
  return fminf(best, 65504.0f);
}

void codes_of(const tq_nearest &nearest, const float *x, int n, float inverse, uint8_t *codes) {
  const float last = float(nearest.n_cells - 1);
  int i = 0;
  if (nearest.n_levels <= FEW_LEVELS) {
    for (; i + WIDTH <= n; i += WIDTH) {
      const Lanes values = load(x + i) * inverse;
      Counts below = {};
      for (int b = 0; b < nearest.n_levels - 1; b++) below -= values > nearest.boundaries[b];
      *reinterpret_cast<Codes *>(codes + i) = __builtin_convertvector(below, Codes);
    }
  }
  for (; i < n; i++) {
    const float value = x[i] * inverse;
    float cell = value * nearest.cells_per_unit + nearest.offset;
    cell = cell > 0 ? cell : 0;
    cell = cell < last ? cell : last;
    const uint8_t code = nearest.below[int(cell)];
    codes[i] = code + (code + 1 < nearest.n_levels && value > nearest.boundaries[code]);
  }
}

template <class Levels>
void run_search(const tq_scale_search &p, const float *groups, float *scales, uint8_t *codes) {
  const Levels levels(p.nearest);
  parallel([&](int part, int parts) {
    const Share share(p.n_groups, part, parts);
    for (int64_t g = share.first; g < share.last; g++) {
      const float *x = groups + g * p.size;
      scales[g] = float_of(half_of(search(levels, p, x)));
      codes_of(p.nearest, x, p.size, inverse_of(scales[g]), codes + g * p.size);
    }
  });
}

}  // namespace
}  // namespace tq

using namespace tq;

void tq_best_scales(const void *params, const float *groups, float *scales, uint8_t *codes) {
  const auto &p = *static_cast<const tq_scale_search *>(params);
  switch (p.nearest.n_levels) {
    case 2: return run_search<ByComparison<0>>(p, groups, scales, codes);
    case 3: case 4: return run_search<ByComparison<1>>(p, groups, scales, codes);
    case 8: return run_search<ByComparison<3>>(p, groups, scales, codes);
    case 16: return run_search<ByComparison<7>>(p, groups, scales, codes);
    default: return run_search<ByTable>(p, groups, scales, codes);
  }
}
