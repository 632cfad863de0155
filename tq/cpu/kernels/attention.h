// Appending to a key-value cache and attending to it, for other kernels.
//
// One tq_attend_params serves both: fill its segments with the cache as it is after the new tokens (see tq_kv_append in
// tq_cpu.h), position with that of the first new token, then
//     append(params, keys, values, n);  attend(params, queries, n, out);
// For mlx-lm's KVCache that is one segment: format TQ_KV_F32 or TQ_KV_F16, keys and values the buffers, head strides
// capacity * dim, position 0, count = offset + n, params.position = offset, causal 1.
// Both are parallel inside and must be called from one thread; from inside a parallel region they run on the caller.
#pragma once
#include "internal.h"

namespace tq {

// A mask over queries and positions, bool (true: visible) or float32 (added to scores): that of batch b, head h, query i
// begins at b * batch_stride + h * head_stride + i * query_stride elements, one element per position.
struct Mask {
  const void *data;
  int32_t dtype;
  int64_t batch_stride, head_stride, query_stride;
};

// attend of internal.h for several sequences, which are the strides here apart in q and out, and by their batch strides in
// the segments; or, if each has parameters of its own, params[b] are those of sequence b. They differ in positions and
// segments alone. mask may be NULL.
struct Sequences {
  int count;
  int64_t q_stride, out_stride;
  bool own_params = false;
};
void attend(const tq_attend_params *params, const Sequences &batch, Strided q, int n_queries, Strided out,
            const Mask *mask);

// n new tokens of one sequence: keys[h * head_stride + i * row_stride] of kv head h, values alike.
void append(const tq_attend_params &params, Strided keys, Strided values, int n);

}  // namespace tq
