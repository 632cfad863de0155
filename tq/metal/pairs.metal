// ROWS rows of one expert's matrix times M rows of x, shared by LK neighbouring lanes.
#include "dot.metal"

// sum[m][r] = x[m] . W[first + r] in all of the lanes. Row m of x begins at element x_row[m]; w, scales: the expert's.
template <
    int BITS, int FORM, int GROUP, bool WHOLE, int LK, int M, int ROWS, typename X, typename W, typename S>
METAL_FUNC void expert_rows(
    X x, const thread uint* x_row, uint columns, W w, uint words, S scales, uint groups, uint rows, uint first,
    uint lane, const thread Levels& levels, thread float (&sum)[M][ROWS]) {
    uint w_row[ROWS], scale_row[ROWS];
#pragma unroll
    for (uint r = 0; r < ROWS; ++r) {
        // Rows beyond the last repeat it, and are not stored.
        w_row[r] = min(first + r, rows - 1) * words;
        scale_row[r] = min(first + r, rows - 1) * groups;
    }
    dot_rows<BITS, FORM, GROUP, WHOLE>(
        x, x_row, columns, w, w_row, words, scales, scale_row, lane, uint(LK), levels, sum);
#pragma unroll
    for (uint m = 0; m < M; ++m) {
#pragma unroll
        for (uint r = 0; r < ROWS; ++r) {
            sum[m][r] = sum_over_lanes<LK>(sum[m][r]);
        }
    }
}
