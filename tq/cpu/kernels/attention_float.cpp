// Attention over float keys and values: a few rows read them straight from memory, many rows share a converted copy.
#include "attention_float.h"

#include <string.h>

#include <algorithm>

#include "attention_product.h"
#include "kv_half.h"

namespace tq {
namespace {

constexpr int VECTOR = TILE_ROWS;          // floats in a Floats
constexpr int FEW_ROWS = 4;                // that meet a key at once on its way from memory
constexpr int DIRECT_ROWS = 8;             // for more, it pays to transpose the keys first
constexpr int GROUP_ROWS = 4 * GEMM_ROWS;  // whose scores of a panel stay in the first cache
constexpr int PREFETCH_BYTES = 4096;       // past the page that hardware prefetchers stop at

typedef int32_t FourIndices __attribute__((vector_size(16)));

// --- few rows ------------------------------------------------------------------------------------------------------

TQ_INLINE Floats load_row(const float *p) { return load(p); }
TQ_INLINE Floats load_row(const uint16_t *p) { return load_half(p); }

// The first n values at p, then zeros.
template <class T>
TQ_INLINE Floats load_part(const T *p, int n) {
  alignas(64) T padded[VECTOR] = {};
  memcpy(padded, p, n * sizeof(T));
  return load_row(padded);
}

template <class T>
TQ_INLINE void prefetch_row(const T *row, int n) {
  const char *p = reinterpret_cast<const char *>(row) + PREFETCH_BYTES;
  for (size_t line = 0; line < n * sizeof(T); line += 64) prefetch(p + line);
}

// sums[i] = the sum of the four lanes from 4 i on, i < 16.
void sum_fours(const float *x, float *sums) {
  const auto add_pairs = [](Four a, Four b) TQ_INLINE_LAMBDA {
    return __builtin_shuffle(a, b, FourIndices{0, 2, 4, 6}) + __builtin_shuffle(a, b, FourIndices{1, 3, 5, 7});
  };
  for (int i = 0; i < VECTOR; i += 4, x += VECTOR) {
    const Four low = add_pairs(load_four(x), load_four(x + 4)), high = add_pairs(load_four(x + 8), load_four(x + 12));
    store_four(sums + i, add_pairs(low, high));
  }
}

// Four keys at a time: parts[r], parts[r] + 4 ... become vectors of four lanes whose sums are the products of query r
// with keys 0 to 3.
template <int R, class T>
TQ_INLINE void dot_tokens(const float *queries, int64_t query_row, int dim, const T *const (&keys)[4],
                          float *const (&parts)[R]) {
  Floats sums[R][4];
  unrolled<R>([&](auto r) TQ_INLINE_LAMBDA {
    unrolled<4>([&](auto t) TQ_INLINE_LAMBDA { sums[r][t] = splat(0); });
  });
  const auto add = [&](int d, auto &&load_key) TQ_INLINE_LAMBDA {
    Floats key[4];
    unrolled<4>([&](auto t) TQ_INLINE_LAMBDA { key[t] = load_key(keys[t] + d); });
    unrolled<R>([&](auto r) TQ_INLINE_LAMBDA {
      const Floats query = load(queries + r * query_row + d);
      unrolled<4>([&](auto t) TQ_INLINE_LAMBDA { sums[r][t] = fma(query, key[t], sums[r][t]); });
    });
  };
  int d = 0;
  for (; d + VECTOR <= dim; d += VECTOR) add(d, [](const T *p) TQ_INLINE_LAMBDA { return load_row(p); });
  if (d < dim) add(d, [&](const T *p) TQ_INLINE_LAMBDA { return load_part(p, dim - d); });
  unrolled<R>([&](auto r) TQ_INLINE_LAMBDA { store(parts[r], fold(sums[r])); });
}

// scores[r][t] = queries[r] . keys[t], t < n. Writes up to whole vectors.
template <int R, class T>
void score_few(const float *queries, int64_t query_row, int dim, const T *keys, int64_t key_row, int n, float *scores) {
  alignas(64) float parts[R][4 * VECTOR] = {};
  for (int first = 0; first < n; first += VECTOR) {
    for (int t = 0; t < VECTOR && first + t < n; t += 4) {
      const T *key[4];
      float *to[R];
      for (int i = 0; i < 4; i++) {
        key[i] = keys + std::min(first + t + i, n - 1) * key_row;
        prefetch_row(key[i], dim);
      }
      for (int r = 0; r < R; r++) to[r] = parts[r] + VECTOR * (t / 4);
      dot_tokens<R>(queries, query_row, dim, key, to);
    }
    for (int r = 0; r < R; r++) sum_fours(parts[r], scores + r * CHUNK_TOKENS + first);
  }
}

// sums[r][16 V] += weights[r][t] * values[t][16 V]; the last vector of a row may have fewer than 16 values.
template <int R, int V, class T, class Load>
TQ_INLINE void add_vectors(const float *weights, const T *values, int64_t value_row, int n, float *sums, int64_t width,
                           Load &&load_value) {
  Floats total[R][V];
  unrolled<R>([&](auto r) TQ_INLINE_LAMBDA {
    unrolled<V>([&](auto v) TQ_INLINE_LAMBDA { total[r][v] = load(sums + r * width + VECTOR * v); });
  });
  for (int t = 0; t < n; t++, values += value_row) {
    prefetch_row(values, VECTOR * V);
    Floats value[V];
    unrolled<V>([&](auto v) TQ_INLINE_LAMBDA { value[v] = load_value(values + VECTOR * v); });
    unrolled<R>([&](auto r) TQ_INLINE_LAMBDA {
      const Floats weight = splat(weights[r * CHUNK_TOKENS + t]);
      unrolled<V>([&](auto v) TQ_INLINE_LAMBDA { total[r][v] = fma(weight, value[v], total[r][v]); });
    });
  }
  unrolled<R>([&](auto r) TQ_INLINE_LAMBDA {
    unrolled<V>([&](auto v) TQ_INLINE_LAMBDA { store(sums + r * width + VECTOR * v, total[r][v]); });
  });
}

template <int R, class T>
void add_few(const float *weights, const T *values, int64_t value_row, int dim, int n, float *sums, int64_t width) {
  int d = 0;
  while (d + VECTOR <= dim) {
    with_all_or_one<VALUE_VECTORS>((dim - d) / VECTOR, [&]<int V>() {
      add_vectors<R, V>(weights, values + d, value_row, n, sums + d, width,
                        [](const T *p) TQ_INLINE_LAMBDA { return load_row(p); });
      d += VECTOR * V;
    });
  }
  if (d == dim) return;
  add_vectors<R, 1>(weights, values + d, value_row, n, sums + d, width,
                    [&](const T *p) TQ_INLINE_LAMBDA { return load_part(p, dim - d); });
}

template <class T>
void attend_few(Rows &rows, const FloatTokens<T> &tokens) {
  const tq_attend_params &p = *rows.params;
  for (int first = 0; first < tokens.count; first += CHUNK_TOKENS) {
    const int n = std::min(tokens.count - first, CHUNK_TOKENS);
    for (int r = 0; r < rows.count; r += FEW_ROWS) {
      with_count<FEW_ROWS>(rows.count - r, [&]<int R>() {
        score_few<R>(rows.queries + r * rows.head_width, rows.head_width, p.head_dim,
                     tokens.keys + first * tokens.key_row, tokens.key_row, n, rows.scores + r * CHUNK_TOKENS);
      });
    }
    for (int r = 0; r < rows.count; r++) rows.weigh(r, rows.scores + r * CHUNK_TOKENS, n, tokens.position + first);
    for (int r = 0; r < rows.count; r += FEW_ROWS) {
      with_count<FEW_ROWS>(rows.count - r, [&]<int R>() {
        add_few<R>(rows.scores + r * CHUNK_TOKENS, tokens.values + first * tokens.value_row, tokens.value_row,
                   p.value_dim, n, rows.state.sums + r * rows.value_width, rows.value_width);
      });
    }
  }
}

// --- many rows -----------------------------------------------------------------------------------------------------

void copy_row(const float *from, int n, float *to) { memcpy(to, from, n * sizeof(float)); }
void copy_row(const uint16_t *from, int n, float *to) {
  int i = 0;
  for (; i + VECTOR <= n; i += VECTOR) store(to + i, load_half(from + i));
  to_float(from + i, n - i, to + i);
}

template <class T>
void attend_many(Rows &rows, const FloatTokens<T> &tokens) {
  const tq_attend_params &p = *rows.params;
  const Panels panels = scratch_panels(rows);
  for (int first = 0; first < tokens.count; first += PANEL_TOKENS) {
    const int n = std::min(tokens.count - first, PANEL_TOKENS);
    for (int t = 0; t < n; t++) {
      copy_row(tokens.keys + (first + t) * tokens.key_row, p.head_dim, panels.rows + int64_t(t) * rows.head_width);
      copy_row(tokens.values + (first + t) * tokens.value_row, p.value_dim,
               panels.values + int64_t(t) * rows.value_width);
    }
    transpose(panels.rows, rows.head_width, panels.keys);
    attend_panels(rows, rows.queries, panels, n, tokens.position + first, 0, rows.state.sums);
  }
}

}  // namespace
void transpose(const float *x, int width, float *y) {
  for (int t = 0; t < PANEL_TOKENS; t += 4) {
    for (int d = 0; d < width; d += 4) {
      const float *from = x + int64_t(t) * width + d;
      const Four a = load_four(from), b = load_four(from + width);
      const Four c = load_four(from + 2 * width), e = load_four(from + 3 * width);
      const Four ab_low = __builtin_shuffle(a, b, FourIndices{0, 4, 1, 5});
      const Four ab_high = __builtin_shuffle(a, b, FourIndices{2, 6, 3, 7});
      const Four ce_low = __builtin_shuffle(c, e, FourIndices{0, 4, 1, 5});
      const Four ce_high = __builtin_shuffle(c, e, FourIndices{2, 6, 3, 7});
      float *to = y + int64_t(d) * PANEL_TOKENS + t;
      store_four(to, __builtin_shuffle(ab_low, ce_low, FourIndices{0, 1, 4, 5}));
      store_four(to + PANEL_TOKENS, __builtin_shuffle(ab_low, ce_low, FourIndices{2, 3, 6, 7}));
      store_four(to + 2 * PANEL_TOKENS, __builtin_shuffle(ab_high, ce_high, FourIndices{0, 1, 4, 5}));
      store_four(to + 3 * PANEL_TOKENS, __builtin_shuffle(ab_high, ce_high, FourIndices{2, 3, 6, 7}));
    }
  }
}

Panels scratch_panels(const Rows &rows) {
  const size_t keys = size_t(rows.head_width) * PANEL_TOKENS, values = size_t(rows.value_width) * PANEL_TOKENS;
  float *memory = scratch<float>(PANEL, 2 * keys + values);
  std::fill_n(memory, 2 * keys + values, 0.f);  // what pads a row or a block stays 0
  return {memory, memory + keys, memory + 2 * keys};
}

void attend_panels(Rows &rows, const float *queries, const Panels &panels, int n, int position, int hidden,
                   float *sums) {
  for (int r = 0; r < rows.count; r += GROUP_ROWS) {
    const int count = std::min(rows.count - r, GROUP_ROWS);
    if (rows.unseen(r, count, position, n)) continue;
    product(queries + r * rows.head_width, rows.head_width, panels.keys, PANEL_TOKENS, rows.scores, PANEL_TOKENS, count,
            (n + VECTOR - 1) / VECTOR, rows.head_width, false);
    for (int i = 0; i < count; i++) rows.weigh(r + i, rows.scores + i * PANEL_TOKENS, n, position, hidden);
    product(rows.scores, PANEL_TOKENS, panels.values, rows.value_width, sums + r * rows.value_width, rows.value_width,
            count, rows.value_width / VECTOR, n, true);
  }
}

template <class T>
void attend_floats(Rows &rows, const FloatTokens<T> &tokens) {
  if (rows.count <= DIRECT_ROWS) {
    attend_few(rows, tokens);
  } else {
    attend_many(rows, tokens);
  }
}

template void attend_floats(Rows &, const FloatTokens<float> &);
template void attend_floats(Rows &, const FloatTokens<uint16_t> &);

}  // namespace tq
