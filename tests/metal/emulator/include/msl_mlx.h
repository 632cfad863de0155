// Names inside Apple's metal_stdlib that MLX's bf16_math.h calls to add its bfloat16 overloads.
//
// The few that MLX declares and no kernel can reach are declared here without a body.
#pragma once
namespace metal {

#define MSL_INTERNAL_1(name, value) METAL_FUNC float __metal_##name(float x, int = 0) { return metal::name(x); }
#define MSL_INTERNAL_2(name, value) \
  METAL_FUNC float __metal_##name(float x, float y, int = 0) { return metal::name(x, y); }
MSL_UNARY(MSL_INTERNAL_1)
MSL_BINARY(MSL_INTERNAL_2)
METAL_FUNC float __metal_fma(float a, float b, float c) { return metal::fma(a, b, c); }
METAL_FUNC float __metal_fmax3(float a, float b, float c, int = 0) { return max3(a, b, c); }
METAL_FUNC float __metal_fmin3(float a, float b, float c, int = 0) { return min3(a, b, c); }
METAL_FUNC float __metal_fmedian3(float a, float b, float c, int = 0) { return max(min(a, b), min(max(a, b), c)); }
METAL_FUNC float __metal_ldexp(float x, int e, int = 0) { return ::ldexpf(x, e); }
METAL_FUNC ushort __metal_get_simdgroup_size(ushort) { return 32; }
int __metal_ilogb(float x, int = 0);
float __metal_nextafter(float x, float y);
float __metal_modf(float x, thread float* whole);
float __metal_frexp(float x, thread int* exponent, int = 0);
float __metal_sincos(float x, thread float& cosine, int = 0);
template <class T> T __metal_simd_xor(T v);

#define MSL_INTERNAL_SIMD(name) \
  template <class T> METAL_FUNC T __metal_simd_##name(T v, SITE) { return simd_##name(v, site); }
MSL_INTERNAL_SIMD(sum)
MSL_INTERNAL_SIMD(product)
MSL_INTERNAL_SIMD(max)
MSL_INTERNAL_SIMD(min)
MSL_INTERNAL_SIMD(prefix_inclusive_sum)
MSL_INTERNAL_SIMD(prefix_exclusive_sum)
MSL_INTERNAL_SIMD(prefix_inclusive_product)
MSL_INTERNAL_SIMD(prefix_exclusive_product)
#define MSL_INTERNAL_SHUFFLE(name) \
  template <class T> METAL_FUNC T __metal_simd_##name(T v, ushort lane, SITE) { return simd_##name(v, lane, site); }
MSL_INTERNAL_SHUFFLE(broadcast)
MSL_INTERNAL_SHUFFLE(shuffle)
MSL_INTERNAL_SHUFFLE(shuffle_xor)
MSL_INTERNAL_SHUFFLE(shuffle_up)
MSL_INTERNAL_SHUFFLE(shuffle_down)
MSL_INTERNAL_SHUFFLE(shuffle_rotate_up)
MSL_INTERNAL_SHUFFLE(shuffle_rotate_down)
#define MSL_INTERNAL_FILL(name) \
  template <class T> METAL_FUNC T __metal_simd_##name(T v, T filling, ushort delta, ushort modulo, SITE) { \
    return simd_##name(v, filling, delta, modulo, site); \
  }
MSL_INTERNAL_FILL(shuffle_and_fill_up)
MSL_INTERNAL_FILL(shuffle_and_fill_down)

}  // namespace metal
