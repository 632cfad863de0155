// <metal_simdgroup_matrix>: 8x8 matrices whose elements are spread over a SIMD-group, two a lane.
//
// Apple does not document which lane holds which element. This is the layout that MLX's own kernels rely on.
#pragma once
namespace metal {

METAL_FUNC int msl_row(int lane) { return ((lane / 4) & 4) + (lane / 2) % 4; }
METAL_FUNC int msl_column(int lane) { return ((lane / 4) & 2) * 2 + (lane % 2) * 2; }  // and the next one

template <class T, int R, int C> struct simdgroup_matrix {
  static_assert(R == 8 && C == 8, "simdgroup_matrix is 8x8");
  vec<T, 2> elements;
  simdgroup_matrix() thread {}
  explicit simdgroup_matrix(T diagonal) thread {
    const int row = msl_row(::msl_lane()), column = msl_column(::msl_lane());
    elements[0] = row == column ? diagonal : T(0);
    elements[1] = row == column + 1 ? diagonal : T(0);
  }
  thread vec<T, 2>& thread_elements() thread { return elements; }
};
typedef simdgroup_matrix<float, 8, 8> simdgroup_float8x8;
typedef simdgroup_matrix<half, 8, 8> simdgroup_half8x8;
typedef simdgroup_matrix<bfloat, 8, 8> simdgroup_bfloat8x8;

template <class T, int R, int C> METAL_FUNC simdgroup_matrix<T, R, C> make_filled_simdgroup_matrix(T value) {
  simdgroup_matrix<T, R, C> result;
  result.elements[0] = result.elements[1] = value;
  return result;
}

#define MSL_MATRIX_MEMORY(space) \
  template <class T> \
  METAL_FUNC void simdgroup_load(thread simdgroup_matrix<T, 8, 8>& to, const space T* from, ulong elements_per_row = 8, \
                                 ulong2 origin = ulong2{0, 0}, bool transposed = false, SITE) { \
    msl_offer(0, site, MSL_MATRIX); \
    const ulong row = msl_row(::msl_lane()), column = msl_column(::msl_lane()); \
    for (int i = 0; i < 2; i++) { \
      const ulong y = origin.y + (transposed ? column + i : row), x = origin.x + (transposed ? row : column + i); \
      to.elements[i] = from[y * elements_per_row + x]; \
    } \
  } \
  template <class T> \
  METAL_FUNC void simdgroup_store(thread const simdgroup_matrix<T, 8, 8>& from, space T* to, \
                                  ulong elements_per_row = 8, ulong2 origin = ulong2{0, 0}, bool transposed = false, \
                                  SITE) { \
    msl_offer(0, site, MSL_MATRIX); \
    const ulong row = msl_row(::msl_lane()), column = msl_column(::msl_lane()); \
    for (int i = 0; i < 2; i++) { \
      const ulong y = origin.y + (transposed ? column + i : row), x = origin.x + (transposed ? row : column + i); \
      to[y * elements_per_row + x] = from.elements[i]; \
    } \
  }
MSL_MATRIX_MEMORY(device)
MSL_MATRIX_MEMORY(threadgroup)

// d = a b + c, summed in float.
template <class D, class A, class B, class C>
METAL_FUNC void simdgroup_multiply_accumulate(thread simdgroup_matrix<D, 8, 8>& d,
                                              thread const simdgroup_matrix<A, 8, 8>& a,
                                              thread const simdgroup_matrix<B, 8, 8>& b,
                                              thread const simdgroup_matrix<C, 8, 8>& c, SITE) {
  float4 own;
  own[0] = a.elements[0];
  own[1] = a.elements[1];
  own[2] = b.elements[0];
  own[3] = b.elements[1];
  float sum[2] = {(float)c.elements[0], (float)c.elements[1]};
  msl_offer(own, site, MSL_MATRIX);
  const int row = msl_row(::msl_lane()), column = msl_column(::msl_lane());
  float a_row[8], b_columns[2][8];
  for (int lane = 0; lane < 32; lane++) {
    const float4 other = msl_offer_of<float4>(lane);
    const int y = msl_row(lane), x = msl_column(lane);
    if (y == row) {
      a_row[x] = other[0];
      a_row[x + 1] = other[1];
    }
    if (x == column) {
      b_columns[0][y] = other[2];
      b_columns[1][y] = other[3];
    }
  }
  for (int i = 0; i < 2; i++) {
    for (int k = 0; k < 8; k++) sum[i] += a_row[k] * b_columns[i][k];
    d.elements[i] = (D)sum[i];
  }
}
template <class D, class A, class B>
METAL_FUNC void simdgroup_multiply(thread simdgroup_matrix<D, 8, 8>& d, thread const simdgroup_matrix<A, 8, 8>& a,
                                   thread const simdgroup_matrix<B, 8, 8>& b, SITE) {
  simdgroup_matrix<D, 8, 8> zero = make_filled_simdgroup_matrix<D, 8, 8>(D(0));
  simdgroup_multiply_accumulate(d, a, b, zero, site);
}

}  // namespace metal
