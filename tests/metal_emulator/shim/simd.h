// Barriers, simdgroup functions and threadgroup memory, over the runtime's scheduler.
//
// An operation is known by a number and by the line of its call: lanes that meet in one must agree on both.
#pragma once

#define MSL_LINE int line = __builtin_LINE()

namespace metal {

MSL_FN void threadgroup_barrier(mem_flags flags, MSL_LINE) { msl_barrier((unsigned)flags, line); }
MSL_FN void simdgroup_barrier(mem_flags flags, MSL_LINE) { msl_simd_barrier((unsigned)flags, line); }

namespace emulated {

enum { SUM, PRODUCT, MAX, MIN, AND, OR, XOR, BROADCAST, BROADCAST_FIRST, SHUFFLE, SHUFFLE_XOR, SHUFFLE_DOWN, SHUFFLE_UP,
       FILL_UP, FILL_UP_FROM, FILL_DOWN, FILL_DOWN_FROM, PREFIX_SUM, PREFIX_SUM_EXCLUSIVE, PREFIX_PRODUCT,
       PREFIX_PRODUCT_EXCLUSIVE, BALLOT, ANY, ALL, FIRST, MATRIX_A, MATRIX_B };

template <class T>
MSL_HOST T lane_value(const msl_exchange* exchange, int lane) {
  T value;
  __builtin_memcpy(&value, exchange->value[lane], sizeof(T));
  return value;
}

// In the order of a xor butterfly (Apple does not say which it takes). The lanes of a partial simdgroup are its first.
template <class T, class F>
MSL_HOST T reduce(T v, F f, int operation, int line) {
  msl_exchange* exchange = msl_simd_exchange(&v, sizeof v, operation, line);
  if (!exchange->has_result) {
    T t[32];
    for (int lane = 0; lane < 32; lane++) t[lane] = lane_value<T>(exchange, lane);
    for (int offset = 1; offset < 32; offset *= 2)
      for (int lane = 0; lane < 32; lane += 2 * offset)
        if (exchange->active >> (lane + offset) & 1) t[lane] = f(t[lane], t[lane + offset]);
    __builtin_memcpy(exchange->result, &t[0], sizeof(T));
    exchange->has_result = 1;
  }
  T result;
  __builtin_memcpy(&result, exchange->result, sizeof(T));
  return result;
}

// The value of another lane; of the own one where `source` is KEEP.
constexpr int KEEP = -1;
template <class T>
MSL_HOST T shuffle(T v, int source, int operation, int line) {
  msl_exchange* exchange = msl_simd_exchange(&v, sizeof v, operation, line);
  if (source == KEEP) return v;
  if (source > 31 || !(exchange->active >> source & 1))
    msl_fail(line, 0, "undefined: simd shuffle from lane %d, which takes no part", source);
  return lane_value<T>(exchange, source);
}

template <class T, class F>
MSL_HOST T scan(T v, F f, T identity, bool exclusive, int operation, int line) {
  msl_exchange* exchange = msl_simd_exchange(&v, sizeof v, operation, line);
  int end = msl_lane() + (exclusive ? 0 : 1);
  T total = identity;
  for (int lane = 0; lane < end; lane++)
    if (exchange->active >> lane & 1) total = f(total, lane_value<T>(exchange, lane));
  return total;
}

MSL_HOST inline uint32_t ballot(bool b, int operation, int line) {
  unsigned char value = b;
  msl_exchange* exchange = msl_simd_exchange(&value, 1, operation, line);
  uint32_t votes = 0;
  for (int lane = 0; lane < 32; lane++)
    if ((exchange->active >> lane & 1) && exchange->value[lane][0]) votes |= 1u << lane;
  return votes;
}

MSL_HOST inline int first_active(int line) {
  unsigned char value = 0;
  return __builtin_ctz(msl_simd_exchange(&value, 1, FIRST, line)->active);
}

// The element type of a threadgroup variable, for checks: a vector counts by its components.
template <class T>
struct element {
  static constexpr unsigned nbytes = sizeof(T) > 8 ? 4 : sizeof(T);
};
template <class T, size_t N>
struct element<T[N]> : element<T> {};
template <class T, int N>
struct element<vec<T, N>> : element<T> {};

}  // namespace emulated

// compiler.py turns  threadgroup T name[n];  into  MSL_THREADGROUP(site, name, typedef T msl_type_name [n]);
#define MSL_THREADGROUP(site, name, ...)                                                         \
  __VA_ARGS__;                                                                                   \
  msl_type_##name& name = *static_cast<msl_type_##name*>(msl_threadgroup_memory(                 \
      site, sizeof(msl_type_##name), metal::emulated::element<msl_type_##name>::nbytes, #name))

#define MSL_REDUCTION(name, operation, result)                                                   \
  template <class T>                                                                             \
  MSL_FN T name(T v, MSL_LINE) {                                                                 \
    return emulated::reduce(v, [](T a, T b) -> T { return T(result); }, emulated::operation, line); \
  }
MSL_REDUCTION(simd_sum, SUM, a + b)
MSL_REDUCTION(simd_product, PRODUCT, a * b)
MSL_REDUCTION(simd_max, MAX, metal::max(a, b))
MSL_REDUCTION(simd_min, MIN, metal::min(a, b))
MSL_REDUCTION(simd_and, AND, a & b)
MSL_REDUCTION(simd_or, OR, a | b)
MSL_REDUCTION(simd_xor, XOR, a ^ b)
#undef MSL_REDUCTION

#define MSL_SCAN(name, identity, operation, result)                                              \
  template <class T>                                                                             \
  MSL_FN T simd_prefix_inclusive_##name(T v, MSL_LINE) {                                         \
    return emulated::scan(v, [](T a, T b) -> T { return T(result); }, T(identity), false, emulated::operation, line); \
  }                                                                                              \
  template <class T>                                                                             \
  MSL_FN T simd_prefix_exclusive_##name(T v, MSL_LINE) {                                         \
    return emulated::scan(v, [](T a, T b) -> T { return T(result); }, T(identity), true, emulated::operation##_EXCLUSIVE, line); \
  }
MSL_SCAN(sum, 0, PREFIX_SUM, a + b)
MSL_SCAN(product, 1, PREFIX_PRODUCT, a * b)
#undef MSL_SCAN

template <class T>
MSL_FN T simd_broadcast(T v, ushort lane, MSL_LINE) {
  return emulated::shuffle(v, lane, emulated::BROADCAST, line);
}
template <class T>
MSL_FN T simd_broadcast_first(T v, MSL_LINE) {
  return emulated::shuffle(v, emulated::first_active(line), emulated::BROADCAST_FIRST, line);
}
template <class T>
MSL_FN T simd_shuffle(T v, ushort lane, MSL_LINE) {
  return emulated::shuffle(v, lane, emulated::SHUFFLE, line);
}
template <class T>
MSL_FN T simd_shuffle_xor(T v, ushort mask, MSL_LINE) {
  return emulated::shuffle(v, msl_lane() ^ mask, emulated::SHUFFLE_XOR, line);
}
template <class T>
MSL_FN T simd_shuffle_down(T v, ushort delta, MSL_LINE) {
  int source = msl_lane() + delta;
  return emulated::shuffle(v, source > 31 ? emulated::KEEP : source, emulated::SHUFFLE_DOWN, line);
}
template <class T>
MSL_FN T simd_shuffle_up(T v, ushort delta, MSL_LINE) {
  int source = (int)msl_lane() - delta;
  return emulated::shuffle(v, source < 0 ? emulated::KEEP : source, emulated::SHUFFLE_UP, line);
}
template <class T>
MSL_FN T simd_shuffle_and_fill_up(T v, T fill, ushort delta, MSL_LINE) {
  int source = (int)msl_lane() - delta;
  T inside = emulated::shuffle(v, source < 0 ? emulated::KEEP : source, emulated::FILL_UP, line);
  T outside = emulated::shuffle(fill, source < 0 ? 32 + source : emulated::KEEP, emulated::FILL_UP_FROM, line);
  return source < 0 ? outside : inside;
}
template <class T>
MSL_FN T simd_shuffle_and_fill_down(T v, T fill, ushort delta, MSL_LINE) {
  int source = msl_lane() + delta;
  T inside = emulated::shuffle(v, source > 31 ? emulated::KEEP : source, emulated::FILL_DOWN, line);
  T outside = emulated::shuffle(fill, source > 31 ? source - 32 : emulated::KEEP, emulated::FILL_DOWN_FROM, line);
  return source > 31 ? outside : inside;
}

struct simd_vote {
  typedef uint64_t vote_t;
  uint64_t v;
  explicit operator vote_t() const { return v; }
  bool all() const { return v == 0xffffffffu; }
  bool any() const { return v != 0; }
};
MSL_FN simd_vote simd_ballot(bool b, MSL_LINE) { return simd_vote{emulated::ballot(b, emulated::BALLOT, line)}; }
MSL_FN bool simd_any(bool b, MSL_LINE) { return emulated::ballot(b, emulated::ANY, line) != 0; }
MSL_FN bool simd_all(bool b, MSL_LINE) { return emulated::ballot(!b, emulated::ALL, line) == 0; }
MSL_FN bool simd_is_first(MSL_LINE) { return emulated::first_active(line) == (int)msl_lane(); }

}  // namespace metal
