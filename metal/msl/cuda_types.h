// Metal Shading Language on CUDA, first part: half types and names. Goes before vector.h and math.h into the
// `header` of mx.fast.cuda_kernel, which NVRTC compiles with --device-as-default-execution-space.
//
// CUDA's own half and vector types have other members and conversions than Metal's, so Metal's get names of their own.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda/std/limits>
#include <cuda/std/type_traits>

#define MSL_FN __device__ inline
#define MSL_CE __device__ inline
#define MSL_STD cuda::std
#define MSL_BITCAST(T, bits) (T::from_bits(bits))
#define MSL_MEMCPY memcpy
#define MSL_POPCOUNT __popc
#define MSL_POPCOUNT64 __popcll
#ifndef INFINITY
#define INFINITY __int_as_float(0x7f800000)
#endif
#ifndef NAN
#define NAN __int_as_float(0x7fc00000)
#endif

#define half msl_half
#define bfloat msl_bfloat

// A 16-bit float. Arithmetic is done in float and rounded after every operation, which for + - * / gives the bits
// that native arithmetic gives. half converts from any number, bfloat implicitly from integers only, as Metal demands.
template <bool IS_HALF>
struct msl_float16 {
  unsigned short bits;

  msl_float16() = default;
  __device__ static msl_float16 from_bits(unsigned short bits) {
    msl_float16 r;
    r.bits = bits;
    return r;
  }
  __device__ static unsigned short rounded(float f) {
    if constexpr (IS_HALF) return __half_as_ushort(__float2half_rn(f));
    else return __bfloat16_as_ushort(__float2bfloat16_rn(f));
  }
  __device__ operator float() const {
    if constexpr (IS_HALF) return __half2float(__ushort_as_half(bits));
    else return __uint_as_float((unsigned)bits << 16);
  }

  template <class F, cuda::std::enable_if_t<cuda::std::is_arithmetic_v<F> && (IS_HALF || cuda::std::is_integral_v<F>), int> = 0>
  __device__ msl_float16(F f) : bits(rounded((float)f)) {}
  template <class F, cuda::std::enable_if_t<cuda::std::is_floating_point_v<F> && !IS_HALF, int> = 0, class = void>
  __device__ explicit msl_float16(F f) : bits(rounded((float)f)) {}
  template <bool OTHER, cuda::std::enable_if_t<OTHER != IS_HALF, int> = 0>
  __device__ explicit msl_float16(msl_float16<OTHER> o) : bits(rounded((float)o)) {}

  __device__ friend msl_float16 operator-(msl_float16 a) { return from_bits(a.bits ^ 0x8000); }

#define MSL_INTEGER template <class S, cuda::std::enable_if_t<cuda::std::is_integral_v<S>, int> = 0> __device__
#define MSL_FLOAT template <class S, cuda::std::enable_if_t<cuda::std::is_floating_point_v<S>, int> = 0> __device__
#define MSL_ARITHMETIC(op)                                                                                     \
  __device__ friend msl_float16 operator op(msl_float16 a, msl_float16 b) {                                    \
    return from_bits(rounded(float(a) op float(b)));                                                           \
  }                                                                                                            \
  MSL_INTEGER friend msl_float16 operator op(msl_float16 a, S b) { return from_bits(rounded(float(a) op float(b))); } \
  MSL_INTEGER friend msl_float16 operator op(S a, msl_float16 b) { return from_bits(rounded(float(a) op float(b))); } \
  MSL_FLOAT friend float operator op(msl_float16 a, S b) { return float(a) op float(b); }                      \
  MSL_FLOAT friend float operator op(S a, msl_float16 b) { return float(a) op float(b); }                      \
  template <class S>                                                                                           \
  __device__ msl_float16& operator op##=(S o) {                                                                \
    bits = rounded(float(*this) op float(o));                                                                  \
    return *this;                                                                                              \
  }
  MSL_ARITHMETIC(+) MSL_ARITHMETIC(-) MSL_ARITHMETIC(*) MSL_ARITHMETIC(/)
#undef MSL_ARITHMETIC
#undef MSL_FLOAT
#undef MSL_INTEGER

#define MSL_COMPARE(op)                                         \
  template <class S>                                            \
  __device__ friend bool operator op(msl_float16 a, S b) {      \
    return float(a) op float(b);                                \
  }
  MSL_COMPARE(<) MSL_COMPARE(>) MSL_COMPARE(<=) MSL_COMPARE(>=) MSL_COMPARE(==) MSL_COMPARE(!=)
#undef MSL_COMPARE
};
using msl_half = msl_float16<true>;
using msl_bfloat = msl_float16<false>;

#define float2 msl_float2
#define float3 msl_float3
#define float4 msl_float4
#define int2 msl_int2
#define int3 msl_int3
#define int4 msl_int4
#define uint2 msl_uint2
#define uint3 msl_uint3
#define uint4 msl_uint4
#define short2 msl_short2
#define short3 msl_short3
#define short4 msl_short4
#define ushort2 msl_ushort2
#define ushort3 msl_ushort3
#define ushort4 msl_ushort4
#define char2 msl_char2
#define char3 msl_char3
#define char4 msl_char4
#define uchar2 msl_uchar2
#define uchar3 msl_uchar3
#define uchar4 msl_uchar4
#define long2 msl_long2
#define long3 msl_long3
#define long4 msl_long4
#define ulong2 msl_ulong2
#define ulong3 msl_ulong3
#define ulong4 msl_ulong4
