// <metal_math>, <metal_integer>, <metal_relational> and <metal_geometric>.
//
// Overload sets without templates: min(uint, int) is ambiguous, as it is for Apple's compiler. Half precision is
// computed in float and rounded once.
#pragma once
namespace metal {

#define MSL_WIDTHS(X, T) X(T) X(T##2) X(T##3) X(T##4)
#define MSL_FLOATS(X) MSL_WIDTHS(X, float) MSL_WIDTHS(X, half)
#define MSL_SIGNED(X) MSL_WIDTHS(X, char) MSL_WIDTHS(X, short) MSL_WIDTHS(X, int) MSL_WIDTHS(X, long)
#define MSL_UNSIGNED(X) MSL_WIDTHS(X, uchar) MSL_WIDTHS(X, ushort) MSL_WIDTHS(X, uint) MSL_WIDTHS(X, ulong)

template <class V, class F> METAL_FUNC V msl_map(V x, F f) {
  if constexpr (msl_parts<V>::n == 1) {
    return (V)f((float)x);
  } else {
    V result;
    for (int i = 0; i < msl_parts<V>::n; i++) result[i] = (typename msl_parts<V>::E)f((float)x[i]);
    return result;
  }
}
template <class V, class F> METAL_FUNC V msl_map(V x, V y, F f) {
  if constexpr (msl_parts<V>::n == 1) {
    return (V)f((float)x, (float)y);
  } else {
    V result;
    for (int i = 0; i < msl_parts<V>::n; i++) result[i] = (typename msl_parts<V>::E)f((float)x[i], (float)y[i]);
    return result;
  }
}

// X(name, its value for a float x)
#define MSL_UNARY(X) \
  X(exp, ::expf(x)) \
  X(exp2, __builtin_elementwise_exp2(x)) \
  X(exp10, ::exp10f(x)) \
  X(log, __builtin_elementwise_log(x)) \
  X(log2, __builtin_elementwise_log2(x)) \
  X(log10, __builtin_elementwise_log10(x)) \
  X(sqrt, __builtin_elementwise_sqrt(x)) \
  X(rsqrt, 1.0f / __builtin_elementwise_sqrt(x)) \
  X(sin, __builtin_elementwise_sin(x)) \
  X(cos, __builtin_elementwise_cos(x)) \
  X(tan, ::tanf(x)) \
  X(sinpi, __builtin_elementwise_sin(x * M_PI_F)) \
  X(cospi, __builtin_elementwise_cos(x * M_PI_F)) \
  X(tanpi, ::tanf(x * M_PI_F)) \
  X(asin, ::asinf(x)) \
  X(acos, ::acosf(x)) \
  X(atan, ::atanf(x)) \
  X(sinh, ::sinhf(x)) \
  X(cosh, ::coshf(x)) \
  X(tanh, ::tanhf(x)) \
  X(asinh, ::asinhf(x)) \
  X(acosh, ::acoshf(x)) \
  X(atanh, ::atanhf(x)) \
  X(floor, __builtin_elementwise_floor(x)) \
  X(ceil, __builtin_elementwise_ceil(x)) \
  X(trunc, __builtin_elementwise_trunc(x)) \
  X(round, ::roundf(x)) \
  X(rint, ::rintf(x)) \
  X(fract, x - __builtin_elementwise_floor(x)) \
  X(fabs, __builtin_elementwise_abs(x)) \
  X(sign, x > 0 ? 1.0f : x < 0 ? -1.0f : x) \
  X(saturate, x > 1.0f ? 1.0f : x > 0.0f ? x : 0.0f)
#define MSL_BINARY(X) \
  X(pow, ::powf(x, y)) \
  X(powr, ::powf(x, y)) \
  X(atan2, ::atan2f(x, y)) \
  X(fmod, ::fmodf(x, y)) \
  X(fmin, __builtin_fminf(x, y)) \
  X(fmax, __builtin_fmaxf(x, y)) \
  X(copysign, __builtin_copysignf(x, y)) \
  X(step, y < x ? 0.0f : 1.0f) \
  X(fdim, x > y ? x - y : 0.0f) \
  X(divide, x / y)

#define MSL_FUNCTOR_1(name, value) struct msl_##name { float operator()(float x) const { return value; } };
#define MSL_FUNCTOR_2(name, value) struct msl_##name { float operator()(float x, float y) const { return value; } };
MSL_UNARY(MSL_FUNCTOR_1)
MSL_BINARY(MSL_FUNCTOR_2)
#define MSL_OVERLOAD_1(name, T) METAL_FUNC T name(T x) { return msl_map(x, msl_##name{}); }
#define MSL_OVERLOAD_2(name, T) METAL_FUNC T name(T x, T y) { return msl_map(x, y, msl_##name{}); }
#define MSL_OVERLOADS(M, name) \
  M(name, float) M(name, float2) M(name, float3) M(name, float4) M(name, half) M(name, half2) M(name, half3) M(name, half4)
#define MSL_DEFINE_1(name, value) MSL_OVERLOADS(MSL_OVERLOAD_1, name)
#define MSL_DEFINE_2(name, value) MSL_OVERLOADS(MSL_OVERLOAD_2, name)
MSL_UNARY(MSL_DEFINE_1)
MSL_BINARY(MSL_DEFINE_2)

#define MSL_MIN_MAX(T) \
  METAL_FUNC T min(T x, T y) { return __builtin_elementwise_min(x, y); } \
  METAL_FUNC T max(T x, T y) { return __builtin_elementwise_max(x, y); } \
  METAL_FUNC T clamp(T x, T low, T high) { return min(max(x, low), high); } \
  METAL_FUNC T min3(T x, T y, T z) { return min(min(x, y), z); } \
  METAL_FUNC T max3(T x, T y, T z) { return max(max(x, y), z); }
MSL_FLOATS(MSL_MIN_MAX)
MSL_SIGNED(MSL_MIN_MAX)
MSL_UNSIGNED(MSL_MIN_MAX)

namespace fast {
MSL_UNARY(MSL_DEFINE_1)
MSL_BINARY(MSL_DEFINE_2)
MSL_FLOATS(MSL_MIN_MAX)
}  // namespace fast
namespace precise {
MSL_UNARY(MSL_DEFINE_1)
MSL_BINARY(MSL_DEFINE_2)
MSL_FLOATS(MSL_MIN_MAX)
}  // namespace precise

#define MSL_FLOAT_ONLY(T) \
  METAL_FUNC T abs(T x) { return __builtin_elementwise_abs(x); } \
  METAL_FUNC T fma(T x, T y, T z) { return __builtin_elementwise_fma(x, y, z); } \
  METAL_FUNC T mix(T x, T y, T a) { return x + (y - x) * a; }
#define MSL_SIGNED_ABS(T) METAL_FUNC T abs(T x) { return __builtin_elementwise_abs(x); }
#define MSL_UNSIGNED_ABS(T) METAL_FUNC T abs(T x) { return x; }
MSL_FLOATS(MSL_FLOAT_ONLY)
MSL_SIGNED(MSL_SIGNED_ABS)
MSL_UNSIGNED(MSL_UNSIGNED_ABS)

// ---- relational ----
#define MSL_SELECT(T) METAL_FUNC T select(T a, T b, bool c) { return c ? b : a; }
MSL_SELECT(float) MSL_SELECT(half) MSL_SELECT(bfloat) MSL_SELECT(bool)
MSL_SELECT(char) MSL_SELECT(short) MSL_SELECT(int) MSL_SELECT(long)
MSL_SELECT(uchar) MSL_SELECT(ushort) MSL_SELECT(uint) MSL_SELECT(ulong)
#define MSL_SELECT_VECTOR(T, N) METAL_FUNC T##N select(T##N a, T##N b, bool##N c) { return c ? b : a; }
MSL_SELECT_VECTOR(float, 2) MSL_SELECT_VECTOR(float, 3) MSL_SELECT_VECTOR(float, 4)
MSL_SELECT_VECTOR(int, 2) MSL_SELECT_VECTOR(int, 3) MSL_SELECT_VECTOR(int, 4)
MSL_SELECT_VECTOR(uint, 2) MSL_SELECT_VECTOR(uint, 3) MSL_SELECT_VECTOR(uint, 4)
template <class V> METAL_FUNC bool any(V v) {
  if constexpr (msl_parts<V>::n == 1) {
    return (bool)v;
  } else {
    bool result = false;
    for (int i = 0; i < msl_parts<V>::n; i++) result |= v[i] != 0;
    return result;
  }
}
template <class V> METAL_FUNC bool all(V v) {
  if constexpr (msl_parts<V>::n == 1) {
    return (bool)v;
  } else {
    bool result = true;
    for (int i = 0; i < msl_parts<V>::n; i++) result &= v[i] != 0;
    return result;
  }
}
METAL_FUNC bool isnan(float x) { return x != x; }
METAL_FUNC bool isnan(half x) { return x != x; }
METAL_FUNC bool isinf(float x) { return __builtin_fabsf(x) == INFINITY; }
METAL_FUNC bool isinf(half x) { return isinf((float)x); }
METAL_FUNC bool isfinite(float x) { return !isnan(x) && !isinf(x); }
METAL_FUNC bool isfinite(half x) { return isfinite((float)x); }
METAL_FUNC bool signbit(float x) { return as_type<uint>(x) >> 31; }
METAL_FUNC float ldexp(float x, int e) { return ::ldexpf(x, e); }

// ---- geometric ----
#define MSL_DOT(E, N) \
  METAL_FUNC E dot(E##N a, E##N b) { \
    E sum = 0; \
    for (int i = 0; i < N; i++) sum += a[i] * b[i]; \
    return sum; \
  }
MSL_DOT(float, 2) MSL_DOT(float, 3) MSL_DOT(float, 4)
MSL_DOT(half, 2) MSL_DOT(half, 3) MSL_DOT(half, 4)
METAL_FUNC float length(float2 a) { return sqrt(dot(a, a)); }
METAL_FUNC float length(float3 a) { return sqrt(dot(a, a)); }
METAL_FUNC float length(float4 a) { return sqrt(dot(a, a)); }

// ---- integer ----
METAL_FUNC uchar popcount(uchar x) { return __builtin_popcount(x); }
METAL_FUNC ushort popcount(ushort x) { return __builtin_popcount(x); }
METAL_FUNC int popcount(int x) { return __builtin_popcount(x); }
METAL_FUNC uint popcount(uint x) { return __builtin_popcount(x); }
METAL_FUNC ulong popcount(ulong x) { return __builtin_popcountl(x); }
METAL_FUNC uint clz(uint x) { return x ? __builtin_clz(x) : 32; }
METAL_FUNC int clz(int x) { return clz((uint)x); }
METAL_FUNC uint ctz(uint x) { return x ? __builtin_ctz(x) : 32; }
METAL_FUNC int ctz(int x) { return ctz((uint)x); }
METAL_FUNC uint reverse_bits(uint x) { return __builtin_bitreverse32(x); }
METAL_FUNC uint rotate(uint x, uint n) { return __builtin_rotateleft32(x, n); }
METAL_FUNC uint msl_low_bits(uint bits) { return bits >= 32 ? ~0u : (1u << bits) - 1u; }
METAL_FUNC uint extract_bits(uint x, uint offset, uint bits) { return bits ? (x >> offset) & msl_low_bits(bits) : 0; }
METAL_FUNC int extract_bits(int x, uint offset, uint bits) {
  return bits ? (x << (32 - offset - bits)) >> (32 - bits) : 0;
}
METAL_FUNC uint insert_bits(uint base, uint value, uint offset, uint bits) {
  const uint mask = bits ? msl_low_bits(bits) << offset : 0;
  return bits ? (base & ~mask) | ((value << offset) & mask) : base;
}
METAL_FUNC uint mulhi(uint a, uint b) { return (uint)(((ulong)a * b) >> 32); }
METAL_FUNC int mulhi(int a, int b) { return (int)(((long)a * b) >> 32); }
METAL_FUNC int mul24(int a, int b) { return a * b; }
METAL_FUNC uint mul24(uint a, uint b) { return a * b; }
METAL_FUNC int mad24(int a, int b, int c) { return a * b + c; }
METAL_FUNC uint mad24(uint a, uint b, uint c) { return a * b + c; }
METAL_FUNC uint absdiff(uint a, uint b) { return a > b ? a - b : b - a; }

}  // namespace metal
