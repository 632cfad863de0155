// Vectors: float4 and its like, packed vectors, construction from parts, as_type.
#pragma once
namespace metal {

template <class T, int N> using vec = T __attribute__((ext_vector_type(N)));

// What a type is made of: E and n, which is 1 for everything that is not a vector.
template <class T> struct msl_parts {
  using E = T;
  static constexpr constant int n = 1;
};
#define MSL_VECTOR(T, N) \
  typedef T T##N __attribute__((ext_vector_type(N))); \
  template <> struct msl_parts<T##N> { \
    using E = T; \
    static constexpr constant int n = N; \
  };
#define MSL_VECTORS(T) MSL_VECTOR(T, 2) MSL_VECTOR(T, 3) MSL_VECTOR(T, 4)
MSL_VECTORS(char)
MSL_VECTORS(uchar)
MSL_VECTORS(short)
MSL_VECTORS(ushort)
MSL_VECTORS(int)
MSL_VECTORS(uint)
MSL_VECTORS(long)
MSL_VECTORS(ulong)
MSL_VECTORS(half)
MSL_VECTORS(bfloat)
MSL_VECTORS(float)
// OpenCL has no vectors of bool: their elements are 0 or -1, as comparisons give them.
typedef int bool2 __attribute__((ext_vector_type(2)));
typedef int bool3 __attribute__((ext_vector_type(3)));
typedef int bool4 __attribute__((ext_vector_type(4)));

// A conversion that was asked for. clang has none between half and bfloat, so those go by way of float.
template <class T, class A> METAL_FUNC constexpr T msl_convert(A a) {
  if constexpr (is_same<T, half>::value && is_same<A, bfloat>::value) {
    return (half)(float)a;
  } else if constexpr (is_same<T, bfloat>::value && is_same<A, half>::value) {
    return (bfloat)(float)a;
  } else {
    return static_cast<T>(a);
  }
}
template <class V, class P> METAL_FUNC constexpr void msl_append(thread V& v, thread int& at, P part) {
  using E = typename msl_parts<V>::E;
  if constexpr (msl_parts<P>::n == 1) {
    v[at++] = msl_convert<E>(part);
  } else {
    for (int i = 0; i < msl_parts<P>::n; i++) v[at++] = msl_convert<E>((typename msl_parts<P>::E)part[i]);
  }
}

// V(...). A vector is built from nothing, from a scalar for all, from a vector to convert, or from parts.
template <class V> METAL_FUNC constexpr V msl_make() { return V{}; }
template <class V, class A> METAL_FUNC constexpr V msl_make(A a) {
  using E = typename msl_parts<V>::E;
  if constexpr (is_same<V, A>::value) {
    return a;
  } else if constexpr (msl_parts<V>::n == 1) {
    return msl_convert<V>(a);
  } else if constexpr (msl_parts<A>::n == 1) {
    return (V)msl_convert<E>(a);
  } else {
    static_assert(msl_parts<A>::n == msl_parts<V>::n, "vector constructor: wrong number of components");
    V v;
    for (int i = 0; i < msl_parts<V>::n; i++) v[i] = msl_convert<E>((typename msl_parts<A>::E)a[i]);
    return v;
  }
}
template <class V, class A, class B, class... R> METAL_FUNC constexpr V msl_make(A a, B b, R... rest) {
  if constexpr (msl_parts<V>::n == 1) {
    return V(a, b, rest...);  // a structure
  } else if constexpr (msl_parts<A>::n == 1 && msl_parts<B>::n == 1 && ((msl_parts<R>::n == 1) && ...)) {
    using E = typename msl_parts<V>::E;
    static_assert(2 + sizeof...(rest) == msl_parts<V>::n, "vector constructor: wrong number of components");
    return V{msl_convert<E>(a), msl_convert<E>(b), msl_convert<E>(rest)...};
  } else {
    static_assert(msl_parts<A>::n + msl_parts<B>::n + (msl_parts<R>::n + ... + 0) == msl_parts<V>::n,
                  "vector constructor: wrong number of components");
    V v;
    int at = 0;
    msl_append(v, at, a);
    msl_append(v, at, b);
    (msl_append(v, at, rest), ...);
    return v;
  }
}

// Vectors that are aligned like their elements. They are loaded, converted and stored; arithmetic needs a conversion.
template <class T, int N> struct packed_vec;
#define MSL_PACKED_IN(space, T, N) \
  operator vec<T, N>() const space { \
    vec<T, N> v; \
    for (int i = 0; i < N; i++) v[i] = values[i]; \
    return v; \
  } \
  T operator[](int i) const space { return values[i]; }
#define MSL_PACKED_ASSIGN(space, T, N) \
  void operator=(vec<T, N> v) space { \
    for (int i = 0; i < N; i++) values[i] = v[i]; \
  }
#define MSL_PACKED(T, N) \
  template <> struct packed_vec<T, N> { \
    T values[N]; \
    packed_vec() = default; \
    packed_vec(vec<T, N> v) { \
      for (int i = 0; i < N; i++) values[i] = v[i]; \
    } \
    MSL_PACKED_IN(device, T, N) \
    MSL_PACKED_IN(threadgroup, T, N) \
    MSL_PACKED_IN(constant, T, N) \
    MSL_PACKED_IN(thread, T, N) \
    MSL_PACKED_ASSIGN(device, T, N) \
    MSL_PACKED_ASSIGN(threadgroup, T, N) \
    MSL_PACKED_ASSIGN(thread, T, N) \
  }; \
  typedef packed_vec<T, N> packed_##T##N;
#define MSL_ALL_PACKED(T) MSL_PACKED(T, 2) MSL_PACKED(T, 3) MSL_PACKED(T, 4)
MSL_ALL_PACKED(char)
MSL_ALL_PACKED(uchar)
MSL_ALL_PACKED(short)
MSL_ALL_PACKED(ushort)
MSL_ALL_PACKED(int)
MSL_ALL_PACKED(uint)
MSL_ALL_PACKED(half)
MSL_ALL_PACKED(bfloat)
MSL_ALL_PACKED(float)

template <class T, class U> METAL_FUNC constexpr T as_type(U value) {
  static_assert(sizeof(T) == sizeof(U), "as_type: the sizes differ");
  return __builtin_bit_cast(T, value);
}

}  // namespace metal
