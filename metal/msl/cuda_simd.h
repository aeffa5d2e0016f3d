// Metal Shading Language on CUDA, second part: barriers, simdgroup functions (a simdgroup is a warp), atomics.
// Comes after math.h. Every simd function needs all 32 lanes; simdgroup_matrix is not supported here.
#pragma once

namespace metal {

MSL_FN void threadgroup_barrier(mem_flags) { __syncthreads(); }
MSL_FN void simdgroup_barrier(mem_flags) { __syncwarp(); }

namespace warp {
constexpr unsigned ALL = 0xffffffffu;

MSL_FN uint lane() {
  uint lane;
  asm("mov.u32 %0, %%laneid;" : "=r"(lane));
  return lane;
}
// Applies a function of 32-bit words to the words of any trivially copyable value.
template <class T, class F>
MSL_FN T by_words(T v, F f) {
  constexpr int n = (sizeof(T) + 3) / 4;
  unsigned words[n] = {};
  memcpy(words, &v, sizeof(T));
  for (int i = 0; i < n; i++) words[i] = f(words[i]);
  T r;
  memcpy(&r, words, sizeof(T));
  return r;
}
template <class T>
MSL_FN T shuffle_xor(T v, int mask) {
  return by_words(v, [=](unsigned u) { return __shfl_xor_sync(ALL, u, mask); });
}
template <class T, class F>
MSL_FN T reduce(T v, F f) {
  for (int offset = 1; offset < 32; offset *= 2) v = f(v, shuffle_xor(v, offset));
  return v;
}
}  // namespace warp

#define MSL_REDUCTION(name, result)                                 \
  template <class T>                                                \
  MSL_FN T name(T v) {                                              \
    return warp::reduce(v, [](T a, T b) -> T { return T(result); }); \
  }
MSL_REDUCTION(simd_sum, a + b)
MSL_REDUCTION(simd_product, a * b)
MSL_REDUCTION(simd_max, metal::max(a, b))
MSL_REDUCTION(simd_min, metal::min(a, b))
MSL_REDUCTION(simd_and, a & b)
MSL_REDUCTION(simd_or, a | b)
MSL_REDUCTION(simd_xor, a ^ b)
#undef MSL_REDUCTION

template <class T>
MSL_FN T simd_shuffle(T v, ushort lane) {
  return warp::by_words(v, [=](unsigned u) { return __shfl_sync(warp::ALL, u, lane); });
}
template <class T>
MSL_FN T simd_shuffle_xor(T v, ushort mask) {
  return warp::shuffle_xor(v, mask);
}
template <class T>
MSL_FN T simd_shuffle_down(T v, ushort delta) {
  return warp::by_words(v, [=](unsigned u) { return __shfl_down_sync(warp::ALL, u, delta); });
}
template <class T>
MSL_FN T simd_shuffle_up(T v, ushort delta) {
  return warp::by_words(v, [=](unsigned u) { return __shfl_up_sync(warp::ALL, u, delta); });
}
template <class T>
MSL_FN T simd_broadcast(T v, ushort lane) {
  return simd_shuffle(v, lane);
}
template <class T>
MSL_FN T simd_broadcast_first(T v) {
  return simd_shuffle(v, 0);
}

namespace warp {
template <class T, class F>
MSL_FN T scan(T v, F f) {
  for (int offset = 1; offset < 32; offset *= 2) {
    T below = simd_shuffle_up(v, offset);
    if (lane() >= offset) v = f(below, v);
  }
  return v;
}
}  // namespace warp
#define MSL_SCAN(name, identity, result)                                                 \
  template <class T>                                                                     \
  MSL_FN T simd_prefix_inclusive_##name(T v) {                                           \
    return warp::scan(v, [](T a, T b) -> T { return T(result); });                       \
  }                                                                                      \
  template <class T>                                                                     \
  MSL_FN T simd_prefix_exclusive_##name(T v) {                                           \
    T below = simd_shuffle_up(simd_prefix_inclusive_##name(v), 1);                       \
    return warp::lane() ? below : T(identity);                                           \
  }
MSL_SCAN(sum, 0, a + b)
MSL_SCAN(product, 1, a * b)
#undef MSL_SCAN

struct simd_vote {
  typedef unsigned long vote_t;
  unsigned long v;
  MSL_FN explicit operator vote_t() const { return v; }
  MSL_FN bool all() const { return v == warp::ALL; }
  MSL_FN bool any() const { return v != 0; }
};
MSL_FN simd_vote simd_ballot(bool b) { return simd_vote{__ballot_sync(warp::ALL, b)}; }
MSL_FN bool simd_any(bool b) { return __any_sync(warp::ALL, b); }
MSL_FN bool simd_all(bool b) { return __all_sync(warp::ALL, b); }
MSL_FN bool simd_is_first() { return warp::lane() == 0; }

template <class T>
struct atomic {
  T v;
};
typedef atomic<int> atomic_int;
typedef atomic<uint> atomic_uint;
typedef atomic<float> atomic_float;
#define MSL_ATOMIC(name, function)                      \
  template <class T, class U>                           \
  MSL_FN T name(atomic<T>* p, U u, memory_order) {      \
    return function(&p->v, T(u));                       \
  }
MSL_ATOMIC(atomic_fetch_add_explicit, ::atomicAdd)
MSL_ATOMIC(atomic_fetch_max_explicit, ::atomicMax)
MSL_ATOMIC(atomic_fetch_min_explicit, ::atomicMin)
MSL_ATOMIC(atomic_fetch_or_explicit, ::atomicOr)
MSL_ATOMIC(atomic_fetch_and_explicit, ::atomicAnd)
MSL_ATOMIC(atomic_exchange_explicit, ::atomicExch)
#undef MSL_ATOMIC
template <class T>
MSL_FN T atomic_load_explicit(const atomic<T>* p, memory_order) {
  return *(volatile const T*)&p->v;
}
template <class T, class U>
MSL_FN void atomic_store_explicit(atomic<T>* p, U u, memory_order) {
  *(volatile T*)&p->v = T(u);
}

}  // namespace metal

using namespace metal;
typedef half float16_t;
typedef bfloat bfloat16_t;
#define METAL_FUNC __device__ __forceinline__
#define device
#define constant
#define thread
#define threadgroup
