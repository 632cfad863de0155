// Metal Shading Language for clang's "C++ for OpenCL 2021": the part of it that compute kernels use.
//
// OpenCL's address spaces are Metal's under other names, and clang checks them in its type system. What Metal has and
// OpenCL has not is declared in these headers; SIMD-group functions and atomics end in the runtime.
#pragma once
#include "msl_base.h"
#include "msl_types.h"
#include "msl_vectors.h"
#include "msl_math.h"
#include "msl_simdgroup.h"
#include "msl_matrix.h"
#include "msl_atomic.h"
#include "msl_mlx.h"
using namespace metal;
