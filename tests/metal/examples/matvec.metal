// y = W x: 4-bit codes into a codebook of 16, a scale for each 64 columns. A correct kernel, for bugs to be put into.
// Each SIMD-group computes 4 rows; its lanes share the columns.
constexpr int R = 4;
const uint group = simdgroup_index_in_threadgroup;
const uint lane = thread_index_in_simdgroup;
const int rows = w_shape[0];
const int words = w_shape[1];  // of 8 codes
const int first = int(threadgroup_position_in_grid.x * simdgroups_per_threadgroup + group) * R;
threadgroup float table[16];
if (thread_index_in_threadgroup < 16) table[thread_index_in_threadgroup] = float(codebook[thread_index_in_threadgroup]);
threadgroup_barrier(mem_flags::mem_threadgroup);
float sum[R] = {0.0f, 0.0f, 0.0f, 0.0f};
for (int p = int(lane); p < words; p += 32) {
  const device half4* x4 = (const device half4*)(x + p * 8);
  const float4 x0 = float4(x4[0]), x1 = float4(x4[1]);
  for (int r = 0; r < R; ++r) {
    const int row = min(first + r, rows - 1);
    const uint q = w[row * words + p];
    const float4 w0 = float4(table[q & 15u], table[(q >> 4) & 15u], table[(q >> 8) & 15u], table[(q >> 12) & 15u]);
    const float4 w1 = float4(table[(q >> 16) & 15u], table[(q >> 20) & 15u], table[(q >> 24) & 15u], table[q >> 28]);
    sum[r] += float(scales[row * (words * 8 / GROUP) + p * 8 / GROUP]) * (dot(w0, x0) + dot(w1, x1));
  }
}
for (int r = 0; r < R; ++r) {
  const float total = simd_sum(sum[r]);
  if (lane == 0 && first + r < rows) y[first + r] = T(total);
}
