// Products of M rows of x with ROWS rows of W, each lane a run of columns at a time. A weight is decoded once for all
// rows of x.
#include "codes.metal"

// values = x[0:4]; zeros where fewer than 4 are left.
template <bool WHOLE, typename X>
METAL_FUNC void load_four(X x, int left, thread float* values) {
    if (WHOLE || left >= 4) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            values[i] = float(x[i]);
        }
    } else {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            values[i] = i < left ? float(x[i]) : 0.0f;
        }
    }
}

// sum[m][r] = this lane's part of x[m] . W[r]: of the runs first_run, first_run + step, ...
//
// x_row, w_row and scale_row are where rows begin: elements of x, words of w, scales. WHOLE: runs fill the columns.
template <int BITS, int FORM, int GROUP, bool WHOLE, int M, int ROWS, typename X, typename W, typename S>
METAL_FUNC void dot_rows(
    X x, const thread uint* x_row, uint columns, W w, const thread uint* w_row, uint words, S scales,
    const thread uint* scale_row, uint first_run, uint step, const thread Levels& levels,
    thread float (&sum)[M][ROWS]) {
    constexpr uint length = Run<BITS>::LENGTH;
    const uint runs = (columns + length - 1) / length;
#pragma unroll
    for (int m = 0; m < M; ++m) {
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
            sum[m][r] = 0.0f;
        }
    }
    for (uint run = first_run; run < runs; run += step) {
        // Groups are multiples of 32 columns: only a run of 20 trits may lie in two, the border at a multiple of 4.
        constexpr bool two_groups = GROUP && BITS == 0;
        const uint group = GROUP ? run * length / (GROUP ? GROUP : 1) : 0;
        const uint next_group = two_groups ? min(group + 1, (columns - 1) / (GROUP ? GROUP : 1)) : group;
        const uint border = two_groups ? (group + 1) * GROUP - run * length : length;
        Run<BITS> codes[ROWS];
        float scale[ROWS], next_scale[ROWS], part[M][ROWS] = {};
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
            load_run<WHOLE>(w + w_row[r], run, words, codes[r]);
            scale[r] = GROUP ? float(scales[scale_row[r] + group]) : 1.0f;
            next_scale[r] = two_groups ? float(scales[scale_row[r] + next_group]) : scale[r];
        }
#pragma unroll
        for (uint i = 0; i < length; i += 4) {
            float values[M][4];
#pragma unroll
            for (int m = 0; m < M; ++m) {
                load_four<WHOLE>(x + x_row[m] + run * length + i, int(columns - run * length) - int(i), values[m]);
            }
#pragma unroll
            for (int r = 0; r < ROWS; ++r) {
                float weights[4];
#pragma unroll
                for (int k = 0; k < 4; ++k) {
                    weights[k] = value_at<FORM>(codes[r], i + k, levels);
                }
#pragma unroll
                for (int m = 0; m < M; ++m) {
                    float four = two_groups ? 0.0f : part[m][r];
#pragma unroll
                    for (int k = 0; k < 4; ++k) {
                        four = fma(values[m][k], weights[k], four);
                    }
                    if (two_groups) {
                        sum[m][r] = fma(four, i < border ? scale[r] : next_scale[r], sum[m][r]);
                    } else {
                        part[m][r] = four;
                    }
                }
            }
        }
#pragma unroll
        for (int r = 0; r < ROWS && !two_groups; ++r) {
#pragma unroll
            for (int m = 0; m < M; ++m) {
                sum[m][r] = GROUP ? fma(part[m][r], scale[r], sum[m][r]) : sum[m][r] + part[m][r];
            }
        }
    }
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
        const float scale = GROUP ? levels.gain : levels.gain * float(scales[scale_row[r]]);
#pragma unroll
        for (int m = 0; m < M; ++m) {
            sum[m][r] *= scale;
        }
    }
}

// The sum over LK neighbouring lanes, a power of two of them, in each.
template <int LK>
METAL_FUNC float sum_over_lanes(float value) {
#pragma unroll
    for (ushort distance = LK / 2; distance > 0; distance /= 2) {
        value += simd_shuffle_xor(value, distance);
    }
    return value;
}
