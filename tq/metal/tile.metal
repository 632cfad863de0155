// A tile of y = x W^T by one threadgroup of 4 SIMD-groups: rows of x and decoded rows of W are staged in threadgroup
// memory, a step of columns at a time, and multiplied as 8x8 matrices in float.
//
// What it costs, in Apple's cycles: an 8x8x8 product of 512 multiply-adds takes 18, so a weight costs BM * 18 / 512 =
// 2.25 for 64 rows of x; decoding takes 7 slots of a lane at 3 bits and 9 at 4, 9 / 32 = 0.3, once for all of the rows.
// For 8 columns a SIMD-group loads 4 + 4 operands and multiplies 4 * 4 of them (BM = BN = 64). Threadgroup memory is
// 2 * 64 * 40 elements: 10 KiB of half, so that five or six threadgroups fit on a core, and 20 KiB of float. The sums
// take 2 * 4 * 4 registers of a lane.
#include "codes.metal"

// Threads of a threadgroup: 2 by 2 SIMD-groups.
constant constexpr uint TILE_THREADS = 128;

// Elements from one staged row to the next. With 40, the 8 rows that a SIMD-group reads at once lie in different banks,
// for elements of 2 and of 4 bytes; a step has 2 runs, 32 columns or 40 of trits.
constant constexpr uint TILE_STRIDE = 40;

// How T is staged, in vectors: threadgroup memory serves 8 or 16 bytes of a lane as fast as 2. Weights are half, which
// is as exact as their float16 scales, or float for float x; of x, the bits. Products are of float in any case: not
// every Metal has 8x8 matrices of bfloat, and those of half are hardly faster.
template <typename T>
struct Staged {
    typedef half weight;
    typedef half4 weights;
    typedef ushort bits;
    typedef ushort4 four;
};
template <>
struct Staged<float> {
    typedef float weight;
    typedef float4 weights;
    typedef uint bits;
    typedef uint4 four;
};

// Of a packed matrix; words and groups are those of a row.
struct MatrixShape {
    uint rows, columns, words, groups;
};

// Stage columns [column, column + STEP) of rows [0, n) of x; zeros beyond the last column.
template <typename T, int BM, int STEP, typename X>
METAL_FUNC void stage_x(
    X x, uint n, uint columns, uint column, uint thread_index, threadgroup typename Staged<T>::four* staged) {
    for (uint chunk = thread_index; chunk < BM * STEP / 8; chunk += TILE_THREADS) {
        const uint row = chunk / (STEP / 8), offset = chunk % (STEP / 8) * 8;
        // Rows beyond the last repeat it: nobody stores their products.
        X source = x + size_t(min(row, n - 1)) * columns + column + offset;
        threadgroup typename Staged<T>::four* target = staged + (row * TILE_STRIDE + offset) / 4;
        const int rest = int(columns - column) - int(offset);
        typename Staged<T>::four values[2];
        if (rest >= 8) {
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                values[i / 4][i % 4] = as_type<typename Staged<T>::bits>(T(source[i]));
            }
        } else {
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                values[i / 4][i % 4] = as_type<typename Staged<T>::bits>(i < rest ? T(source[i]) : T(0));
            }
        }
        target[0] = values[0];
        target[1] = values[1];
    }
}

// Decode the same columns of rows [first, first + BN) of W, scaled. What lies beyond the last column is finite.
template <typename T, int BITS, int GROUP, int FORM, bool WHOLE, int BN, typename W, typename S>
METAL_FUNC void stage_w(
    W w, S scales, MatrixShape shape, const thread Levels& levels, uint first, uint column, uint thread_index,
    threadgroup typename Staged<T>::weights* staged) {
    constexpr uint length = Run<BITS>::LENGTH;
    for (uint i = thread_index; i < 2 * BN; i += TILE_THREADS) {
        const uint row = min(first + i / 2, shape.rows - 1);
        // The last step may have a run beyond the last column: it repeats the one before.
        const uint last = (shape.columns - 1) / length, run = min(column / length + i % 2, last);
        Run<BITS> codes;
        load_run<WHOLE>(w + size_t(row) * shape.words, run, shape.words, codes);
        // Groups are multiples of 32 columns, so that only a run of 20 trits may lie in two.
        const uint group = GROUP ? run * length / (GROUP ? GROUP : 1) : 0;
        const uint border = GROUP ? (group + 1) * GROUP - run * length : length;
        S row_scales = scales + size_t(row) * shape.groups;
        const float scale = float(row_scales[group]) * levels.gain;
        const float next = BITS == 0 ? float(row_scales[min(group + 1, shape.groups - 1)]) * levels.gain : scale;
        threadgroup typename Staged<T>::weights* target = staged + (i / 2 * TILE_STRIDE + i % 2 * length) / 4;
#pragma unroll
        for (uint k = 0; k < length; k += 4) {
            typename Staged<T>::weights values;
#pragma unroll
            for (uint j = 0; j < 4; ++j) {
                const float value = value_at<FORM>(codes, k + j, levels) * (BITS || k < border ? scale : next);
                values[j] = typename Staged<T>::weight(value);
            }
            target[k / 4] = values;
        }
    }
}

// y[0:n, first:first + BN] = x[0:n] W[first:first + BN]^T (+ bias), n <= BM. All threads of the threadgroup call it.
//
// The 8x8 blocks of rows go to the SIMD-groups in turn, so that both halves have work when n is small.
template <
    typename T, int BITS, int GROUP, int FORM, bool WHOLE, int BM, int BN, bool BIAS, typename X, typename W,
    typename S, typename B>
METAL_FUNC void multiply_tile(
    X x, uint n, W w, S scales, MatrixShape shape, const thread Levels& levels, uint first, B bias, device T* y,
    uint thread_index, threadgroup typename Staged<T>::four* staged_x,
    threadgroup typename Staged<T>::weights* staged_w) {
    constexpr uint step = 2 * Run<BITS>::LENGTH, blocks_m = BM / 16, blocks_n = BN / 16;
    const uint simd_group = thread_index / 32, lane = thread_index % 32;
    const uint group_m = simd_group / 2, group_n = simd_group % 2;
    // Where the two neighbouring elements of this lane lie in an 8x8 matrix.
    const uint at_m = lane / 16 * 4 + lane / 2 % 4, at_n = lane / 8 % 2 * 4 + lane % 2 * 2;

    const threadgroup typename Staged<T>::bits* left_source =
        (const threadgroup typename Staged<T>::bits*)staged_x + at_m * TILE_STRIDE + at_n;
    const threadgroup typename Staged<T>::weight* right_source =
        (const threadgroup typename Staged<T>::weight*)staged_w + (group_n * 8 + at_n) * TILE_STRIDE + at_m;

    simdgroup_matrix<float, 8, 8> sum[blocks_m][blocks_n];
#pragma unroll
    for (uint i = 0; i < blocks_m; ++i) {
#pragma unroll
        for (uint j = 0; j < blocks_n; ++j) {
            sum[i][j] = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
        }
    }
    for (uint column = 0; column < shape.columns; column += step) {
        threadgroup_barrier(mem_flags::mem_threadgroup);
        stage_x<T, BM, step>(x, n, shape.columns, column, thread_index, staged_x);
        stage_w<T, BITS, GROUP, FORM, WHOLE, BN>(w, scales, shape, levels, first, column, thread_index, staged_w);
        threadgroup_barrier(mem_flags::mem_threadgroup);
        for (uint k = 0; k < step; k += 8) {
            simdgroup_matrix<float, 8, 8> right[blocks_n];
#pragma unroll
            for (uint j = 0; j < blocks_n; ++j) {
                const uint at = 16 * j * TILE_STRIDE + k;
                right[j].thread_elements()[0] = float(right_source[at]);
                right[j].thread_elements()[1] = float(right_source[at + TILE_STRIDE]);
            }
#pragma unroll
            for (uint i = 0; i < blocks_m; ++i) {
                const uint row = (2 * i + group_m) * 8;
                if (row < n) {
                    const uint at = row * TILE_STRIDE + k;
                    simdgroup_matrix<float, 8, 8> left;
                    left.thread_elements()[0] = float(as_type<T>(left_source[at]));
                    left.thread_elements()[1] = float(as_type<T>(left_source[at + 1]));
#pragma unroll
                    for (uint j = 0; j < blocks_n; ++j) {
                        simdgroup_multiply_accumulate(sum[i][j], left, right[j], sum[i][j]);
                    }
                }
            }
        }
    }
#pragma unroll
    for (uint i = 0; i < blocks_m; ++i) {
        const uint row = (2 * i + group_m) * 8 + at_m;
#pragma unroll
        for (uint j = 0; j < blocks_n; ++j) {
#pragma unroll
            for (uint e = 0; e < 2; ++e) {
                const uint out = first + (2 * j + group_n) * 8 + at_n + e;
                if (row < n && out < shape.rows) {
                    const float value = sum[i][j].thread_elements()[e];
                    y[size_t(row) * shape.rows + out] = T(BIAS ? value + float(bias[out]) : value);
                }
            }
        }
    }
}
