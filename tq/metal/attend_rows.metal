// Attention of up to 16 query rows of one key head over one split of the tokens: decode, and a few queries at once.
//
// A SIMD-group has ROWS rows and a slice of the split. TILES of them, with different rows, read the same slice at the
// same time. All scores of a slice come first, then the softmax, then its values: queries and sums are not needed at
// once, and registers suffice for both.
#include "attend.metal"

constant constexpr int SIMD_GROUPS = 8;
constant constexpr int SLICE_TOKENS = 128;  // of a SIMD-group, at most

// Lanes that read one vector, 16 numbers each. With dimensions that aren't 16 * 2^n some read what another one has.
template <int DIM>
struct Lanes {
    enum {
        runs = DIM / 16,
        count = runs > 16 ? 32 : runs > 8 ? 16 : runs > 4 ? 8 : runs > 2 ? 4 : runs,
    };
};

template <int ROWS>
struct PerRow {
    float of[ROWS];
};

// Softmax and sums of the values of ROWS rows so far; of the sums, 16 numbers.
template <int ROWS>
struct Partial {
    float largest[ROWS], total[ROWS], sums[ROWS][16];
};

// Products of the rows with 32 / lanes tokens: each lane has the part of its own 16 numbers.
template <int ROWS, typename K>
METAL_FUNC PerRow<ROWS> part_of_products(K keys, uint token, uint run, const thread float (&q)[ROWS][16]) {
    float values[16];
    read_run(keys, token, run, values);
    PerRow<ROWS> result;
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
        float sum = 0.0f;
#pragma unroll
        for (int i = 0; i < 16; ++i) {
            sum = fma(q[r][i], values[i], sum);
        }
        result.of[r] = sum;
    }
    return result;
}

// Products with tokens [token, token + 32), one a lane: lane l has token `token_of_lane`.
//
// Sums over lanes that are halved in number at every step, so that all lanes add all the time: of tokens 2n and 2n + 1
// an even lane adds up the one, its odd neighbour the other. Steps come as a binary counter carries. Two such levels
// cost hardly more than all, in half of the code.
template <int ROWS, int DIM, typename K>
METAL_FUNC PerRow<ROWS> products(K keys, int token, int end, uint lane, const thread float (&q)[ROWS][16]) {
    constexpr int lanes = Lanes<DIM>::count, at_once = 32 / lanes;
    constexpr int levels = lanes >= 4 ? 2 : lanes == 2 ? 1 : 0, steps = 1 << levels;
    const uint run = min(lane % lanes, uint(Lanes<DIM>::runs - 1)), group = lane / lanes;
    PerRow<ROWS> result;
    for (int part = 0; part < lanes / steps; ++part) {
        PerRow<ROWS> before[levels + 1];
#pragma unroll
        for (int step = 0; step < steps; ++step) {
            const int here = token + (part * steps + step) * at_once + int(group);
            PerRow<ROWS> sum = part_of_products<ROWS>(keys, uint(min(here, end - 1)), run, q);
            int carry = 0;
#pragma unroll
            for (; step >> carry & 1; ++carry) {
                const bool odd = lane >> carry & 1;
#pragma unroll
                for (int r = 0; r < ROWS; ++r) {
                    const float even_sum = before[carry].of[r], odd_sum = sum.of[r];
                    const float given = simd_shuffle_xor(odd ? even_sum : odd_sum, ushort(1 << carry));
                    sum.of[r] = (odd ? odd_sum : even_sum) + given;
                }
            }
            before[carry] = sum;
        }
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
            float sum = before[levels].of[r];
#pragma unroll
            for (int distance = steps; distance < lanes; distance *= 2) {
                sum += simd_shuffle_xor(sum, ushort(distance));
            }
            if (part == 0 || int(lane % lanes) / steps == part) {
                result.of[r] = sum;
            }
        }
    }
    return result;
}

template <int DIM>
METAL_FUNC int token_of_lane(uint lane) {
    constexpr int lanes = Lanes<DIM>::count;
    return int(lane % lanes) * (32 / lanes) + int(lane / lanes);
}

// Tokens [begin, end) of one SIMD-group, which are at most SLICE_TOKENS. weights: SLICE_TOKENS * ROWS of its own.
template <int ROWS, int KEY_DIM, int VALUE_DIM, typename K, typename V, typename Q, typename S>
METAL_FUNC void attend(
    K keys, V values, int begin, int end, int column, Q queries, const thread uint* rows, const thread S* scoring,
    uint lane, threadgroup float* weights, thread Partial<ROWS>& result) {
    float scale[ROWS];
    {
        float q[ROWS][16];
        const uint part = lane % Lanes<KEY_DIM>::count;
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
#pragma unroll
            for (int i = 0; i < 16; ++i) {
                // Lanes beyond the last run count for nothing.
                q[r][i] = part < uint(Lanes<KEY_DIM>::runs) ? float(queries[rows[r] * KEY_DIM + part * 16 + i]) : 0.0f;
            }
        }
        for (int token = begin; token < end; token += 32) {
            PerRow<ROWS> product = products<ROWS, KEY_DIM>(keys, token, end, lane, q);
            const int own = token_of_lane<KEY_DIM>(lane), here = token + own;
            const float key_scale = token_scale(keys, uint(min(here, end - 1)));
#pragma unroll
            for (int r = 0; r < ROWS; ++r) {
                const float score =
                    here < end ? score_of(scoring[r], product.of[r] * key_scale, column + here) : HIDDEN;
                result.largest[r] = max(result.largest[r], score);
                weights[(token - begin + own) * ROWS + r] = score;
            }
        }
    }
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
        result.largest[r] = simd_max(result.largest[r]);
        scale[r] = 0.0f;
    }
    for (int token = begin; token < end; token += 32) {
        const int own = token_of_lane<KEY_DIM>(lane);  // as above: each lane reads what it wrote
        const float value_scale = token_scale(values, uint(min(token + own, end - 1)));
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
            const int at = (token - begin + own) * ROWS + r;
            const float weight = weight_of(weights[at], result.largest[r]);
            scale[r] += weight;
            weights[at] = weight * value_scale;
        }
    }
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
        result.total[r] = simd_sum(scale[r]);
    }
    simdgroup_barrier(mem_flags::mem_threadgroup);
    constexpr int lanes = Lanes<VALUE_DIM>::count, at_once = 32 / lanes;
    const uint run = min(lane % lanes, uint(Lanes<VALUE_DIM>::runs - 1));
    for (int token = begin; token < end; token += at_once) {
        const int here = token + int(lane) / lanes;  // those beyond the end have no weight
        float numbers[16];
        read_run(values, uint(min(here, end - 1)), run, numbers);
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
            const float weight = weights[(here - begin) * ROWS + r];
#pragma unroll
            for (int i = 0; i < 16; ++i) {
                result.sums[r][i] = fma(weight, numbers[i], result.sums[r][i]);
            }
        }
    }
}

// body
    constexpr int SLICES = SIMD_GROUPS / TILES;
    constexpr int MOST = SLICE_TOKENS * ROWS > VALUE_DIM ? SLICE_TOKENS * ROWS : VALUE_DIM;
    threadgroup float key_table[KEY_TABLE], value_table[VALUE_TABLE];
    threadgroup float shared[SIMD_GROUPS * MOST];  // weights, then sums
    threadgroup float statistics[SIMD_GROUPS * ROWS * 2];
    const uint lane = thread_index_in_simdgroup, thread_index = thread_index_in_threadgroup;
    const int simd_group = int(simdgroup_index_in_threadgroup);
    const int tile = simd_group % TILES, slice = simd_group / TILES;
    const Levels of_keys =
        read_levels<KEY_FORM>(key_levels, KEY_TABLE, key_table, thread_index, 32 * SIMD_GROUPS);
    const Levels of_values =
        read_levels<VALUE_FORM>(value_levels, VALUE_TABLE, value_table, thread_index, 32 * SIMD_GROUPS);

    const int split = int(threadgroup_position_in_grid.x), splits = shape[SPLITS];
    const int first_row = int(threadgroup_position_in_grid.y) * TILES * ROWS;
    const int key_head = int(threadgroup_position_in_grid.z), key_heads = shape[KEY_HEADS];
    const int batch = key_head / key_heads;
    const int length = shape[QUERIES], n_rows = shape[HEADS] / key_heads * length;  // of a key head
    const size_t row_of_all = size_t(key_head) * n_rows;

    uint rows[ROWS];
    Scoring<MASK, decltype(mask + 0)> scores[ROWS];
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
        rows[r] = uint(min(first_row + tile * ROWS + r, n_rows - 1));
        const int head = key_head % key_heads * (n_rows / length) + int(rows[r]) / length;
        scores[r] = scoring<MASK>(mask, mask_shape, shape, factors, batch, head, int(rows[r]) % length);
    }
    Partial<ROWS> partial;
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
        partial.largest[r] = HIDDEN;
        partial.total[r] = 0.0f;
#pragma unroll
        for (int i = 0; i < 16; ++i) {
            partial.sums[r][i] = 0.0f;
        }
    }
    const Span span = split_span(shape, split, STARTS ? int(starts[batch]) : 0);
    const int tokens = (shape[SPLIT_TOKENS] + SLICES - 1) / SLICES;  // of a slice
    const int begin = span.begin + slice * tokens, end = min(span.end, begin + tokens);
    threadgroup float* weights = shared + simd_group * MOST;
    if (begin < end) {
        if (span.segment == 1) {
            // Rotations keep scalar products: rotated queries score rotated keys.
            const size_t token = size_t(key_head) * keys_shape[2];
            const PackedTokens<KEY_BITS, KEY_FORM, KEY_GROUP> packed_keys = {
                keys + token * keys_shape[3], key_scales + token * key_scales_shape[3], uint(keys_shape[3]),
                uint(key_scales_shape[3]), of_keys};
            const PackedTokens<VALUE_BITS, VALUE_FORM, VALUE_GROUP> packed_values = {
                values + token * values_shape[3], value_scales + token * value_scales_shape[3], uint(values_shape[3]),
                uint(value_scales_shape[3]), of_values};
            attend<ROWS, KEY_DIM, VALUE_DIM>(packed_keys, packed_values, begin, end, span.column,
                rotated_q + row_of_all * KEY_DIM, rows, scores, lane, weights, partial);
        } else {
            const bool sink = span.segment == 0;
            const size_t token = size_t(key_head) * (sink ? sink_keys_shape[2] : recent_keys_shape[2]);
            const PlainTokens<T> plain_keys = {(sink ? sink_keys : recent_keys) + token * KEY_DIM, KEY_DIM};
            const PlainTokens<T> plain_values = {(sink ? sink_values : recent_values) + token * VALUE_DIM, VALUE_DIM};
            attend<ROWS, KEY_DIM, VALUE_DIM>(plain_keys, plain_values, begin, end, span.column,
                q + row_of_all * KEY_DIM, rows, scores, lane, weights, partial);
        }
    }

    // Lanes that had other tokens for the same numbers.
#pragma unroll
    for (int distance = Lanes<VALUE_DIM>::count; distance < 32; distance *= 2) {
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
#pragma unroll
            for (int i = 0; i < 16; ++i) {
                partial.sums[r][i] += simd_shuffle_xor(partial.sums[r][i], ushort(distance));
            }
        }
    }

    // Slices of the same rows become one.
    if (lane == 0) {
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
            statistics[(simd_group * ROWS + r) * 2] = partial.largest[r];
            statistics[(simd_group * ROWS + r) * 2 + 1] = partial.total[r];
        }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
        float largest = HIDDEN, total = 0.0f;
        for (int s = 0; s < SLICES; ++s) {
            largest = max(largest, statistics[((s * TILES + tile) * ROWS + r) * 2]);
        }
        for (int s = 0; s < SLICES; ++s) {
            const int at = ((s * TILES + tile) * ROWS + r) * 2;
            total += statistics[at + 1] * exp(statistics[at] - largest);
        }
        const float weight = exp(partial.largest[r] - largest);
        if (lane < uint(Lanes<VALUE_DIM>::runs)) {
#pragma unroll
            for (int i = 0; i < 16; ++i) {
                shared[simd_group * VALUE_DIM + int(lane) * 16 + i] = partial.sums[r][i] * weight;
            }
        }
        const int row = first_row + tile * ROWS + r;
        if (slice == 0 && lane == 0 && row < n_rows) {
            const size_t at = (row_of_all + row) * splits + split;
            maxima[at] = largest;
            totals[at] = total;
        }
        threadgroup_barrier(mem_flags::mem_threadgroup);
        for (int i = int(thread_index); i < TILES * VALUE_DIM; i += 32 * SIMD_GROUPS) {
            const int row = first_row + i / VALUE_DIM * ROWS + r;
            float sum = 0.0f;
            for (int s = 0; s < SLICES; ++s) {
                sum += shared[s * TILES * VALUE_DIM + i];
            }
            if (row < n_rows) {
                sums[((row_of_all + row) * splits + split) * VALUE_DIM + i % VALUE_DIM] = sum;
            }
        }
        threadgroup_barrier(mem_flags::mem_threadgroup);
    }
