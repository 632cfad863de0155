// <metal_compute> and <metal_simdgroup>: barriers, and what the 32 lanes of a SIMD-group do together.
//
// Every function begins with an exchange: each lane offers its value and waits for the others. `active` is the mask of
// the lanes that took part.
#pragma once
namespace metal {

enum class mem_flags {
  mem_none = 0,
  mem_device = MSL_DEVICE,
  mem_threadgroup = MSL_THREADGROUP,
  mem_texture = 4,
  mem_threadgroup_imageblock = 8
};
constexpr mem_flags operator|(mem_flags a, mem_flags b) { return mem_flags((int)a | (int)b); }
METAL_FUNC void threadgroup_barrier(mem_flags flags, SITE) { ::msl_threadgroup_barrier((int)flags, site); }
METAL_FUNC void simdgroup_barrier(mem_flags flags, SITE) { ::msl_simdgroup_barrier((int)flags, site); }

template <class T> METAL_FUNC uint msl_offer(T value, int site, int meeting) {
  static_assert(sizeof(T) <= 64, "wider than the slots of the runtime");
  return ::msl_exchange((const void*)&value, sizeof(T), site, meeting);
}
template <class T> METAL_FUNC T msl_offer_of(int lane) {
  T value;
  __builtin_memcpy((void*)&value, ::msl_offered(lane), sizeof(T));
  return value;
}
// What `lane` offered; reading a lane that took no part is a fault, and gives the caller's own value.
template <class T> METAL_FUNC T msl_read(uint active, int lane, T own) {
  if (lane < 0 || lane > 31 || !((active >> lane) & 1)) {
    ::msl_bad_source(lane);
    return own;
  }
  return msl_offer_of<T>(lane);
}

#define MSL_SIMD template <class T, class = enable_if_t<is_arithmetic<typename msl_parts<T>::E>::value>> METAL_FUNC T
MSL_SIMD simd_shuffle(T v, ushort lane, SITE) { return msl_read(msl_offer(v, site, MSL_SHUFFLE), lane, v); }
MSL_SIMD simd_shuffle_xor(T v, ushort mask, SITE) {
  return msl_read(msl_offer(v, site, MSL_SHUFFLE), ::msl_lane() ^ mask, v);
}
MSL_SIMD simd_shuffle_down(T v, ushort delta, SITE) {
  const uint active = msl_offer(v, site, MSL_SHUFFLE);
  const int from = ::msl_lane() + delta;
  return from > 31 ? v : msl_read(active, from, v);
}
MSL_SIMD simd_shuffle_up(T v, ushort delta, SITE) {
  const uint active = msl_offer(v, site, MSL_SHUFFLE);
  const int from = ::msl_lane() - delta;
  return from < 0 ? v : msl_read(active, from, v);
}
MSL_SIMD simd_shuffle_rotate_down(T v, ushort delta, SITE) {
  return msl_read(msl_offer(v, site, MSL_SHUFFLE), (::msl_lane() + delta) & 31, v);
}
MSL_SIMD simd_shuffle_rotate_up(T v, ushort delta, SITE) {
  return msl_read(msl_offer(v, site, MSL_SHUFFLE), (::msl_lane() - delta) & 31, v);
}
// Lanes form groups of `modulo`. What is shifted in at a group's end comes from the other end of `filling`.
template <class T> METAL_FUNC T msl_shuffle_and_fill(T v, T filling, int delta, int modulo, int site) {
  const int start = ::msl_lane() / modulo * modulo, from = ::msl_lane() % modulo + delta;
  uint active = msl_offer(filling, site, MSL_FILL);
  const bool outside = from < 0 || from >= modulo;
  if (outside) filling = msl_read(active, start + (from + modulo) % modulo, filling);
  active = msl_offer(v, site, MSL_SHUFFLE);
  return outside ? filling : msl_read(active, start + from, v);
}
MSL_SIMD simd_shuffle_and_fill_down(T v, T filling, ushort delta, ushort modulo = 32, SITE) {
  return msl_shuffle_and_fill(v, filling, delta, modulo, site);
}
MSL_SIMD simd_shuffle_and_fill_up(T v, T filling, ushort delta, ushort modulo = 32, SITE) {
  return msl_shuffle_and_fill(v, filling, -(int)delta, modulo, site);
}
MSL_SIMD simd_broadcast(T v, ushort lane, SITE) { return msl_read(msl_offer(v, site, MSL_BROADCAST), lane, v); }
MSL_SIMD simd_broadcast_first(T v, SITE) {
  return msl_offer_of<T>(__builtin_ctz(msl_offer(v, site, MSL_BROADCAST)));
}

// Combines `result` with `other` over the active lanes from `first` to `last`, in order.
#define MSL_FOLD(T, result, first, last, expression) \
  bool begun = false; \
  for (int i = first; i < last; i++) \
    if ((active >> i) & 1) { \
      const T other = msl_offer_of<T>(i); \
      result = begun ? expression : other; \
      begun = true; \
    }
#define MSL_SIMD_REDUCE(name, expression) \
  MSL_SIMD simd_##name(T v, SITE) { \
    const uint active = msl_offer(v, site, MSL_REDUCE); \
    MSL_FOLD(T, v, 0, 32, expression) \
    return v; \
  } \
  MSL_SIMD quad_##name(T v, SITE) { \
    const uint active = msl_offer(v, site, MSL_QUAD); \
    const int quad = ::msl_lane() & ~3; \
    MSL_FOLD(T, v, quad, quad + 4, expression) \
    return v; \
  }
MSL_SIMD_REDUCE(sum, v + other)
MSL_SIMD_REDUCE(product, v * other)
MSL_SIMD_REDUCE(max, (v > other ? v : other))
MSL_SIMD_REDUCE(min, (v < other ? v : other))
MSL_SIMD_REDUCE(and, v & other)
MSL_SIMD_REDUCE(or, v | other)
MSL_SIMD_REDUCE(xor, v ^ other)
#define MSL_SIMD_PREFIX(name, identity, expression, own) \
  MSL_SIMD simd_prefix_##name(T v, SITE) { \
    const uint active = msl_offer(v, site, MSL_PREFIX); \
    T result = (T)identity; \
    MSL_FOLD(T, result, 0, ::msl_lane() + own, expression) \
    return result; \
  }
MSL_SIMD_PREFIX(inclusive_sum, 0, result + other, 1)
MSL_SIMD_PREFIX(exclusive_sum, 0, result + other, 0)
MSL_SIMD_PREFIX(inclusive_product, 1, result * other, 1)
MSL_SIMD_PREFIX(exclusive_product, 1, result * other, 0)

struct simd_vote {
  ulong bits;
  explicit operator ulong() const { return bits; }
  bool all() const { return bits == 0xffffffffu; }
  bool any() const { return bits != 0; }
};
METAL_FUNC uint msl_ballot(bool predicate, int site) {
  const uint active = msl_offer((int)predicate, site, MSL_VOTE);
  uint bits = 0;
  for (int i = 0; i < 32; i++)
    if (((active >> i) & 1) && msl_offer_of<int>(i)) bits |= 1u << i;
  return bits;
}
METAL_FUNC simd_vote simd_ballot(bool predicate, SITE) { return simd_vote{msl_ballot(predicate, site)}; }
METAL_FUNC bool simd_any(bool predicate, SITE) { return msl_ballot(predicate, site) != 0; }
METAL_FUNC bool simd_all(bool predicate, SITE) { return msl_ballot(!predicate, site) == 0; }
METAL_FUNC simd_vote simd_active_threads_mask(SITE) { return simd_vote{msl_ballot(true, site)}; }
METAL_FUNC bool simd_is_first(SITE) { return __builtin_ctz(msl_ballot(true, site)) == ::msl_lane(); }

// Four lanes.
MSL_SIMD quad_broadcast(T v, ushort lane, SITE) {
  return msl_read(msl_offer(v, site, MSL_QUAD), (::msl_lane() & ~3) + (lane & 3), v);
}
MSL_SIMD quad_shuffle(T v, ushort lane, SITE) { return quad_broadcast(v, lane, site); }
MSL_SIMD quad_shuffle_xor(T v, ushort mask, SITE) {
  return msl_read(msl_offer(v, site, MSL_QUAD), ::msl_lane() ^ (mask & 3), v);
}
MSL_SIMD quad_shuffle_down(T v, ushort delta, SITE) {
  const uint active = msl_offer(v, site, MSL_QUAD);
  const int from = (::msl_lane() & 3) + delta;
  return from > 3 ? v : msl_read(active, (::msl_lane() & ~3) + from, v);
}
MSL_SIMD quad_shuffle_up(T v, ushort delta, SITE) {
  const uint active = msl_offer(v, site, MSL_QUAD);
  const int from = (::msl_lane() & 3) - delta;
  return from < 0 ? v : msl_read(active, (::msl_lane() & ~3) + from, v);
}

}  // namespace metal
