// Packs key or value vectors: rotation, scale, codes, words (the codec lloyd-max: tq/engine/cache/lloyd_max.py).
//
// A SIMD-group packs VECTORS of them, so that a row of the rotation is read once for all; a lane has every 32nd number
// of each, and 32 numbers are whole words at every width.

constant constexpr int SIMD_GROUPS = 4;

// As in lloyd_max.py.
constant constexpr float LOWEST = 0.7f, HIGHEST = 1.1f, LARGEST = 65504.0f;

METAL_FUNC float inverse_of(float scale) {
    return scale > 1e-30f ? 1.0f / scale : 0.0f;
}

// The code of the level nearest to x: as many as there are borders below x.
template <int BITS>
METAL_FUNC uint nearest_code(float x, const threadgroup float* borders) {
    if (BITS == 8) {
        return uint(int(clamp(rint(x), -127.0f, 127.0f)) + 128);
    }
    uint code = 0;
    for (uint step = 1u << (BITS - 1); step; step /= 2) {
        code += x > borders[code + step - 1] ? step : 0;
    }
    return code;
}

// The scale of a group of SIZE numbers, N a lane; those of lanes beyond the last are 0 and do not count.
template <int BITS, int SIZE, int N>
METAL_FUNC float scale_of(
    const thread float* numbers, uint lane, const threadgroup float* levels, const threadgroup float* borders) {
    float largest = 0.0f, squares = 0.0f;
#pragma unroll
    for (int i = 0; i < N; ++i) {
        largest = max(largest, abs(numbers[i]));
        squares = fma(numbers[i], numbers[i], squares);
    }
    largest = simd_max(largest);
    if (BITS == 8) {
        return min(largest / 127.0f, LARGEST);
    }
    const float rms = sqrt(simd_sum(squares) / float(SIZE));
    constexpr int starts = BITS == 1 ? 1 : BITS == 2 ? 3 : 8;
    const float first = starts == 1 ? rms : LOWEST * rms;
    const float last = max(HIGHEST * rms, starts == 8 ? largest / levels[(1 << BITS) - 1] : 0.0f);
    float best = rms, best_gain = 0.0f;
    for (int i = 0; i <= starts; ++i) {  // the best of them once more
        const float part = float(i) / float(starts > 1 ? starts - 1 : 1);
        const float start = i == starts ? best : fma(last - first, part, first);
        const float inverse = inverse_of(start);
        float product = 0.0f, square = 0.0f;
#pragma unroll
        for (int k = 0; k < N; ++k) {
            if (int(lane) + 32 * k < SIZE) {
                const float level = levels[nearest_code<BITS>(numbers[k] * inverse, borders)];
                product = fma(numbers[k], level, product);
                square = fma(level, level, square);
            }
        }
        product = simd_sum(product);
        const float fitted = product / simd_sum(square);
        if (fitted * product > best_gain) {
            best = fitted;
            best_gain = fitted * product;
        }
    }
    return min(best, LARGEST);
}

// body
    constexpr int LEVELS = BITS == 8 ? 1 : 1 << BITS;
    constexpr int SLICES = (DIM + 31) / 32, WORDS = (DIM * BITS + 31) / 32;
    // Numbers that share a scale, and how many of them a lane has.
    constexpr int SIZE = GROUP ? GROUP : DIM, N = (SIZE + 31) / 32;
    threadgroup float levels[LEVELS], borders[LEVELS];
    threadgroup uchar codes[SIMD_GROUPS * SLICES * 32];
    if (BITS != 8) {
        for (int i = int(thread_index_in_threadgroup); i < LEVELS; i += SIMD_GROUPS * 32) {
            levels[i] = float(codebook[i]);
            borders[i] = (float(codebook[i]) + float(codebook[min(i + 1, LEVELS - 1)])) / 2.0f;
        }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);

    const uint lane = thread_index_in_simdgroup;
    const int vectors = x_shape[0] * x_shape[1] * x_shape[2];
    const int first =
        (int(threadgroup_position_in_grid.x) * SIMD_GROUPS + int(simdgroup_index_in_threadgroup)) * VECTORS;
    float y[VECTORS][SLICES];
#pragma unroll
    for (int v = 0; v < VECTORS; ++v) {
#pragma unroll
        for (int k = 0; k < SLICES; ++k) {
            y[v][k] = 0.0f;
        }
    }
    for (int i = 0; i < DIM; ++i) {
        float row[SLICES];
#pragma unroll
        for (int k = 0; k < SLICES; ++k) {
            const int column = int(lane) + 32 * k;
            row[k] = column < DIM ? rotation[i * DIM + column] : 0.0f;
        }
#pragma unroll
        for (int v = 0; v < VECTORS; ++v) {
            const float number = float(x[size_t(min(first + v, vectors - 1)) * DIM + i]);
#pragma unroll
            for (int k = 0; k < SLICES; ++k) {
                y[v][k] = fma(number, row[k], y[v][k]);
            }
        }
    }

    threadgroup uchar* own = codes + simdgroup_index_in_threadgroup * SLICES * 32;
#pragma unroll
    for (int v = 0; v < VECTORS; ++v) {
        const int vector = first + v;
#pragma unroll
        for (int group = 0; group < SLICES / N; ++group) {
            const half scale = half(scale_of<BITS, SIZE, N>(y[v] + group * N, lane, levels, borders));
            const float inverse = inverse_of(float(scale));
#pragma unroll
            for (int k = 0; k < N; ++k) {
                const int slice = group * N + k;
                own[32 * slice + int(lane)] = uchar(nearest_code<BITS>(y[v][slice] * inverse, borders));
            }
            if (lane == 0 && vector < vectors) {
                scales[size_t(vector) * (SLICES / N) + group] = scale;
            }
        }
        simdgroup_barrier(mem_flags::mem_threadgroup);
        for (int word = int(lane); word < WORDS && vector < vectors; word += 32) {
            uint bits = 0;
            int code = word * 32 / BITS;  // the first that ends here
            for (int at = code * BITS - word * 32; at < 32 && code < DIM; at += BITS) {
                bits |= at < 0 ? uint(own[code]) >> -at : uint(own[code]) << at;
                ++code;
            }
            words[size_t(vector) * WORDS + word] = bits;
        }
        simdgroup_barrier(mem_flags::mem_threadgroup);
    }
