// y[i] = row ids[i] of W, decoded, in the rotated basis: a thread takes a run of columns.
#include "codes.metal"

// body
    threadgroup float table[TABLE];
    const Levels decoder =
        read_levels<FORM>(levels, TABLE, table, thread_index_in_threadgroup, threads_per_threadgroup.x);

    constexpr uint length = Run<BITS>::LENGTH;
    const uint run = thread_position_in_grid.x, first = run * length;
    const uint columns = COLUMNS, words = w_shape[1], groups = scales_shape[1];
    const size_t row = min(uint(ids[threadgroup_position_in_grid.y]), uint(w_shape[0]) - 1);
    if (first < columns) {
        Run<BITS> codes;
        load_run<false>(w + row * words, run, words, codes);
#pragma unroll
        for (uint i = 0; i < length; ++i) {
            if (first + i < columns) {
                const uint group = GROUP ? (first + i) / (GROUP ? GROUP : 1) : 0;
                const float scale = decoder.gain * float(scales[row * groups + group]);
                y[size_t(threadgroup_position_in_grid.y) * columns + first + i] =
                    T(scale * value_at<FORM>(codes, i, decoder));
            }
        }
    }
