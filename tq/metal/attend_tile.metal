// Attention of many query rows of one key head: several queries to verify, or a part of a prompt.
//
// A threadgroup has 32 rows. Tokens are decoded into threadgroup memory, STEP at a time, and serve all of its rows;
// products are those of 8x8 matrices, of which each SIMD-group has 8 rows. The softmax goes along (Milakov and
// Gimelshein 2018): a lane has two neighbouring numbers of one row in each matrix, and rescales the sums in registers.
//
// FINAL: all tokens at once, and what is stored is the result, in the basis of the value codes: plain tokens must have
// been rotated like packed ones. Else: one split of the tokens, for attend_combine.metal.
#include "attend.metal"

constant constexpr int THREADS = 128;
constant constexpr int ROWS = 32;

// Decode tokens [token, token + STEP), repeating the last, to rows of threadgroup memory.
template <int DIM, int STEP, int STRIDE, typename S, typename K>
METAL_FUNC void stage(K tokens, int token, int end, uint thread_index, threadgroup S* staged) {
    constexpr int runs = DIM / 16;
    for (int i = int(thread_index); i < STEP * runs; i += THREADS) {
        const uint here = uint(min(token + i / runs, end - 1)), run = uint(i % runs);
        float values[16];
        read_run(tokens, here, run, values);
        const float scale = token_scale(tokens, here);
        threadgroup S* target = staged + i / runs * STRIDE + run * 16;
#pragma unroll
        for (int k = 0; k < 16; ++k) {
            target[k] = S(values[k] * scale);
        }
    }
}

// body
    // With 16 bytes between rows, what a SIMD-group reads at once lies in different banks.
    constexpr int STRIDE = (KEY_DIM > VALUE_DIM ? KEY_DIM : VALUE_DIM) + 16 / int(sizeof(S));
    threadgroup float key_table[KEY_TABLE], value_table[VALUE_TABLE];
    threadgroup S staged[STEP * STRIDE];
    const uint thread_index = thread_index_in_threadgroup;
    const Levels of_keys = read_levels<KEY_FORM>(key_levels, KEY_TABLE, key_table, thread_index, THREADS);
    const Levels of_values = read_levels<VALUE_FORM>(value_levels, VALUE_TABLE, value_table, thread_index, THREADS);

    const int split = int(threadgroup_position_in_grid.x), splits = shape[SPLITS];
    const int first_row = int(threadgroup_position_in_grid.y) * ROWS;
    const int key_head = int(threadgroup_position_in_grid.z), key_heads = shape[KEY_HEADS];
    const int batch = key_head / key_heads, length = shape[QUERIES];
    const int n_rows = shape[HEADS] / key_heads * length;  // of a key head
    const size_t row_of_all = size_t(key_head) * n_rows;

    // This lane's row, and its first column of each matrix.
    const int lane = int(thread_index_in_simdgroup);
    const int at_m = lane / 16 * 4 + lane / 2 % 4, at_n = lane / 8 % 2 * 4 + lane % 2 * 2;
    const int row = first_row + int(simdgroup_index_in_threadgroup) * 8 + at_m;
    const size_t own = row_of_all + min(row, n_rows - 1);
    const int head = int(own / length % shape[HEADS]);
    const Scoring<MASK, decltype(mask + 0)> rule =
        scoring<MASK>(mask, mask_shape, shape, factors, batch, head, int(own % length));
    // What no row of this threadgroup sees is not read.
    const int last_row = min(first_row + ROWS, n_rows) - 1;
    const int last_query = first_row / length == last_row / length ? last_row % length : length - 1;
    const int last = scoring<MASK>(mask, mask_shape, shape, factors, 0, 0, last_query).last;

    simdgroup_matrix<float, 8, 8> sum[VALUE_DIM / 8];
#pragma unroll
    for (int j = 0; j < VALUE_DIM / 8; ++j) {
        sum[j] = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
    }
    float largest = SINKS ? float(sinks[head]) : HIDDEN, total = 0.0f;

    for (int part = 0; part < (FINAL ? 3 : 1); ++part) {
        const int start = STARTS ? int(starts[batch]) : 0;
        const Span span = FINAL ? segment_span(shape, part, start) : split_span(shape, split, start);
        const int end = min(span.end, last + 1 - span.column);
        const bool packed = span.segment == 1, sink = span.segment == 0;
        const size_t token_of_packed = size_t(key_head) * keys_shape[2];
        const PackedTokens<KEY_BITS, KEY_FORM, KEY_GROUP> packed_keys = {
            keys + token_of_packed * keys_shape[3], key_scales + token_of_packed * key_scales_shape[3],
            uint(keys_shape[3]), uint(key_scales_shape[3]), of_keys};
        const PackedTokens<VALUE_BITS, VALUE_FORM, VALUE_GROUP> packed_values = {
            values + token_of_packed * values_shape[3], value_scales + token_of_packed * value_scales_shape[3],
            uint(values_shape[3]), uint(value_scales_shape[3]), of_values};
        const size_t token_of_plain = size_t(key_head) * (sink ? sink_keys_shape[2] : recent_keys_shape[2]);
        const PlainTokens<T> plain_keys = {(sink ? sink_keys : recent_keys) + token_of_plain * KEY_DIM, KEY_DIM};
        const PlainTokens<T> plain_values = {
            (sink ? sink_values : recent_values) + token_of_plain * VALUE_DIM, VALUE_DIM};
        const device S* query = (packed ? rotated_q : q) + own * KEY_DIM;

        for (int token = span.begin; token < end; token += STEP) {
            threadgroup_barrier(mem_flags::mem_threadgroup);
            if (packed) {
                stage<KEY_DIM, STEP, STRIDE>(packed_keys, token, end, thread_index, staged);
            } else {
                stage<KEY_DIM, STEP, STRIDE>(plain_keys, token, end, thread_index, staged);
            }
            threadgroup_barrier(mem_flags::mem_threadgroup);
            simdgroup_matrix<float, 8, 8> score[STEP / 8];
#pragma unroll
            for (int j = 0; j < STEP / 8; ++j) {
                score[j] = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
            }
            for (int k = 0; k < KEY_DIM; k += 8) {
                simdgroup_matrix<S, 8, 8> left, right;
                left.thread_elements()[0] = query[k + at_n];
                left.thread_elements()[1] = query[k + at_n + 1];
#pragma unroll
                for (int j = 0; j < STEP / 8; ++j) {
                    const threadgroup S* source = staged + (j * 8 + at_n) * STRIDE + k + at_m;
                    right.thread_elements()[0] = source[0];
                    right.thread_elements()[1] = source[STRIDE];
                    simdgroup_multiply_accumulate(score[j], left, right, score[j]);
                }
            }

            const float before = largest;
#pragma unroll
            for (int j = 0; j < STEP / 8; ++j) {
#pragma unroll
                for (int e = 0; e < 2; ++e) {
                    const int here = token + j * 8 + at_n + e;
                    const float product = score[j].thread_elements()[e];
                    // Beyond the end there may be no mask.
                    const float number = here < end ? score_of(rule, product, span.column + here) : HIDDEN;
                    score[j].thread_elements()[e] = number;
                    largest = max(largest, number);
                }
            }
            largest = max(largest, simd_shuffle_xor(largest, ushort(1)));
            largest = max(largest, simd_shuffle_xor(largest, ushort(8)));
            const float factor = exp(before - largest);
            total *= factor;
            simdgroup_matrix<S, 8, 8> weight[STEP / 8];
#pragma unroll
            for (int j = 0; j < STEP / 8; ++j) {
#pragma unroll
                for (int e = 0; e < 2; ++e) {
                    const float number = weight_of(score[j].thread_elements()[e], largest);
                    total += number;
                    weight[j].thread_elements()[e] = S(number);
                }
            }
#pragma unroll
            for (int j = 0; j < VALUE_DIM / 8; ++j) {
                sum[j].thread_elements()[0] *= factor;
                sum[j].thread_elements()[1] *= factor;
            }

            threadgroup_barrier(mem_flags::mem_threadgroup);
            if (packed) {
                stage<VALUE_DIM, STEP, STRIDE>(packed_values, token, end, thread_index, staged);
            } else {
                stage<VALUE_DIM, STEP, STRIDE>(plain_values, token, end, thread_index, staged);
            }
            threadgroup_barrier(mem_flags::mem_threadgroup);
#pragma unroll
            for (int k = 0; k < STEP / 8; ++k) {
#pragma unroll
                for (int j = 0; j < VALUE_DIM / 8; ++j) {
                    const threadgroup S* source = staged + (k * 8 + at_m) * STRIDE + j * 8 + at_n;
                    simdgroup_matrix<S, 8, 8> right;
                    right.thread_elements()[0] = source[0];
                    right.thread_elements()[1] = source[1];
                    simdgroup_multiply_accumulate(sum[j], weight[k], right, sum[j]);
                }
            }
        }
    }

    total += simd_shuffle_xor(total, ushort(1));
    total += simd_shuffle_xor(total, ushort(8));
    if (SINKS) {
        total += exp(float(sinks[head]) - largest);
    }
    if (row < n_rows) {
        const size_t at = own * splits + split;
        if (at_n == 0) {
            maxima[at] = largest;
            totals[at] = total;
        }
        // A query that sees no token has the result 0.
        const float factor = !FINAL ? 1.0f : total > 0.0f ? 1.0f / total : 0.0f;
#pragma unroll
        for (int j = 0; j < VALUE_DIM / 8; ++j) {
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                sums[at * VALUE_DIM + j * 8 + at_n + e] = O(sum[j].thread_elements()[e] * factor);
            }
        }
    }
