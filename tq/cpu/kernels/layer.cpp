// A decoder layer as one operation: norms, projections, rotary embedding, cache, attention and feed-forward network.
//
// A single token costs five parallel steps (query-key-value, attention, output, gate and up, down); what lies between
// is short and runs on the caller. A prompt is taken in chunks of rows, which bounds the memory; there every step is
// parallel over rows.
#include "tq_layer.h"

#include <math.h>
#include <string.h>

#include <algorithm>
#include <vector>

#include "attention.h"
#include "elementwise.h"
#include "internal.h"
#include "kv_half.h"
#include "layer_experts.h"

namespace tq {
namespace {

constexpr int CHUNK_ROWS = 256, PACKED_BLOCK = 64;
enum { ACTIVATION = LAYER, QKV, ATTENDED, GATE_UP, PROJECTED, KEYS, VALUES, NORMALIZED };  // slots of scratch memory
constexpr int SHARED = QKV;  // free again after attention

template <class F>
void for_rows(int rows, F &&f) {
  if (rows == 1) return f(0);
  parallel([&](int i, int n) {
    const Share share(rows, i, n);
    for (int64_t r = share.first; r < share.last; r++) f(r);
  });
}

// --- projections ---------------------------------------------------------------------------------------------------

struct Target {
  const tq_projection *projection;
  float *y;
};

// y = rotated(source) W^T for every target; all their rows are y_stride apart. source(r, buffer) returns row r of the
// input, which it may put into the buffer. It is called once for each rotation that the targets read.
template <class F>
void project(const Target *targets, int n, int64_t y_stride, int rows, bool exact, F &&source) {
  for (int first = 0, last; first < n; first = last) {
    const tq_projection &head = *targets[first].projection;
    Product products[3];
    for (last = first; last < n; last++) {
      const tq_projection &next = *targets[last].projection;
      if (next.rotation.signs != head.rotation.signs) break;
      products[last - first] = {&next.matrix, 0, targets[last].y, y_stride};
    }
    const int columns = head.matrix.columns;
    float *x = scratch<float>(ACTIVATION, size_t(rows) * columns);
    for_rows(rows, [&](int64_t r) {
      float *row = x + r * columns;
      const float *from = source(r, row);
      if (head.rotation.n > 0) {
        rotate_row(head.rotation, from, row);
      } else if (from != row) {
        memcpy(row, from, columns * sizeof(float));
      }
    });
    multiply(products, last - first, x, columns, rows, exact);
  }
}

const float *normalized(const tq_norm &norm, const float *x, int n, float *buffer) {
  if (!norm.weight) return x;
  rms_norm(x, norm.weight, norm.eps, n, buffer);
  return buffer;
}

// y = x + residual * norm(branch), or the branch alone. branch is overwritten.
void add_branch(const tq_layer &layer, const tq_norm &norm, const float *x, float *branch, float *y) {
  const int n = layer.hidden;
  if (norm.weight) rms_norm(branch, norm.weight, norm.eps, n, branch);
  if (layer.bare) {
    memcpy(y, branch, n * sizeof(float));
    return;
  }
#pragma omp simd
  for (int i = 0; i < n; i++) y[i] = x[i] + layer.residual * branch[i];
}

// --- rotary embedding ----------------------------------------------------------------------------------------------

// Cosines and sines of consecutive positions, one row of dims / 2 of each. Layers of a model ask for the same ones.
struct RotaryTable {
  std::vector<float> frequencies, cosines, sines;
  float position_scale = 0, multiplier = 0;
  int position = 0, count = 0;

  bool holds(const tq_rope &rope, int first, int n) const {
    const size_t half = rope.dims / 2;
    return position == first && count == n && position_scale == rope.position_scale &&
           multiplier == rope.multiplier && frequencies.size() == half &&
           !memcmp(frequencies.data(), rope.frequencies, half * sizeof(float));
  }

  void fill(const tq_rope &rope, int first, int n) {
    const int half = rope.dims / 2;
    frequencies.assign(rope.frequencies, rope.frequencies + half);
    cosines.resize(size_t(n) * half);
    sines.resize(size_t(n) * half);
    position = first, count = n, position_scale = rope.position_scale, multiplier = rope.multiplier;
    for (int r = 0; r < n; r++) {
      const float at = float(first + r) * position_scale;
      for (int i = 0; i < half; i++) {
        const float angle = at * frequencies[i];  // rounded as MLX rounds it: far positions depend on that
        cosines[size_t(r) * half + i] = multiplier * cosf(angle);
        sines[size_t(r) * half + i] = multiplier * sinf(angle);
      }
    }
  }
};

const RotaryTable &rotary_table(const tq_rope &rope, int first, int n) {
  thread_local RotaryTable tables[4];  // models with windows have two kinds of layers in turn
  thread_local int oldest = 0;
  for (const RotaryTable &table : tables) {
    if (table.holds(rope, first, n)) return table;
  }
  RotaryTable &table = tables[oldest];
  oldest = (oldest + 1) % 4;
  table.fill(rope, first, n);
  return table;
}

void turn(const tq_rope &rope, const float *cosines, const float *sines, float *x) {
  const int half = rope.dims / 2;
  if (rope.interleaved) {
    for (int i = 0; i < half; i++) {
      const float a = x[2 * i], b = x[2 * i + 1];
      x[2 * i] = a * cosines[i] - b * sines[i];
      x[2 * i + 1] = a * sines[i] + b * cosines[i];
    }
    return;
  }
  float *y = x + half;
#pragma omp simd
  for (int i = 0; i < half; i++) {
    const float a = x[i], b = y[i];
    x[i] = a * cosines[i] - b * sines[i];
    y[i] = a * sines[i] + b * cosines[i];
  }
}

// --- attention -----------------------------------------------------------------------------------------------------

// Columns from one head of the queries to the next, and of all queries, in a row of q, k and v.
int query_stride(const tq_layer &layer) { return layer.gated ? 2 * layer.head_dim : layer.head_dim; }
int query_columns(const tq_layer &layer) { return layer.n_heads * query_stride(layer); }

void normalize_heads(const tq_norm &norm, bool whole, int heads, int stride, int dim, float *x) {
  if (!norm.weight) return;
  if (whole) return rms_norm(x, norm.weight, norm.eps, heads * dim, x);
  for (int h = 0; h < heads; h++) rms_norm(x + h * stride, norm.weight, norm.eps, dim, x + h * stride);
}

// Norms and rotary embedding of the queries and keys of one token, which lie one after another at x.
void place(const tq_layer &layer, const RotaryTable *table, int64_t r, float factor, float *x) {
  const int dim = layer.head_dim, stride = query_stride(layer);
  float *keys = x + query_columns(layer);
  const auto norms = [&] {
    normalize_heads(layer.query_norm, layer.norm_whole, layer.n_heads, stride, dim, x);
    normalize_heads(layer.key_norm, layer.norm_whole, layer.n_kv_heads, dim, dim, keys);
  };
  if (!layer.norm_after_rope) norms();
  if (table) {
    const int64_t at = r * (layer.rope.dims / 2);
    for (int h = 0; h < layer.n_heads; h++) turn(layer.rope, &table->cosines[at], &table->sines[at], x + h * stride);
    for (int h = 0; h < layer.n_kv_heads; h++) turn(layer.rope, &table->cosines[at], &table->sines[at], keys + h * dim);
  }
  if (layer.norm_after_rope) norms();
  if (factor != 1.0f) {
    for (int h = 0; h < layer.n_heads; h++) {
      for (int i = 0; i < dim; i++) x[h * stride + i] *= factor;
    }
  }
}

// y = x * sigmoid(gate), for the heads of one token; qkv is its row of queries.
void apply_gates(const tq_layer &layer, const float *qkv, const float *x, float *y) {
  const int dim = layer.head_dim;
  for (int h = 0; h < layer.n_heads; h++) {
    const float *gates = qkv + h * 2 * dim + dim;
#pragma omp simd
    for (int i = 0; i < dim; i++) y[h * dim + i] = x[h * dim + i] * sigmoid(gates[i]);
  }
}

void store(const float *from, int n, void *to, int64_t at, int32_t format) {
  if (format == TQ_KV_F16) {
    to_half(from, n, static_cast<uint16_t *>(to) + at);
  } else {
    memcpy(static_cast<float *>(to) + at, from, n * sizeof(float));
  }
}

// An array whose axes, from the last one, are rows of the cache, tokens and heads; those that it lacks or that have
// length 1 are the same for all.
Mask mask_of(const tq_array &array) {
  const auto length = [&](int axis) { return axis <= array.ndim ? array.shape[array.ndim - axis] : 1; };
  const int64_t rows = length(1), tokens = length(2), heads = length(3);
  return {array.data, array.dtype, 0, heads > 1 ? tokens * rows : 0, tokens > 1 ? rows : 0};
}

struct Attention {
  const tq_layer &layer;
  const tq_layer_params &params;
  Mask mask;
  const float *factors;  // of the queries of each token, or NULL
  tq_attend_params attend;
  int packed_tokens;

  Attention(const tq_layer_params &p, const tq_array *in, const tq_array *out, int tokens)
      : layer(*p.layer), params(p), mask{}, attend{}, packed_tokens(p.packed) {
    const tq_array *next = in + 1;  // the cache is among the outputs alone
    if (p.has_mask) mask = mask_of(*next++);
    if (p.resting) next += 6 + p.code->keys.ordered + p.code->values.ordered;
    factors = p.has_query_factors ? static_cast<const float *>(next->data) : nullptr;
    attend.n_heads = layer.n_heads;
    attend.n_kv_heads = layer.n_kv_heads;
    attend.head_dim = layer.head_dim;
    attend.value_dim = layer.value_dim;
    attend.scale = layer.scale;
    attend.softcap = layer.softcap;
    attend.sinks = layer.sinks;
    attend.causal = p.causal;
    attend.exact = p.exact;
    if (p.code) {
      const tq_array *packed = p.resting ? in + 1 : out + 1;
      const int n = 6 + p.code->keys.ordered + p.code->values.ordered;
      open_packed(packed, p.resting ? out + 1 : out + 1 + n);
    } else {
      open_rows(p.has_cache ? out + 1 : nullptr, tokens);
    }
  }

  void open_rows(const tq_array *cache, int tokens) {
    attend.n_segments = 1;
    tq_segment &segment = attend.segments[0];
    if (cache) {
      segment.keys = cache[0].data;
      segment.values = cache[1].data;
      segment.format = cache[0].dtype == TQ_F16 ? TQ_KV_F16 : TQ_KV_F32;
      segment.capacity = cache[0].shape[2];
    } else {
      segment.capacity = tokens;
      segment.keys = scratch<float>(KEYS, size_t(layer.n_kv_heads) * tokens * layer.head_dim);
      segment.values = scratch<float>(VALUES, size_t(layer.n_kv_heads) * tokens * layer.value_dim);
      segment.format = TQ_KV_F32;
    }
    segment.key_head_stride = int64_t(segment.capacity) * layer.head_dim;
    segment.value_head_stride = int64_t(segment.capacity) * layer.value_dim;
  }

  void open_packed(const tq_array *cache, const tq_array *recent) {
    attend.code = *params.code;
    attend.n_segments = 3;
    const tq_array *keys = cache + 2, *values = keys + 2 + attend.code.keys.ordered;
    for (const int s : {0, 2}) {  // sink and recent
      const tq_array *arrays = s == 0 ? cache : recent;
      tq_segment &rows = attend.segments[s];
      rows.format = TQ_KV_F16;
      rows.keys = arrays[0].data;
      rows.values = arrays[1].data;
      rows.capacity = arrays[0].shape[2];
      rows.key_head_stride = int64_t(rows.capacity) * layer.head_dim;
      rows.value_head_stride = int64_t(rows.capacity) * layer.value_dim;
    }
    tq_segment &packed = attend.segments[1];
    packed.format = TQ_KV_PACKED;
    packed.keys = keys[0].data;
    packed.values = values[0].data;
    packed.key_scales = static_cast<uint16_t *>(keys[1].data);
    packed.value_scales = static_cast<uint16_t *>(values[1].data);
    packed.key_order = attend.code.keys.ordered ? static_cast<int32_t *>(keys[2].data) : nullptr;
    packed.value_order = attend.code.values.ordered ? static_cast<int32_t *>(values[2].data) : nullptr;
    packed.capacity = keys[0].shape[2] * PACKED_BLOCK;
    packed.key_head_stride = int64_t(keys[0].shape[2]) * keys[0].shape[3];
    packed.value_head_stride = int64_t(values[0].shape[2]) * values[0].shape[3];
  }

  // The segments as they are when n tokens from position `first` on are there, and those tokens in them.
  void append_packed(float *keys, float *values, int64_t row_stride, int first, int n) {
    tq_segment &sink = attend.segments[0], &packed = attend.segments[1], &recent = attend.segments[2];
    attend.position = first;
    attend.pack_from = std::min(first, params.sink) + packed_tokens;
    const int total = first + n;
    sink.count = std::min(total, params.sink);
    packed_tokens = std::max(packed_tokens, (total - params.sink - params.window) / PACKED_BLOCK * PACKED_BLOCK);
    packed.first = 0;
    packed.position = sink.count;
    packed.count = packed_tokens;
    recent.position = sink.count + packed_tokens;
    recent.count = total - recent.position;
    tq::append(attend, {keys, layer.head_dim, row_stride}, {values, layer.value_dim, row_stride}, n);
    if (params.limit > 0 && total > params.limit) {  // a window: the oldest ones are seen no more
      const int gone = std::min(total - params.limit, packed.count);
      packed.first += gone;
      packed.position += gone;
      packed.count -= gone;
    }
  }

  void append(const float *qkv, int64_t row) {
    const tq_segment &s = attend.segments[0];
    const float *keys = qkv + query_columns(layer);
    const float *values = keys + layer.n_kv_heads * layer.head_dim;
    for (int h = 0; h < layer.n_kv_heads; h++) {
      const int64_t key = h * s.key_head_stride + row * layer.head_dim;
      const int64_t value = h * s.value_head_stride + row * layer.value_dim;
      store(keys + h * layer.head_dim, layer.head_dim, s.keys, key, s.format);
      store(values + h * layer.value_dim, layer.value_dim, s.values, value, s.format);
    }
  }

  // Tokens [first, first + n), the row of the first one at x. With a mask they are all there are.
  void run(const float *x, int first, int n, float *y) {
    const int queries = query_columns(layer), keys = layer.n_kv_heads * layer.head_dim;
    const int total = queries + keys + layer.n_kv_heads * layer.value_dim;
    const int width = layer.n_heads * layer.value_dim, hidden = layer.hidden;
    float *qkv = scratch<float>(QKV, size_t(n) * total);
    const Target targets[] = {{&layer.query, qkv}, {&layer.key, qkv + queries}, {&layer.value, qkv + queries + keys}};
    project(targets, layer.key.matrix.rows > 0 ? 3 : 1, total, n, params.exact, [&](int64_t r, float *row) {
      return normalized(layer.before_attention, x + r * hidden, hidden, row);
    });

    const RotaryTable *table =
        layer.rope.frequencies ? &rotary_table(layer.rope, params.position + first, n) : nullptr;
    for_rows(n, [&](int64_t r) {
      place(layer, table, r, factors ? factors[first + r] : 1.0f, qkv + r * total);
      if (!params.code) append(qkv + r * total, params.row + first + r);
    });
    if (params.code) {
      append_packed(qkv + queries, qkv + queries + keys, total, params.row + first, n);
    } else {
      attend.segments[0].count = params.causal ? params.row + first + n : params.rows;
      attend.position = params.row + first;
    }
    float *attended = scratch<float>(ATTENDED, size_t(n) * width);
    const Strided q{qkv, query_stride(layer), total}, out{attended, layer.value_dim, width};
    tq::attend(&attend, {1, 0, 0}, q, n, out, params.has_mask ? &mask : nullptr);

    float *projected = scratch<float>(PROJECTED, size_t(n) * hidden);
    const Target target[] = {{&layer.out, projected}};
    project(target, 1, hidden, n, params.exact, [&](int64_t r, float *row) -> const float * {
      if (!layer.gated) return attended + r * width;
      apply_gates(layer, qkv + r * total, attended + r * width, row);
      return row;
    });
    for_rows(n, [&](int64_t r) {
      add_branch(layer, layer.after_attention, x + r * hidden, projected + r * hidden, y + r * hidden);
    });
  }
};

// --- feed-forward --------------------------------------------------------------------------------------------------

// y = down(act(gate(x)) * up(x)); source as in project.
template <class F>
void network(const tq_layer &layer, bool exact, int n, float *y, F &&source) {
  const int inner = layer.down.matrix.columns;
  float *gate = scratch<float>(GATE_UP, size_t(n) * 2 * inner);
  const Target targets[] = {{&layer.gate, gate}, {&layer.up, gate + inner}};
  project(targets, layer.up.matrix.rows > 0 ? 2 : 1, 2 * inner, n, exact, source);
  const Target down[] = {{&layer.down, y}};
  project(down, 1, layer.hidden, n, exact, [&](int64_t r, float *row) {
    const float *from = gate + r * 2 * inner;
    gated(layer.activation, 0.0f, 0.0f, from, from + inner, row, inner);
    return row;
  });
}

// What experts say of each token, and their weights, if they were computed already.
struct Said {
  const float *terms = nullptr, *weights = nullptr;
};

// y = the sum of a token's experts, and of the one that all tokens share if there is one; x is normalized.
void mixture(const tq_layer &layer, bool exact, const float *x, int n, float *y, Said said) {
  const int hidden = layer.hidden, k = layer.router.k;
  if (said.terms) {
    for_rows(n, [&](int64_t r) {
      sum_experts(said.terms + r * k * hidden, said.weights + r * k, k, hidden, y + r * hidden);
    });
  } else {
    mix_experts(layer, exact, x, n, y);
  }
  if (layer.gate.matrix.rows == 0) return;
  float *shared = scratch<float>(SHARED, size_t(n) * hidden);
  network(layer, exact, n, shared, [&](int64_t r, float *) { return x + r * hidden; });
  for_rows(n, [&](int64_t r) {
    const float weight = layer.shared_gate ? sigmoid(dot(x + r * hidden, layer.shared_gate, hidden)) : 1.0f;
    const float *from = shared + r * hidden;
    float *to = y + r * hidden;
#pragma omp simd
    for (int i = 0; i < hidden; i++) to[i] += weight * from[i];
  });
}

// The rows that experts read.
void normalize_rows(const tq_layer &layer, const float *x, int n, float *rows) {
  const int hidden = layer.hidden;
  for_rows(n, [&](int64_t r) {
    float *to = rows + r * hidden;
    const float *row = normalized(layer.before_feed_forward, x + r * hidden, hidden, to);
    if (row != to) memcpy(to, row, hidden * sizeof(float));
  });
}

void feed_forward(const tq_layer &layer, bool exact, const float *x, int n, float *y, Said said = {}) {
  const int hidden = layer.hidden;
  const auto source = [&](int64_t r, float *row) {
    return normalized(layer.before_feed_forward, x + r * hidden, hidden, row);
  };
  float *branch = scratch<float>(PROJECTED, size_t(n) * hidden);
  if (layer.router.experts > 0) {
    float *rows = scratch<float>(NORMALIZED, size_t(n) * hidden);
    normalize_rows(layer, x, n, rows);
    mixture(layer, exact, rows, n, branch, said);
  } else {
    network(layer, exact, n, branch, source);
  }
  for_rows(n, [&](int64_t r) {
    add_branch(layer, layer.after_feed_forward, x + r * hidden, branch + r * hidden, y + r * hidden);
  });
}

}  // namespace
}  // namespace tq

void tq_layer_forward(const void *params, const tq_array *in, const tq_array *out) {
  using namespace tq;
  const auto &p = *static_cast<const tq_layer_params *>(params);
  const tq_layer &layer = *p.layer;
  int64_t tokens = 1;
  for (int i = 0; i < in[0].ndim - 1; i++) tokens *= in[0].shape[i];
  const float *x = static_cast<const float *>(in[0].data);
  float *y = static_cast<float *>(out[0].data);
  if (p.parts & TQ_LAYER_CHOOSE) {
    normalize_rows(layer, x, static_cast<int>(tokens), y);
    auto *chosen = static_cast<uint32_t *>(out[1].data);
    return choose_experts(layer, p.exact, y, static_cast<int>(tokens), chosen, static_cast<float *>(out[2].data));
  }
  if (p.parts & TQ_LAYER_COMBINE) {
    const Said said{static_cast<const float *>(in[1].data), static_cast<const float *>(in[2].data)};
    return feed_forward(layer, p.exact, x, static_cast<int>(tokens), y, said);
  }
  if (p.parts & TQ_LAYER_ATTENTION) {
    Attention attention(p, in, out, tokens);
    // Where a token may see later ones, their keys must be there.
    const int step = p.causal && !p.has_mask ? CHUNK_ROWS : tokens;
    for (int first = 0; first < tokens; first += step) {
      const int64_t at = int64_t(first) * layer.hidden;
      attention.run(x + at, first, std::min<int>(step, tokens - first), y + at);
    }
    x = y;
  }
  if (p.parts & TQ_LAYER_FEED_FORWARD) {
    // Many tokens together, so that an expert is decoded once for all that go to it.
    const int step = layer.router.experts > 0 ? tokens : CHUNK_ROWS;
    for (int first = 0; first < tokens; first += step) {
      const int64_t at = int64_t(first) * layer.hidden;
      feed_forward(layer, p.exact, x + at, std::min<int>(step, tokens - first), y + at);
    }
  }
}
