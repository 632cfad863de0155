// What kernels use of Metal, in CUDA: for text that tq/metal/cuda.py has changed. MLX's own headers come first, and it
// compiles with --device-as-default-execution-space, so that functions need no __device__.
#define METAL_FUNC inline
#define device
#define constant
#define thread
#define threadgroup

typedef unsigned int uint;
typedef unsigned short ushort;
typedef unsigned char uchar;
#define ushort2(a, b) make_ushort2(a, b)

// One-dimensional threadgroups, as all of these kernels have.
#define thread_index_in_threadgroup threadIdx.x
#define thread_index_in_simdgroup (threadIdx.x % 32u)
#define simdgroup_index_in_threadgroup (threadIdx.x / 32u)
#define threads_per_threadgroup blockDim
#define threadgroup_position_in_grid blockIdx
#define thread_position_in_grid make_uint3(blockIdx.x * blockDim.x + threadIdx.x, blockIdx.y, blockIdx.z)

enum class mem_flags { mem_none, mem_device, mem_threadgroup };
inline void threadgroup_barrier(mem_flags) {
    __syncthreads();
}
inline void simdgroup_barrier(mem_flags) {
    __syncwarp();
}

template <typename T>
inline T simd_shuffle_xor(T value, ushort mask) {
    return __shfl_xor_sync(0xffffffffu, value, mask);
}
template <typename T>
inline T simd_sum(T value) {
    for (ushort distance = 16; distance > 0; distance /= 2) {
        value += simd_shuffle_xor(value, distance);
    }
    return value;
}
template <typename T>
inline T simd_max(T value) {
    for (ushort distance = 16; distance > 0; distance /= 2) {
        value = max(value, simd_shuffle_xor(value, distance));
    }
    return value;
}

template <typename T, typename U>
inline T as_type(U value) {
    static_assert(sizeof(T) == sizeof(U), "as_type keeps the size");
    T result;
    memcpy(&result, &value, sizeof(T));
    return result;
}
inline float clamp(float value, float low, float high) {
    return fminf(fmaxf(value, low), high);
}
