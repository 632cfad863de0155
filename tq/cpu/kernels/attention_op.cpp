// The C interface of attention and of the cache: arrays become segments.
#include <vector>

#include "attention.h"
#include "attention_packed.h"
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
    const int step = segment.format == TQ_KV_PACKED ? 2 : 1;
    bind(arrays[0], arrays[step], segment);
    if (step == 2) {
      segment.key_scales = static_cast<uint16_t *>(arrays[1].data);
      segment.value_scales = static_cast<uint16_t *>(arrays[3].data);
    }
    arrays += 2 * step;
  }
  return arrays;
}

// The cache of one sequence of the batch.
tq_attend_params sequence(const tq_attend_params &params, int b) {
  tq_attend_params result = params;
  for (int s = 0; s < params.n_segments; s++) {
    tq_segment &segment = result.segments[s];
    const int64_t size = segment.format == TQ_KV_PACKED ? 1 : segment.format == TQ_KV_F16 ? 2 : 4;
    segment.keys = static_cast<char *>(segment.keys) + b * segment.key_batch_stride * size;
    segment.values = static_cast<char *>(segment.values) + b * segment.value_batch_stride * size;
    if (segment.format != TQ_KV_PACKED) continue;
    segment.key_scales += int64_t(b) * params.n_kv_heads * segment.capacity;
    segment.value_scales += int64_t(b) * params.n_kv_heads * segment.capacity;
  }
  return result;
}

}  // namespace
}  // namespace tq

using namespace tq;

void tq_attend(const void *params, const tq_array *in, const tq_array *out) {
  tq_attend_params p = *static_cast<const tq_attend_params *>(params);
  const tq_array &q = in[0], &result = out[0];
  const tq_array *last = bind(in + 1, p);
  Mask mask;
  if (p.mask) {
    // An axis of one entry serves all.
    const auto stride = [&](int axis) { return last->shape[axis] == 1 ? 0 : last->strides[axis]; };
    mask = {last->data, last->dtype, stride(0), stride(1), stride(2)};
  }
  attend(p, {q.shape[0], q.strides[0], result.strides[0]}, {floats(q), q.strides[1], q.strides[2]}, q.shape[2],
         {floats(result), result.strides[1], result.strides[2]}, p.mask ? &mask : nullptr);
}

void tq_kv_append(const void *params, const tq_array *in, const tq_array *out) {
  tq_attend_params p = *static_cast<const tq_attend_params *>(params);
  bind(out, p);
  const tq_array &keys = in[0], &values = in[1];
  for (int b = 0; b < keys.shape[0]; b++) {
    append(sequence(p, b), {floats(keys) + b * keys.strides[0], keys.strides[1], keys.strides[2]},
           {floats(values) + b * values.strides[0], values.strides[1], values.strides[2]}, keys.shape[2]);
  }
}

void tq_kv_unpack(const void *params, const tq_array *in, const tq_array *out) {
  tq_attend_params p = *static_cast<const tq_attend_params *>(params);
  p.n_segments = 1;
  bind(in, p);
  const tq_segment &segment = p.segments[0];
  const tq_array &keys = out[0], &values = out[1];
  const int n_blocks = (segment.count + BLOCK_TOKENS - 1) / BLOCK_TOKENS;
  const int64_t heads = int64_t(keys.shape[0]) * p.n_kv_heads;
  const PackedCode code(p);
  parallel([&](int i, int n) {
    const Share share(heads * n_blocks, i, n);
    for (int64_t item = share.first; item < share.last; item++) {
      const int64_t block = item % n_blocks, head = item / n_blocks;
      const int64_t b = head / p.n_kv_heads, h = head % p.n_kv_heads, row = segment.first + block * BLOCK_TOKENS;
      const int64_t at = row / BLOCK_TOKENS, scales = head * segment.capacity + row;
      const int count = std::min<int64_t>(BLOCK_TOKENS, segment.count - block * BLOCK_TOKENS);
      const PackedTokens tokens = {
          static_cast<const uint8_t *>(segment.keys) + b * segment.key_batch_stride + h * segment.key_head_stride +
              at * key_block_bytes(p.head_dim, p.code.key_bits),
          static_cast<const uint8_t *>(segment.values) + b * segment.value_batch_stride +
              h * segment.value_head_stride + at * value_block_bytes(p.value_dim, p.code.value_bits),
          segment.key_scales + scales, segment.value_scales + scales, count, 0};
      float *key = floats(keys) + b * keys.strides[0] + h * keys.strides[1] + block * BLOCK_TOKENS * keys.strides[2];
      float *value =
          floats(values) + b * values.strides[0] + h * values.strides[1] + block * BLOCK_TOKENS * values.strides[2];
      unpack_block(tokens, code, key, keys.strides[2], value, values.strides[2]);
      for (int t = 0; t < count; t++, key += keys.strides[2], value += values.strides[2]) {
        if (p.code.key_rotation.n > 0) unrotate_row(p.code.key_rotation, key, key);
        if (p.code.value_rotation.n > 0) unrotate_row(p.code.value_rotation, value, value);
      }
    }
  });
}

int64_t tq_kv_block_bytes(int32_t dim, int32_t bits, int32_t values) {
  return values ? value_block_bytes(dim, bits) : key_block_bytes(dim, bits);
}
