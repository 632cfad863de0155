// y = H (signs * x), or its inverse x = signs * H^T y: the rotation of tq/engine/quantize/rotation.py in one launch.
//
// A block has M * P features, P a power of two, and H is the product of a Hadamard matrix of M and of the P-point
// Walsh-Hadamard transform. THREADS threads hold a block in registers: of each of its M rows of P, V values. A step of
// the transform adds and subtracts pairs of values that differ in one bit of their position: in a thread, or between
// the lanes of a SIMD-group; for the bits above those, lanes trade places through threadgroup memory.

// Rows of Hadamard matrices as MLX has them (mlx/backend/common/hadamard.h): bit k is set where entry k is -1.
constant constexpr uint HADAMARD_12[12] = {
    0x002, 0xaab, 0x3c8, 0x96e, 0xf20, 0x5ba, 0xc8c, 0x6e6, 0x23c, 0xb96, 0x8f0, 0xe5a};
constant constexpr uint HADAMARD_20[20] = {
    0x933de, 0x2e3bd, 0x5477b, 0xa0ef7, 0x499ef, 0x637c1, 0xc6ba2, 0x8d764, 0x1aee8, 0x359f0,
    0x0fa53, 0x174a7, 0x26d4e, 0x45e9c, 0x83d39, 0xf7a6d, 0xef4fa, 0xdedd5, 0xbdf8b, 0x7bf36};
constant constexpr uint HADAMARD_28[28] = {
    0xcd69e7e, 0x9ad7c7d, 0x37ab8fb, 0x6d571f7, 0xd8ae3ef, 0xb3587df, 0x66b4f3f, 0xb467f43, 0x6acbe87, 0xd593d8e,
    0xab27b9c, 0x564f7b8, 0xac9aff0, 0x5b31fe1, 0x87fb325, 0x0ff66ca, 0x1decd95, 0x39ddb2a, 0x71bf654, 0xe17eca9,
    0xc2fd9d2, 0xfcf1299, 0xfbe2532, 0xf7c4ae4, 0xef8d549, 0xdf1ea13, 0xbe3d4a6, 0x7e7a94c};

template <int M>
METAL_FUNC bool is_negative(int row, int column) {
    return ((M == 12 ? HADAMARD_12[row] : M == 20 ? HADAMARD_20[row] : HADAMARD_28[row]) >> column) & 1u;
}

// values[i * V] = the sum over k of +-values[k * V].
template <int M, int V, bool TRANSPOSED>
METAL_FUNC void multiply_small(thread float* values) {
    float sums[M];
#pragma unroll
    for (int i = 0; i < M; ++i) {
        sums[i] = 0.0f;
#pragma unroll
        for (int k = 0; k < M; ++k) {
            const bool negative = TRANSPOSED ? is_negative<M>(k, i) : is_negative<M>(i, k);
            sums[i] += negative ? -values[k * V] : values[k * V];
        }
    }
#pragma unroll
    for (int i = 0; i < M; ++i) {
        values[i * V] = sums[i];
    }
}

// Butterflies between threads whose index differs in one bit, for all bits below `size`, at most 32.
template <int COUNT>
METAL_FUNC void transform_lanes(thread float* values, uint index, uint size) {
    for (ushort distance = 1; distance < size; distance *= 2) {
        const float sign = index & distance ? -1.0f : 1.0f;
#pragma unroll
        for (int i = 0; i < COUNT; ++i) {
            values[i] = fma(values[i], sign, simd_shuffle_xor(values[i], distance));
        }
    }
}

// body
    // What a threadgroup trades at a time; with all of a large block it would leave no room for another threadgroup.
    constexpr int count = M * V, size = M * V * THREADS, simd_groups = (THREADS + 31) / 32;
    constexpr int traded = count * THREADS > 4096 ? 4096 / THREADS : count;
    threadgroup float staged[simd_groups > 1 ? traded * THREADS : 1];

    const uint columns = x_shape[1], blocks = x_shape[0] * (columns / size);
    const uint index = thread_index_in_threadgroup % THREADS;
    const uint block = threadgroup_position_in_grid.x * COPIES + thread_index_in_threadgroup / THREADS;
    // All lanes shuffle: those beyond the last block repeat it, and store nothing.
    const uint base = min(block, blocks - 1) * size, feature = base % columns;
    // At first, neighbouring lanes differ in the upper bits of a position.
    const uint position = simd_groups > 1 ? index % simd_groups * 32 + index / simd_groups : index;

    float values[count];
#pragma unroll
    for (int i = 0; i < count; ++i) {
        const uint at = i * THREADS + position;
        values[i] = float(x[base + at]) * (INVERSE ? 1.0f : float(signs[feature + at]));
    }
    if (M > 1) {
#pragma unroll
        for (int j = 0; j < V; ++j) {
            multiply_small<M, V, INVERSE>(values + j);
        }
    }
#pragma unroll
    for (int distance = 1; distance < V; distance *= 2) {
#pragma unroll
        for (int i = 0; i < count; ++i) {
            if (!(i & distance)) {
                const float low = values[i], high = values[i + distance];
                values[i] = low + high;
                values[i + distance] = low - high;
            }
        }
    }
    if (simd_groups > 1) {
        transform_lanes<count>(values, index, simd_groups);
#pragma unroll
        for (int first = 0; first < count; first += traded) {
            threadgroup_barrier(mem_flags::mem_threadgroup);
#pragma unroll
            for (int i = 0; i < traded; ++i) {
                if (first + i < count) {
                    staged[i * THREADS + position] = values[first + i];
                }
            }
            threadgroup_barrier(mem_flags::mem_threadgroup);
#pragma unroll
            for (int i = 0; i < traded; ++i) {
                if (first + i < count) {
                    values[first + i] = staged[i * THREADS + index];
                }
            }
        }
    }
    transform_lanes<count>(values, index, min(THREADS, 32));
    const float scale = 1.0f / sqrt(float(size));
    if (block < blocks) {
#pragma unroll
        for (int i = 0; i < count; ++i) {
            const uint at = i * THREADS + index;
            y[base + at] = T(values[i] * (INVERSE ? scale * float(signs[feature + at]) : scale));
        }
    }
