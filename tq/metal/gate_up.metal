// hidden[p] = act(gate[e] x, up[e] x) for the expert e of each pair p: LK neighbouring lanes share ROWS rows of both
// matrices, one after the other; x comes from the cache the second time.
#include "pairs.metal"

// The activations of tq/metal/experts.py.
enum { SILU = 0, GELU_TANH = 1, SWIGLU_OAI = 2 };

METAL_FUNC float sigmoid(float x) {
    return 1.0f / (1.0f + exp(-x));
}

template <int ACTIVATION>
METAL_FUNC float gated(float gate, float up, float alpha, float limit) {
    if (ACTIVATION == SILU) {
        return gate * sigmoid(gate) * up;
    }
    if (ACTIVATION == GELU_TANH) {
        // x (1 + tanh(z)) / 2 = x sigmoid(2 z), which cannot overflow to NaN.
        return gate * sigmoid(1.5957691216f * (gate + 0.044715f * gate * gate * gate)) * up;
    }
    // GPT-OSS: the gate is clipped from above only, and the linear part has 1 added.
    gate = min(gate, limit);
    return (clamp(up, -limit, limit) + 1.0f) * gate * sigmoid(alpha * gate);
}

// body
    threadgroup float gate_table[GATE_TABLE];
    threadgroup float up_table[UP_TABLE];
    const uint thread_index = thread_index_in_threadgroup, threads = threads_per_threadgroup.x;
    const Levels gate_decoder = read_levels<GATE_FORM>(gate_levels, GATE_TABLE, gate_table, thread_index, threads);
    const Levels up_decoder = read_levels<UP_FORM>(up_levels, UP_TABLE, up_table, thread_index, threads);
    const uint rows = gate_shape[1], columns = x_shape[1], words = gate_shape[2], groups = gate_scales_shape[2];
    const uint pair = threadgroup_position_in_grid.y, lane = thread_index_in_simdgroup % LK;
    const uint first = thread_position_in_grid.x / LK * ROWS, x_row = pair / PAIRS_PER_X * columns;
    const size_t expert = SLOTS ? slots[experts[pair]] : experts[pair];
    const size_t first_word = expert * rows * words, first_scale = expert * rows * groups;

    float gate_sum[1][ROWS], up_sum[1][ROWS];
    expert_rows<BITS, GATE_FORM, GROUP, WHOLE, LK>(
        x, &x_row, columns, gate + first_word, words, gate_scales + first_scale, groups, rows, first, lane,
        gate_decoder, gate_sum);
    expert_rows<BITS, UP_FORM, GROUP, WHOLE, LK>(
        x, &x_row, columns, up + first_word, words, up_scales + first_scale, groups, rows, first, lane, up_decoder,
        up_sum);
    if (lane == 0) {
#pragma unroll
        for (uint r = 0; r < ROWS; ++r) {
            if (first + r < rows) {
                const size_t at = expert * rows + first + r;
                const float gate_value = gate_sum[0][r] + (BIAS ? float(gate_bias[at]) : 0.0f);
                const float up_value = up_sum[0][r] + (BIAS ? float(up_bias[at]) : 0.0f);
                y[size_t(pair) * rows + first + r] =
                    T(gated<ACTIVATION>(gate_value, up_value, constants[0], constants[1]));
            }
        }
    }
