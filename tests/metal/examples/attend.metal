// Attention of one query with keys and values of 4-bit codes. A correct kernel, for bugs to be put into.
// The SIMD-groups of a threadgroup share the keys of a head and combine their sums in threadgroup memory.
constexpr int G = 4;
constexpr int E = D / 32;  // elements of a lane
const uint lane = thread_index_in_simdgroup, group = simdgroup_index_in_threadgroup;
const uint head = threadgroup_position_in_grid.x;
const uint length = keys_shape[1], words = keys_shape[2];
const uint kv_head = head / (q_shape[0] / keys_shape[0]);
threadgroup float maxima[G], totals[G];
threadgroup float sums[G][D];
float qv[E], sum[E], m = -INFINITY, l = 0.0f;
for (int e = 0; e < E; ++e) {
  qv[e] = float(q[head * D + lane * E + e]) * scale;
  sum[e] = 0.0f;
}
for (uint s = group; s < length; s += G) {
  const device uint* key = keys + (kv_head * length + s) * words;
  const device uint* value = values + (kv_head * length + s) * words;
  const uint bit = lane * E * 4;
  const uint kw = key[bit >> 5] >> (bit & 31), vw = value[bit >> 5] >> (bit & 31);
  float d = 0.0f;
  for (int e = 0; e < E; ++e) d += qv[e] * float(codebook[(kw >> (4 * e)) & 15u]);
  d = simd_sum(d) * float(key_scales[kv_head * length + s]);
  const float higher = max(m, d), keep = exp(m - higher), p = exp(d - higher);
  l = l * keep + p;
  m = higher;
  const float weight = p * float(value_scales[kv_head * length + s]);
  for (int e = 0; e < E; ++e) sum[e] = sum[e] * keep + weight * float(codebook[(vw >> (4 * e)) & 15u]);
}
if (lane == 0) { maxima[group] = m; totals[group] = l; }
for (int e = 0; e < E; ++e) sums[group][lane * E + e] = sum[e];
threadgroup_barrier(mem_flags::mem_threadgroup);
float highest = -INFINITY, total = 0.0f;
for (int i = 0; i < G; ++i) highest = max(highest, maxima[i]);
for (int i = 0; i < G; ++i) total += totals[i] * exp(maxima[i] - highest);
for (uint d = thread_index_in_threadgroup; d < uint(D); d += 32u * G) {
  float o = 0.0f;
  for (int i = 0; i < G; ++i) o += sums[i][d] * exp(maxima[i] - highest);
  out[head * D + d] = T(o / total);
}
