// y[p] = W[e] x for the expert e of each pair p (a token and an expert that it chose). LK neighbouring lanes share ROWS
// rows of W. With M > 1, up to M neighbouring pairs of one expert share each decoded weight.
#include "pairs.metal"

// y[p] for the n <= M pairs from `start`, all of expert `expert`.
template <
    typename T, int BITS, int FORM, int GROUP, bool WHOLE, int LK, int M, int ROWS, int PAIRS_PER_X, bool BIAS,
    typename X, typename W, typename S, typename B>
METAL_FUNC void multiply_pairs(
    X x, uint columns, W w, uint words, S scales, uint groups, B bias, uint rows, size_t expert, uint start, uint n,
    uint first, uint lane, const thread Levels& levels, device T* y) {
    uint x_row[M];
#pragma unroll
    for (uint m = 0; m < M; ++m) {
        x_row[m] = (start + min(m, n - 1)) / PAIRS_PER_X * columns;
    }
    float sum[M][ROWS];
    expert_rows<BITS, FORM, GROUP, WHOLE, LK>(
        x, x_row, columns, w + expert * rows * words, words, scales + expert * rows * groups, groups, rows, first, lane,
        levels, sum);
    if (lane == 0) {
#pragma unroll
        for (uint m = 0; m < M; ++m) {
#pragma unroll
            for (uint r = 0; r < ROWS; ++r) {
                if (m < n && first + r < rows) {
                    const float bias_value = BIAS ? float(bias[BIAS ? expert * rows + first + r : 0]) : 0.0f;
                    y[size_t(start + m) * rows + first + r] = T(sum[m][r] + bias_value);
                }
            }
        }
    }
}

// body
    threadgroup float table[TABLE];
    const Levels decoder =
        read_levels<FORM>(levels, TABLE, table, thread_index_in_threadgroup, threads_per_threadgroup.x);
    const uint rows = w_shape[1], columns = x_shape[1], words = w_shape[2], groups = scales_shape[2];
    const uint first = thread_position_in_grid.x / LK * ROWS, lane = thread_index_in_simdgroup % LK;
    const uint end = min((threadgroup_position_in_grid.y + 1) * M, uint(experts_shape[0]));
    uint start = threadgroup_position_in_grid.y * M;
    while (start < end) {
        const uint number = experts[start];
        uint next = start + 1;
        while (next < end && experts[next] == number) {
            ++next;
        }
        const size_t expert = SLOTS ? slots[number] : number;
        if (next - start == 1) {
            multiply_pairs<T, BITS, FORM, GROUP, WHOLE, LK, 1, ROWS, PAIRS_PER_X, BIAS>(
                x, columns, w, words, scales, groups, bias, rows, expert, start, 1, first, lane, decoder, y);
        } else {
            multiply_pairs<T, BITS, FORM, GROUP, WHOLE, LK, M, ROWS, PAIRS_PER_X, BIAS>(
                x, columns, w, words, scales, groups, bias, rows, expert, start, next - start, first, lane, decoder, y);
        }
        start = next;
    }
