// The C interface of attention and of the cache: arrays become segments.
#include <string.h>

#include <vector>

#include "attention.h"
#include "attention_packed.h"
#include "kv_basis.h"
#include "kv_half.h"
#include "kv_layout.h"

namespace tq {
namespace {

float *floats(const tq_array &array) { return static_cast<float *>(array.data); }

void bind(const tq_array &keys, const tq_array &values, tq_segment &segment) {
  segment.keys = keys.data;
  segment.values = values.data;
  segment.key_batch_stride = keys.strides[0];
  segment.value_batch_stride = values.strides[0];
  segment.key_head_stride = keys.strides[1];
  segment.value_head_stride = values.strides[1];
  segment.capacity = keys.shape[2];
  if (segment.format == TQ_KV_PACKED) {
    segment.capacity *= BLOCK_TOKENS;
  } else {
    segment.key_row_stride = keys.strides[2];
    segment.value_row_stride = values.strides[2];
  }
}

// The segments of `params` over the arrays of a cache. Returns the first array after them.
const tq_array *bind(const tq_array *arrays, tq_attend_params &params) {
  if (params.n_segments == 0) {
    tq_segment &all = params.segments[params.n_segments++] = {};
    all.format = arrays[0].dtype == TQ_F16 ? TQ_KV_F16 : TQ_KV_F32;
    all.count = arrays[0].shape[2];
    bind(arrays[0], arrays[1], all);
    return arrays + 2;
  }
  for (int s = 0; s < params.n_segments; s++) {
    tq_segment &segment = params.segments[s];
    if (segment.format != TQ_KV_PACKED) {
      bind(arrays[0], arrays[1], segment);
      arrays += 2;
      continue;
    }
    const tq_array *keys = arrays, *values = arrays + 2 + params.code.keys.ordered;
    bind(keys[0], values[0], segment);
    segment.key_scales = static_cast<uint16_t *>(keys[1].data);
    segment.value_scales = static_cast<uint16_t *>(values[1].data);
    segment.key_order = params.code.keys.ordered ? static_cast<int32_t *>(keys[2].data) : nullptr;
    segment.value_order = params.code.values.ordered ? static_cast<int32_t *>(values[2].data) : nullptr;
    arrays = values + 2 + params.code.values.ordered;
  }
  return arrays;
}

// The parameters of a call over its arrays: one for all sequences, or one for each.
struct Bound {
  std::vector<tq_attend_params> params;
  const tq_array *next;  // the first array after the caches

  Bound(const void *given, const tq_array *arrays) : next(arrays) {
    const auto *first = static_cast<const tq_attend_params *>(given);
    params.assign(first, first + std::max(1, first->n_sequences));
    for (tq_attend_params &p : params) next = bind(next, p);
  }
  bool own() const { return params[0].n_sequences > 0; }

  // Those of the cache of one sequence of the batch.
  tq_attend_params sequence(int b) const {
    if (own()) return params[b];
    tq_attend_params result = params[0];
    for (int s = 0; s < result.n_segments; s++) {
      tq_segment &segment = result.segments[s];
      const int64_t size = segment.format == TQ_KV_PACKED ? 1 : segment.format == TQ_KV_F16 ? 2 : 4;
      segment.keys = static_cast<char *>(segment.keys) + b * segment.key_batch_stride * size;
      segment.values = static_cast<char *>(segment.values) + b * segment.value_batch_stride * size;
      if (segment.format != TQ_KV_PACKED) continue;
      const int64_t heads = int64_t(b) * result.n_kv_heads;
      segment.key_scales += heads * segment.capacity * planes(result.code.keys);
      segment.value_scales += heads * segment.capacity * planes(result.code.values);
      if (segment.key_order) segment.key_order += heads * result.head_dim;
      if (segment.value_order) segment.value_order += heads * result.value_dim;
    }
    return result;
  }
};

// Rows [rows][dim], `stride` apart, of one kv head of the outputs of tq_kv_unpack.
struct Target {
  float *keys, *values;
  int64_t key_row, value_row;
};

void unpack_floats(const tq_attend_params &p, const tq_segment &segment, int head, const Target &to) {
  const auto copy = [&](const void *from, int64_t head_stride, int64_t row_stride, int dim, float *rows, int64_t row) {
    for (int t = 0; t < segment.count; t++) {
      const int64_t at = head * head_stride + (segment.first + t) * row_stride;
      if (segment.format == TQ_KV_F16) {
        to_float(static_cast<const uint16_t *>(from) + at, dim, rows + t * row);
      } else {
        memcpy(rows + t * row, static_cast<const float *>(from) + at, dim * sizeof(float));
      }
    }
  };
  copy(segment.keys, segment.key_head_stride, segment.key_row_stride, p.head_dim, to.keys, to.key_row);
  copy(segment.values, segment.value_head_stride, segment.value_row_stride, p.value_dim, to.values, to.value_row);
}

void unpack_codes(const tq_attend_params &p, const tq_segment &segment, int head, const PackedCode &code, const Target &to) {
  const int key_width = code_width(p.code.keys), value_width = code_width(p.code.values);
  float *keys = scratch<float>(PANEL, size_t(BLOCK_TOKENS) * (key_width + value_width));
  float *values = keys + BLOCK_TOKENS * key_width;
  const int32_t *key_order = segment.key_order ? segment.key_order + int64_t(head) * p.head_dim : nullptr;
  const int32_t *value_order = segment.value_order ? segment.value_order + int64_t(head) * p.value_dim : nullptr;
  const int skipped = segment.first % BLOCK_TOKENS, last = segment.count + skipped;
  for (int first = 0; first < last; first += BLOCK_TOKENS) {
    const int64_t row = segment.first - skipped + first, block = row / BLOCK_TOKENS;
    const int64_t scales = int64_t(head) * segment.capacity + row;
    const PackedTokens tokens = {
        static_cast<const uint8_t *>(segment.keys) + head * segment.key_head_stride + block * code.keys.block_bytes,
        static_cast<const uint8_t *>(segment.values) + head * segment.value_head_stride + block * code.values.block_bytes,
        segment.key_scales + scales * code.keys.planes, segment.value_scales + scales * code.values.planes,
        std::min(BLOCK_TOKENS, last - first), 0, 0};
    unpack_block(tokens, code, keys, key_width, values, value_width);
    for (int t = std::max(0, skipped - first); t < tokens.count; t++) {
      const int64_t at = first + t - skipped;
      from_code_basis(p.code.keys, key_order, keys + int64_t(t) * key_width, to.keys + at * to.key_row);
      from_code_basis(p.code.values, value_order, values + int64_t(t) * value_width, to.values + at * to.value_row);
    }
  }
}

}  // namespace
}  // namespace tq

using namespace tq;

void tq_attend(const void *params, const tq_array *in, const tq_array *out) {
  const Bound bound(params, in + 1);
  const tq_array &q = in[0], &result = out[0], *last = bound.next;
  Mask mask;
  const bool masked = bound.params[0].mask;
  if (masked) {
    // An axis of one entry serves all.
    const auto stride = [&](int axis) { return last->shape[axis] == 1 ? 0 : last->strides[axis]; };
    mask = {last->data, last->dtype, stride(0), stride(1), stride(2)};
  }
  attend(bound.params.data(), {q.shape[0], q.strides[0], result.strides[0], bound.own()},
         {floats(q), q.strides[1], q.strides[2]}, q.shape[2], {floats(result), result.strides[1], result.strides[2]},
         masked ? &mask : nullptr);
}

void tq_kv_append(const void *params, const tq_array *in, const tq_array *out) {
  const Bound bound(params, out);
  const tq_array &keys = in[0], &values = in[1];
  for (int b = 0; b < keys.shape[0]; b++) {
    const tq_attend_params p = bound.sequence(b);
    const int64_t first = bound.own() ? p.new_first : 0;
    append(p, {floats(keys) + b * keys.strides[0] + first * keys.strides[2], keys.strides[1], keys.strides[2]},
           {floats(values) + b * values.strides[0] + first * values.strides[2], values.strides[1], values.strides[2]},
           bound.own() ? p.new_count : keys.shape[2]);
  }
}

void tq_kv_unpack(const void *params, const tq_array *in, const tq_array *out) {
  const Bound bound(params, in);
  const tq_array &keys = out[0], &values = out[1];
  memset(keys.data, 0, size_of(keys) * sizeof(float));
  memset(values.data, 0, size_of(values) * sizeof(float));
  const PackedCode code(bound.params[0], true);
  const int64_t n_kv_heads = bound.params[0].n_kv_heads;
  parallel([&](int i, int n) {
    const Share share(keys.shape[0] * n_kv_heads, i, n);
    for (int64_t item = share.first; item < share.last; item++) {
      const int b = item / n_kv_heads, head = item % n_kv_heads;
      const tq_attend_params p = bound.sequence(b);
      for (int s = 0; s < p.n_segments; s++) {
        const tq_segment &segment = p.segments[s];
        if (segment.count == 0) continue;
        const auto rows = [&](const tq_array &all) {
          return floats(all) + b * all.strides[0] + head * all.strides[1] + segment.position * all.strides[2];
        };
        const Target to = {rows(keys), rows(values), keys.strides[2], values.strides[2]};
        if (segment.format == TQ_KV_PACKED) {
          unpack_codes(p, segment, head, code, to);
        } else {
          unpack_floats(p, segment, head, to);
        }
      }
    }
  });
}

int64_t tq_kv_block_bytes(int32_t dim, int32_t bits, int32_t values) {
  return values ? value_block_bytes(dim, bits) : key_block_bytes(dim, bits);
}
