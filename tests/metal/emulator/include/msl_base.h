// Keywords, scalar types, constants, and the functions that the runtime provides.
#pragma once
#pragma OPENCL EXTENSION cl_khr_fp16 : enable
#pragma OPENCL EXTENSION __cl_clang_non_portable_kernel_param_types : enable
#pragma OPENCL EXTENSION __cl_clang_function_pointers : enable
#pragma clang diagnostic ignored "-Wunknown-attributes"
#pragma clang diagnostic ignored "-Wunused-function"

#define __METAL__ 1
#define __METAL_VERSION__ 310
#define METAL_FUNC inline __attribute__((__always_inline__))
#define METAL_INTERNAL METAL_FUNC
#define __METAL_MAYBE_FAST_MATH__ 0
#define __METAL_FAST_MATH__ 1
#define __METAL_PRECISE_MATH__ 0

#define device __global
#define threadgroup __local
#define constant __constant
#define thread __private
#define restrict __restrict

// Words of OpenCL that are ordinary names in Metal.
#define local msl_local
#define global msl_global
#define generic msl_generic
#define atomic_int msl_atomic_int
#define atomic_uint msl_atomic_uint
#define atomic_long msl_atomic_long
#define atomic_ulong msl_atomic_ulong
#define atomic_float msl_atomic_float
#define atomic_bool msl_atomic_bool
#define memory_order msl_memory_order

typedef unsigned char uchar;
typedef unsigned short ushort;
typedef unsigned int uint;
typedef unsigned long ulong;
typedef signed char int8_t;
typedef short int16_t;
typedef int int32_t;
typedef long int64_t;
typedef uchar uint8_t;
typedef ushort uint16_t;
typedef uint uint32_t;
typedef ulong uint64_t;
typedef __SIZE_TYPE__ size_t;
typedef __PTRDIFF_TYPE__ ptrdiff_t;
typedef __UINTPTR_TYPE__ uintptr_t;
typedef __INTPTR_TYPE__ intptr_t;
typedef __bf16 bfloat;

#define INFINITY (__builtin_inff())
#define NAN (__builtin_nanf(""))
#define HUGE_VALF INFINITY
#define MAXFLOAT 0x1.fffffep127f
#define FLT_MAX 0x1.fffffep127f
#define FLT_MIN 0x1p-126f
#define FLT_EPSILON 0x1p-23f
#define HALF_MAX ((half)65504.0f)
#define HALF_MIN ((half)0x1p-14f)
#define HALF_EPSILON ((half)0x1p-10f)
#define M_PI_F 3.14159265358979323846f
#define M_PI_H ((half)3.14159265358979323846f)
#define M_PI_2_F 1.57079632679489661923f
#define M_1_PI_F 0.31830988618379067154f
#define M_SQRT2_F 1.41421356237309504880f
#define M_SQRT1_2_F 0.70710678118654752440f
#define M_LN2_F 0.69314718055994530942f
#define M_LN10_F 2.30258509299404568402f
#define M_LOG2E_F 1.44269504088896340736f
#define M_E_F 2.71828182845904523536f
#define CHAR_BIT 8
#define UCHAR_MAX 255
#define SHRT_MAX 32767
#define USHRT_MAX 65535
#define INT_MAX 2147483647
#define INT_MIN (-2147483647 - 1)
#define UINT_MAX 0xffffffffu
#define LONG_MAX 0x7fffffffffffffffL
#define ULONG_MAX 0xffffffffffffffffUL

#include "abi.h"

// The place of a call in the source text, as its last, defaulted argument.
#define SITE int site = __builtin_LINE() * 4096 + __builtin_COLUMN()

// A call that the optimiser must not merge with another: its place is the place that a fault is reported for.
#define MSL_KEPT __attribute__((nomerge))

extern "C" {
msl_thread* msl_current(void);
int msl_lane(void);
MSL_KEPT uint msl_exchange(const void* value, int size, int site, int meeting);
const void* msl_offered(int lane);
MSL_KEPT void msl_bad_source(int lane);
MSL_KEPT void msl_simdgroup_barrier(int flags, int site);
MSL_KEPT void msl_threadgroup_barrier(int flags, int site);
MSL_KEPT void msl_check_atomic(ulong address, int size, int kind, ulong caller);

float expf(float);
float exp10f(float);
float powf(float, float);
float fmodf(float, float);
float tanf(float);
float asinf(float);
float acosf(float);
float atanf(float);
float atan2f(float, float);
float sinhf(float);
float coshf(float);
float tanhf(float);
float asinhf(float);
float acoshf(float);
float atanhf(float);
float ldexpf(float, int);
float roundf(float);
float rintf(float);
}
