// One result of attention from the partial ones of all splits of the tokens: a threadgroup for each query row.
//
// Partial sums over packed tokens are in the basis of their codes, others are not. A rotation is linear: the former are
// added up, leave their basis as one vector, and meet the latter. All have the same softmax, since its weights are the
// same in every basis.
//
// PARTS of each sum are computed at once.
#include "attend.metal"

// body
    constexpr int COLUMNS = (VALUE_DIM + 31) / 32 * 32;
    threadgroup float plain[PARTS * VALUE_DIM], rotated[PARTS * VALUE_DIM];
    const int splits = shape[SPLITS], length = shape[QUERIES];
    const int row = int(threadgroup_position_in_grid.x), lane = int(thread_index_in_simdgroup);
    const int head = row / length % shape[HEADS];
    const size_t first = size_t(row) * splits;

    // Each SIMD-group finds the same largest score and total.
    float largest = SINKS ? float(sinks[head]) : HIDDEN;
    for (int s = lane; s < splits; s += 32) {
        largest = max(largest, maxima[first + s]);
    }
    largest = simd_max(largest);
    float total = 0.0f;
    for (int s = lane; s < splits; s += 32) {
        total += totals[first + s] * exp(maxima[first + s] - largest);
    }
    total = simd_sum(total) + (SINKS ? exp(float(sinks[head]) - largest) : 0.0f);

    const int begin = shape[SINK_SPLITS], end = begin + shape[PACKED_SPLITS];  // packed ones
    const int column = int(thread_index_in_threadgroup) % COLUMNS;
    const int part = int(thread_index_in_threadgroup) / COLUMNS;
    if (column < VALUE_DIM) {
        float sum = 0.0f, packed_sum = 0.0f;
        for (int s = part; s < splits; s += PARTS) {
            const float number = sums[(first + s) * VALUE_DIM + column] * exp(maxima[first + s] - largest);
            if (s >= begin && s < end) {
                packed_sum += number;
            } else {
                sum += number;
            }
        }
        plain[part * VALUE_DIM + column] = sum;
        rotated[part * VALUE_DIM + column] = packed_sum;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    if (column < VALUE_DIM) {
        float sum = plain[part * VALUE_DIM + column];
        for (int i = part; i < VALUE_DIM && end > begin; i += PARTS) {
            float number = 0.0f;
            for (int p = 0; p < PARTS; ++p) {
                number += rotated[p * VALUE_DIM + i];
            }
            sum = fma(number, rotation[i * VALUE_DIM + column], sum);
        }
        plain[part * VALUE_DIM + column] = sum;  // nobody else reads that element before the barrier
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    if (part == 0 && column < VALUE_DIM) {
        float sum = 0.0f;
        for (int p = 0; p < PARTS; ++p) {
            sum += plain[p * VALUE_DIM + column];
        }
        // A query that sees no token has the result 0.
        out[size_t(row) * VALUE_DIM + column] = T(total > 0.0f ? sum / total : 0.0f);
    }
