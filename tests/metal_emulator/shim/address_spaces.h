// Metal for clang's "C++ for OpenCL" front end, which has real address spaces. Types are checked, nothing runs: functions
// are only declared, and bfloat is a built-in type that stands in for Apple's.
#pragma once
#pragma OPENCL EXTENSION cl_khr_fp16 : enable
#pragma OPENCL EXTENSION cl_khr_fp64 : enable

#define device __global
#define constant __constant
#define threadgroup __local
#define thread __private
#define METAL_FUNC inline
#define __METAL_VERSION__ 310
#define __METAL__ 1
#define INFINITY __builtin_huge_valf()
#define NAN __builtin_nanf("")
#define M_PI_F 3.14159265f
#define M_LN2_F 0.6931471f
#define M_LN10_F 2.3025850f
#define M_LOG2E_F 1.4426950f

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
typedef ulong size_t;
typedef long ptrdiff_t;
typedef ulong uintptr_t;
typedef double bfloat;

#define VECTORS(T)                                    \
  typedef T T##2 __attribute__((ext_vector_type(2))); \
  typedef T T##3 __attribute__((ext_vector_type(3))); \
  typedef T T##4 __attribute__((ext_vector_type(4)));
VECTORS(float) VECTORS(half) VECTORS(char) VECTORS(short) VECTORS(int) VECTORS(long)
VECTORS(uchar) VECTORS(ushort) VECTORS(uint) VECTORS(ulong)
#undef VECTORS

namespace metal {

template <class T, int N>
using vec = T __attribute__((ext_vector_type(N)));

// ---- traits

template <class T, T v>
struct integral_constant {
  static constexpr __constant T value = v;
  typedef integral_constant type;
};
template <bool b>
using bool_constant = integral_constant<bool, b>;
typedef bool_constant<true> true_type;
typedef bool_constant<false> false_type;
template <class A, class B>
struct is_same : bool_constant<__is_same(A, B)> {};
template <class A, class B>
static constexpr __constant bool is_same_v = __is_same(A, B);
template <class A, class B>
static constexpr __constant bool is_convertible_v = __is_convertible(A, B);
template <bool b, class T = void>
struct enable_if {};
template <class T>
struct enable_if<true, T> {
  typedef T type;
};
template <bool b, class T = void>
using enable_if_t = typename enable_if<b, T>::type;
template <bool b, class A, class B>
struct conditional {
  typedef A type;
};
template <class A, class B>
struct conditional<false, A, B> {
  typedef B type;
};
template <bool b, class A, class B>
using conditional_t = typename conditional<b, A, B>::type;
template <class T>
struct numeric_limits {
  static constexpr T max() { return T(1); }
  static constexpr T min() { return T(0); }
  static constexpr T lowest() { return T(0); }
  static constexpr T infinity() { return T(1.0f); }
  static constexpr T quiet_NaN() { return T(1.0f); }
  static constexpr T epsilon() { return T(1.0f); }
};

// ---- functions

#define F1(name) template <class T> T name(T);
#define F2(name) template <class T> T name(T, T);
#define F3(name) template <class T> T name(T, T, T);
#define FUNCTIONS                                                                                                    \
  F1(exp) F1(exp2) F1(exp10) F1(log) F1(log2) F1(log10) F1(sqrt) F1(rsqrt) F1(sin) F1(cos) F1(tan) F1(sinh) F1(cosh) \
  F1(tanh) F1(asin) F1(acos) F1(atan) F1(asinh) F1(acosh) F1(atanh) F1(floor) F1(ceil) F1(trunc) F1(round) F1(rint)  \
  F1(fabs) F1(abs) F1(sign) F1(fract) F1(saturate) F2(pow) F2(powr) F2(fmin) F2(fmax) F2(fmod) F2(atan2)             \
  F2(copysign) F2(divide) F2(max) F2(min) F3(fma) F3(mix)                      \
  template <class T, class S> T clamp(T, S, S);
FUNCTIONS
namespace fast { FUNCTIONS }
namespace precise { FUNCTIONS }
#undef FUNCTIONS

template <class T, class C> T select(T, T, C);
template <class T> bool isnan(T);
template <class T> bool isinf(T);
template <class T> bool isfinite(T);
F1(popcount) F1(clz) F1(ctz)
template <class T> T extract_bits(T, uint, uint);
template <class T> T dot(vec<T, 2>, vec<T, 2>);
float dot(float2, float2);
float dot(float3, float3);
float dot(float4, float4);
half dot(half2, half2);
half dot(half4, half4);

F1(simd_sum) F1(simd_product) F1(simd_max) F1(simd_min) F1(simd_and) F1(simd_or) F1(simd_xor) F1(simd_broadcast_first)
F1(simd_prefix_inclusive_sum) F1(simd_prefix_exclusive_sum) F1(simd_prefix_inclusive_product) F1(simd_prefix_exclusive_product)
template <class T> T simd_broadcast(T, ushort);
template <class T> T simd_shuffle(T, ushort);
template <class T> T simd_shuffle_xor(T, ushort);
template <class T> T simd_shuffle_down(T, ushort);
template <class T> T simd_shuffle_up(T, ushort);
template <class T> T simd_shuffle_and_fill_up(T, T, ushort);
template <class T> T simd_shuffle_and_fill_down(T, T, ushort);
#undef F1
#undef F2
#undef F3
bool simd_any(bool);
bool simd_all(bool);
bool simd_is_first();
struct simd_vote {
  typedef ulong vote_t;
  explicit operator vote_t() __private;  // with const, clang finds no conversion of a temporary
  bool all() __private;
  bool any() __private;
};
simd_vote simd_ballot(bool);

template <class T, int ROWS, int COLUMNS>
struct simdgroup_matrix {
  simdgroup_matrix();
  explicit simdgroup_matrix(T);
  __private vec<T, 2>& thread_elements();
};
typedef simdgroup_matrix<float, 8, 8> simdgroup_float8x8;
typedef simdgroup_matrix<half, 8, 8> simdgroup_half8x8;
#define MATRIX_MEMORY(space)                                                                                     \
  template <class T, class P>                                                                                    \
  void simdgroup_load(__private simdgroup_matrix<T, 8, 8>&, const space P*, ulong = 8, ulong2 = 0, bool = false); \
  template <class T, class P>                                                                                    \
  void simdgroup_store(__private const simdgroup_matrix<T, 8, 8>&, space P*, ulong = 8, ulong2 = 0, bool = false);
MATRIX_MEMORY(__global) MATRIX_MEMORY(__local)
#undef MATRIX_MEMORY
template <class D, class A, class B, class C>
void simdgroup_multiply_accumulate(__private D&, __private A&, __private B&, __private C&);
template <class D, class A, class B>
void simdgroup_multiply(__private D&, __private A&, __private B&);

// ---- memory

enum class mem_flags { mem_none = 0, mem_device = 1, mem_threadgroup = 2, mem_texture = 4 };
mem_flags operator|(mem_flags, mem_flags);
void threadgroup_barrier(mem_flags);
void simdgroup_barrier(mem_flags);

enum memory_order { memory_order_relaxed };
template <class T>
struct atomic {
  T v;
};
typedef atomic<int> atomic_int;
typedef atomic<uint> atomic_uint;
typedef atomic<float> atomic_float;
#define ATOMIC(name)                                                              \
  template <class T, class U> T name(volatile __global atomic<T>*, U, memory_order); \
  template <class T, class U> T name(volatile __local atomic<T>*, U, memory_order);
ATOMIC(atomic_fetch_add_explicit) ATOMIC(atomic_fetch_sub_explicit) ATOMIC(atomic_fetch_max_explicit)
ATOMIC(atomic_fetch_min_explicit) ATOMIC(atomic_fetch_or_explicit) ATOMIC(atomic_fetch_and_explicit)
ATOMIC(atomic_exchange_explicit) ATOMIC(atomic_store_explicit)
#undef ATOMIC
template <class T> T atomic_load_explicit(const volatile __global atomic<T>*, memory_order);
template <class T> T atomic_load_explicit(const volatile __local atomic<T>*, memory_order);

}  // namespace metal

template <class To, class From> To as_type(From);

// OpenCL knows no float4(a, b, c, d): address_spaces.py puts this in its place.
template <class V, class... A> V msl_vector(A...);
