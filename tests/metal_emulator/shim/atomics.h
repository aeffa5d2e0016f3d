// Atomics: threads give way only at barriers and simd operations, so plain reads and writes are atomic here.
#pragma once

namespace metal {

template <class T>
struct atomic {
  T v;
};
typedef atomic<int> atomic_int;
typedef atomic<uint> atomic_uint;
typedef atomic<float> atomic_float;
typedef atomic<bool> atomic_bool;

#define MSL_ATOMIC(name, result)                                       \
  template <class T, class U>                                          \
  MSL_HOST T name(atomic<T>* p, U operand, memory_order) {             \
    msl_atomic_access(p, sizeof(T), 1);                                \
    T a = p->v, b = T(operand);                                        \
    p->v = T(result);                                                  \
    return a;                                                          \
  }
MSL_ATOMIC(atomic_fetch_add_explicit, a + b)
MSL_ATOMIC(atomic_fetch_sub_explicit, a - b)
MSL_ATOMIC(atomic_fetch_max_explicit, metal::max(a, b))
MSL_ATOMIC(atomic_fetch_min_explicit, metal::min(a, b))
MSL_ATOMIC(atomic_fetch_or_explicit, a | b)
MSL_ATOMIC(atomic_fetch_and_explicit, a & b)
MSL_ATOMIC(atomic_exchange_explicit, b)
#undef MSL_ATOMIC

template <class T>
MSL_HOST T atomic_load_explicit(const atomic<T>* p, memory_order) {
  msl_atomic_access((void*)p, sizeof(T), 0);
  return p->v;
}
template <class T, class U>
MSL_HOST void atomic_store_explicit(atomic<T>* p, U value, memory_order) {
  msl_atomic_access(p, sizeof(T), 1);
  p->v = T(value);
}
template <class T, class U>
MSL_HOST bool atomic_compare_exchange_weak_explicit(atomic<T>* p, T* expected, U desired, memory_order, memory_order) {
  msl_atomic_access(p, sizeof(T), 1);
  bool same = __builtin_memcmp(&p->v, expected, sizeof(T)) == 0;
  if (same) p->v = T(desired);
  else *expected = p->v;
  return same;
}

}  // namespace metal
