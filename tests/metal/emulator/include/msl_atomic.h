// <metal_atomic>. A lane is never interrupted, so plain code is atomic; the checker is told what each access is.
#pragma once
namespace metal {

enum msl_memory_order { memory_order_relaxed };

template <class T> struct atomic {
  static_assert(is_same<T, int>::value || is_same<T, uint>::value || is_same<T, bool>::value ||
                    is_same<T, float>::value || is_same<T, ulong>::value,
                "atomic<T>: T must be int, uint, bool, float or ulong");
  T value;
};
template <class T> using _atomic = atomic<T>;
typedef atomic<int> atomic_int;
typedef atomic<uint> atomic_uint;
typedef atomic<float> atomic_float;
typedef atomic<bool> atomic_bool;
typedef atomic<ulong> atomic_ulong;

// Not inlined, so that the checker learns where the call is.
#define MSL_UNCHECKED __attribute__((no_sanitize("thread"), noinline)) inline
#define MSL_CHECK(kind) ::msl_check_atomic((ulong)object, sizeof(T), kind, (ulong)__builtin_return_address(0))
#define MSL_MODIFY_IN(space, name, expression) \
  template <class T> \
  MSL_UNCHECKED T atomic_##name##_explicit(volatile space atomic<T>* object, type_identity_t<T> operand, \
                                           memory_order) { \
    MSL_CHECK(MSL_MODIFY); \
    const T old = object->value; \
    object->value = expression; \
    return old; \
  }
#define MSL_ATOMICS(space) \
  MSL_MODIFY_IN(space, exchange, operand) \
  MSL_MODIFY_IN(space, fetch_add, old + operand) \
  MSL_MODIFY_IN(space, fetch_sub, old - operand) \
  MSL_MODIFY_IN(space, fetch_min, (old < operand ? old : operand)) \
  MSL_MODIFY_IN(space, fetch_max, (old > operand ? old : operand)) \
  MSL_MODIFY_IN(space, fetch_and, old & operand) \
  MSL_MODIFY_IN(space, fetch_or, old | operand) \
  MSL_MODIFY_IN(space, fetch_xor, old ^ operand) \
  template <class T> \
  MSL_UNCHECKED void atomic_store_explicit(volatile space atomic<T>* object, type_identity_t<T> desired, \
                                           memory_order) { \
    MSL_CHECK(MSL_STORE); \
    object->value = desired; \
  } \
  template <class T> MSL_UNCHECKED T atomic_load_explicit(const volatile space atomic<T>* object, memory_order) { \
    MSL_CHECK(MSL_LOAD); \
    return object->value; \
  } \
  template <class T> \
  MSL_UNCHECKED bool atomic_compare_exchange_weak_explicit(volatile space atomic<T>* object, thread T* expected, \
                                                           type_identity_t<T> desired, memory_order, memory_order) { \
    MSL_CHECK(MSL_MODIFY); \
    const T old = object->value; \
    if (__builtin_memcmp((const void*)&old, (const void*)expected, sizeof(T)) == 0) { \
      object->value = desired; \
      return true; \
    } \
    *expected = old; \
    return false; \
  }
MSL_ATOMICS(device)
MSL_ATOMICS(threadgroup)

}  // namespace metal
