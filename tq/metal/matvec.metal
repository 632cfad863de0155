// y = x W^T for M rows of x. LK neighbouring lanes share ROWS rows of W and take their runs in turn, SPLIT SIMD-groups
// share them too and take every SPLIT-th of those turns; 32 / LK sets of rows fill a SIMD-group.
#include "dot.metal"

// body
    threadgroup float table[TABLE];
    threadgroup float parts[SPLIT > 1 ? SIMD_GROUPS * (32 / LK) * ROWS * M : 1];
    const Levels decoder =
        read_levels<FORM>(levels, TABLE, table, thread_index_in_threadgroup, threads_per_threadgroup.x);

    const uint tokens = x_shape[0], columns = x_shape[1];
    const uint rows = scales_shape[0], groups = scales_shape[1], words = w_shape[1];
    const uint simd_group = simdgroup_index_in_threadgroup, part = simd_group % SPLIT;
    const uint lane = thread_index_in_simdgroup % LK, row_set = thread_index_in_simdgroup / LK;
    const uint set_in_grid =
        (threadgroup_position_in_grid.x * (SIMD_GROUPS / SPLIT) + simd_group / SPLIT) * (32 / LK) + row_set;
    const uint first = set_in_grid * ROWS, first_token = threadgroup_position_in_grid.y * M;

    // Rows beyond the last repeat it, and are not stored.
    uint x_row[M], w_row[ROWS], scale_row[ROWS];
#pragma unroll
    for (uint m = 0; m < M; ++m) {
        x_row[m] = min(first_token + m, tokens - 1) * columns;
    }
#pragma unroll
    for (uint r = 0; r < ROWS; ++r) {
        w_row[r] = min(first + r, rows - 1) * words;
        scale_row[r] = min(first + r, rows - 1) * groups;
    }
    float sum[M][ROWS];
    dot_rows<BITS, FORM, GROUP, WHOLE>(
        x, x_row, columns, w, w_row, words, scales, scale_row, part * LK + lane, SPLIT * LK, decoder, sum);

    threadgroup float* mine = parts + (SPLIT > 1 ? (simd_group * (32 / LK) + row_set) * (ROWS * M) : 0);
#pragma unroll
    for (uint m = 0; m < M; ++m) {
#pragma unroll
        for (uint r = 0; r < ROWS; ++r) {
            sum[m][r] = sum_over_lanes<LK>(sum[m][r]);
            if (SPLIT > 1 && lane == 0) {
                mine[m * ROWS + r] = sum[m][r];
            }
        }
    }
    if (SPLIT > 1) {
        threadgroup_barrier(mem_flags::mem_threadgroup);
    }
    if (lane == 0 && part == 0) {
#pragma unroll
        for (uint m = 0; m < M; ++m) {
#pragma unroll
            for (uint r = 0; r < ROWS; ++r) {
                float total = sum[m][r];
                for (uint other = 1; other < SPLIT; ++other) {
                    total += mine[other * (32 / LK) * ROWS * M + m * ROWS + r];
                }
                const uint token = first_token + m, row = first + r;
                if (token < tokens && row < rows) {
                    y[size_t(token) * rows + row] = T(BIAS ? total + float(bias[row]) : total);
                }
            }
        }
    }
