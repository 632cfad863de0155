// <metal_type_traits> and <metal_limits>.
#pragma once
namespace metal {

template <class T, T v> struct integral_constant {
  static constexpr constant T value = v;
  using type = integral_constant;
};
template <bool B> using bool_constant = integral_constant<bool, B>;
using true_type = bool_constant<true>;
using false_type = bool_constant<false>;

template <bool B, class T = void> struct enable_if {};
template <class T> struct enable_if<true, T> { using type = T; };
template <bool B, class T = void> using enable_if_t = typename enable_if<B, T>::type;
template <bool B, class T, class F> struct conditional { using type = T; };
template <class T, class F> struct conditional<false, T, F> { using type = F; };
template <bool B, class T, class F> using conditional_t = typename conditional<B, T, F>::type;

#define MSL_TRANSFORM(name, builtin) \
  template <class T> struct name { using type = builtin(T); }; \
  template <class T> using name##_t = builtin(T);
MSL_TRANSFORM(remove_cv, __remove_cv)
MSL_TRANSFORM(remove_const, __remove_const)
MSL_TRANSFORM(remove_reference, __remove_reference_t)
MSL_TRANSFORM(remove_pointer, __remove_pointer)
MSL_TRANSFORM(make_signed, __make_signed)
MSL_TRANSFORM(make_unsigned, __make_unsigned)
template <class T> struct type_identity { using type = T; };
template <class T> using type_identity_t = typename type_identity<T>::type;

template <class T> struct remove_addrspace { using type = T; };
template <class T> struct remove_addrspace<device T> { using type = T; };
template <class T> struct remove_addrspace<threadgroup T> { using type = T; };
template <class T> struct remove_addrspace<constant T> { using type = T; };
template <class T> struct remove_addrspace<thread T> { using type = T; };
template <class T> using remove_addrspace_t = typename remove_addrspace<T>::type;

template <class A, class B> struct is_same : false_type {};
template <class A> struct is_same<A, A> : true_type {};
template <class T> struct is_floating_point : bool_constant<__is_floating_point(T)> {};
template <> struct is_floating_point<half> : true_type {};
template <> struct is_floating_point<bfloat> : true_type {};
template <class T> struct is_integral : bool_constant<__is_integral(T)> {};
template <class T> struct is_signed : bool_constant<__is_signed(T)> {};
template <class T> struct is_unsigned : bool_constant<__is_unsigned(T)> {};
template <class T> struct is_arithmetic : bool_constant<is_integral<T>::value || is_floating_point<T>::value> {};
template <class T> struct is_pointer : bool_constant<__is_pointer(T)> {};
template <class T> struct is_void : is_same<T, void> {};
template <class T> struct is_enum : bool_constant<__is_enum(T)> {};
template <class A, class B> struct is_convertible : bool_constant<__is_convertible_to(A, B)> {};
#define MSL_TRAIT_V(name) template <class T> constexpr constant bool name##_v = name<T>::value;
MSL_TRAIT_V(is_floating_point)
MSL_TRAIT_V(is_integral)
MSL_TRAIT_V(is_signed)
MSL_TRAIT_V(is_unsigned)
MSL_TRAIT_V(is_arithmetic)
template <class A, class B> constexpr constant bool is_same_v = is_same<A, B>::value;
template <class A, class B> constexpr constant bool is_convertible_v = is_convertible<A, B>::value;

// metal_stdlib's own, which MLX's headers use.
template <class...> struct _disjunction : false_type {};
template <class A, class... R>
struct _disjunction<A, R...> : bool_constant<A::value || _disjunction<R...>::value> {};
template <class...> struct _conjunction : true_type {};
template <class A, class... R>
struct _conjunction<A, R...> : bool_constant<A::value && _conjunction<R...>::value> {};
template <class T> __remove_reference_t(T) && declval();

// *this, which for clang is generic in methods that name no address space: there, it is in thread memory.
template <class T> METAL_FUNC device T& msl_self(device T* object) { return *object; }
template <class T> METAL_FUNC threadgroup T& msl_self(threadgroup T* object) { return *object; }
template <class T> METAL_FUNC constant T& msl_self(constant T* object) { return *object; }
template <class T> METAL_FUNC thread T& msl_self(thread T* object) { return *object; }
#ifdef __opencl_c_generic_address_space
template <class T> METAL_FUNC thread T& msl_self(__generic T* object) { return *(thread T*)object; }
#endif

template <class T, size_t N> struct array {
  T values[N];
  constexpr T operator[](size_t i) const { return values[i]; }
};
// A value that is the same in all threads: a hint, without a meaning of its own.
template <class T> using uniform = T;
template <class T> METAL_FUNC T make_uniform(T value) { return value; }

template <class T> struct numeric_limits { static constexpr constant bool is_specialized = false; };
#define MSL_INTEGER_LIMITS(T, least, greatest, signed_) \
  template <> struct numeric_limits<T> { \
    static constexpr constant bool is_specialized = true, is_integer = true, is_signed = signed_; \
    static constexpr constant int digits = sizeof(T) * 8 - signed_; \
    static constexpr T max() { return greatest; } \
    static constexpr T min() { return least; } \
    static constexpr T lowest() { return least; } \
    static constexpr T infinity() { return 0; } \
  };
MSL_INTEGER_LIMITS(bool, false, true, 0)
MSL_INTEGER_LIMITS(char, -128, 127, 1)
MSL_INTEGER_LIMITS(signed char, -128, 127, 1)
MSL_INTEGER_LIMITS(short, -32768, 32767, 1)
MSL_INTEGER_LIMITS(int, INT_MIN, INT_MAX, 1)
MSL_INTEGER_LIMITS(long, -LONG_MAX - 1, LONG_MAX, 1)
MSL_INTEGER_LIMITS(uchar, 0, UCHAR_MAX, 0)
MSL_INTEGER_LIMITS(ushort, 0, USHRT_MAX, 0)
MSL_INTEGER_LIMITS(uint, 0, UINT_MAX, 0)
MSL_INTEGER_LIMITS(ulong, 0, ULONG_MAX, 0)
#define MSL_FLOAT_LIMITS(T, greatest, least, step, bits) \
  template <> struct numeric_limits<T> { \
    static constexpr constant bool is_specialized = true, is_integer = false, is_signed = true, has_infinity = true; \
    static constexpr constant int digits = bits; \
    static constexpr T max() { return (T)greatest; } \
    static constexpr T min() { return (T)least; } \
    static constexpr T lowest() { return (T)(-greatest); } \
    static constexpr T epsilon() { return (T)step; } \
    static constexpr T infinity() { return (T)INFINITY; } \
    static constexpr T quiet_NaN() { return (T)NAN; } \
  };
MSL_FLOAT_LIMITS(float, FLT_MAX, FLT_MIN, FLT_EPSILON, 24)
MSL_FLOAT_LIMITS(half, 65504.0f, 0x1p-14f, 0x1p-10f, 11)
MSL_FLOAT_LIMITS(bfloat, 0x1.fep127f, 0x1p-126f, 0x1p-7f, 8)

}  // namespace metal
