// Metal's numeric limits, mathematics, memory flags and orders, in C++17. Comes after vector.h.
//
// Whoever includes this defines MSL_CE (a constexpr function, where the platform can), MSL_BITCAST(T, bits),
// MSL_POPCOUNT and MSL_POPCOUNT64. Half types are computed in float and rounded once.
#pragma once

namespace metal {

// ---- limits

template <class T>
struct numeric_limits : MSL_STD::numeric_limits<T> {};

#define MSL_LIMITS(T, INFINITE, MAX, LOWEST, MIN, EPSILON, QUIET_NAN)             \
  template <>                                                                     \
  struct numeric_limits<T> {                                                      \
    static MSL_CE T infinity() { return MSL_BITCAST(T, INFINITE); }               \
    static MSL_CE T max() { return MSL_BITCAST(T, MAX); }                         \
    static MSL_CE T lowest() { return MSL_BITCAST(T, LOWEST); }                   \
    static MSL_CE T min() { return MSL_BITCAST(T, MIN); }                         \
    static MSL_CE T epsilon() { return MSL_BITCAST(T, EPSILON); }                 \
    static MSL_CE T quiet_NaN() { return MSL_BITCAST(T, QUIET_NAN); }             \
  };
MSL_LIMITS(half, 0x7C00, 0x7BFF, 0xFBFF, 0x0400, 0x1400, 0x7E00)
MSL_LIMITS(bfloat, 0x7F80, 0x7F7F, 0xFF7F, 0x0080, 0x3C00, 0x7FC0)
#undef MSL_LIMITS

// ---- functions of floats, one component at a time

#define MSL_FLOATS class T, enable_if_t<is_floating_point_v<T>, int> = 0
#define MSL_UNARY(name, result)                       \
  template <MSL_FLOATS>                               \
  MSL_FN T name(T t) {                                \
    float x = float(t);                               \
    return T(result);                                 \
  }                                                   \
  template <class T, int N>                           \
  MSL_FN vec<T, N> name(const vec<T, N>& v) {         \
    vec<T, N> r;                                      \
    for (int i = 0; i < N; i++) r[i] = name(v[i]);    \
    return r;                                         \
  }
#define MSL_BINARY(name, result)                                      \
  template <MSL_FLOATS>                                               \
  MSL_FN T name(T s, T t) {                                           \
    float x = float(s), y = float(t);                                 \
    return T(result);                                                 \
  }                                                                   \
  template <class T, int N>                                           \
  MSL_FN vec<T, N> name(const vec<T, N>& v, const vec<T, N>& w) {     \
    vec<T, N> r;                                                      \
    for (int i = 0; i < N; i++) r[i] = name(v[i], w[i]);              \
    return r;                                                         \
  }
#define MSL_FUNCTIONS                                                                                       \
  MSL_UNARY(exp, ::expf(x)) MSL_UNARY(exp2, ::exp2f(x)) MSL_UNARY(exp10, ::exp10f(x))                       \
  MSL_UNARY(log, ::logf(x)) MSL_UNARY(log2, ::log2f(x)) MSL_UNARY(log10, ::log10f(x))                       \
  MSL_UNARY(sqrt, ::sqrtf(x)) MSL_UNARY(rsqrt, 1.0f / ::sqrtf(x))                                           \
  MSL_UNARY(sin, ::sinf(x)) MSL_UNARY(cos, ::cosf(x)) MSL_UNARY(tan, ::tanf(x))                             \
  MSL_UNARY(sinh, ::sinhf(x)) MSL_UNARY(cosh, ::coshf(x)) MSL_UNARY(tanh, ::tanhf(x))                       \
  MSL_UNARY(asin, ::asinf(x)) MSL_UNARY(acos, ::acosf(x)) MSL_UNARY(atan, ::atanf(x))                       \
  MSL_UNARY(asinh, ::asinhf(x)) MSL_UNARY(acosh, ::acoshf(x)) MSL_UNARY(atanh, ::atanhf(x))                 \
  MSL_UNARY(floor, ::floorf(x)) MSL_UNARY(ceil, ::ceilf(x)) MSL_UNARY(trunc, ::truncf(x))                   \
  MSL_UNARY(round, ::roundf(x)) MSL_UNARY(rint, ::rintf(x)) MSL_UNARY(fabs, ::fabsf(x))                     \
  MSL_UNARY(sign, (x > 0.0f ? 1.0f : x < 0.0f ? -1.0f : 0.0f)) MSL_UNARY(fract, x - ::floorf(x))            \
  MSL_UNARY(saturate, ::fminf(::fmaxf(x, 0.0f), 1.0f))                                                      \
  MSL_BINARY(pow, ::powf(x, y)) MSL_BINARY(powr, ::powf(x, y)) MSL_BINARY(fmod, ::fmodf(x, y))              \
  MSL_BINARY(fmin, ::fminf(x, y)) MSL_BINARY(fmax, ::fmaxf(x, y)) MSL_BINARY(atan2, ::atan2f(x, y))         \
  MSL_BINARY(copysign, ::copysignf(x, y)) MSL_BINARY(divide, x / y)                                         \
  template <MSL_FLOATS>                                                                                     \
  MSL_FN T fma(T a, T b, T c) {                                                                             \
    return T(::fmaf(float(a), float(b), float(c)));                                                         \
  }                                                                                                         \
  template <MSL_FLOATS, int N>                                                                              \
  MSL_FN vec<T, N> fma(const vec<T, N>& a, const vec<T, N>& b, const vec<T, N>& c) {                        \
    vec<T, N> r;                                                                                            \
    for (int i = 0; i < N; i++) r[i] = fma(a[i], b[i], c[i]);                                               \
    return r;                                                                                               \
  }

MSL_FUNCTIONS
namespace fast { MSL_FUNCTIONS }
namespace precise { MSL_FUNCTIONS }
#undef MSL_FUNCTIONS
#undef MSL_BINARY
#undef MSL_UNARY

template <MSL_FLOATS>
MSL_FN bool isnan(T x) {
  return float(x) != float(x);
}
template <MSL_FLOATS>
MSL_FN bool isfinite(T x) {
  return float(x) - float(x) == 0.0f;
}
template <MSL_FLOATS>
MSL_FN bool isinf(T x) {
  return !isnan(x) && !isfinite(x);
}

// ---- functions of floats and integers

#define MSL_SCALARS class T, enable_if_t<is_scalar_msl<T>, int> = 0
template <MSL_SCALARS>
MSL_FN T max(T a, T b) {
  if constexpr (is_floating_point_v<T>) return T(::fmaxf(float(a), float(b)));
  else return a < b ? b : a;
}
template <MSL_SCALARS>
MSL_FN T min(T a, T b) {
  if constexpr (is_floating_point_v<T>) return T(::fminf(float(a), float(b)));
  else return b < a ? b : a;
}
template <MSL_SCALARS>
MSL_FN T clamp(T x, T low, T high) {
  return min(max(x, low), high);
}
template <MSL_SCALARS>
MSL_FN T abs(T x) {
  if constexpr (is_floating_point_v<T>) return T(::fabsf(float(x)));
  else return x < T(0) ? T(-x) : x;
}
template <MSL_SCALARS>
MSL_FN T select(T a, T b, bool c) {
  return c ? b : a;
}
template <MSL_FLOATS>
MSL_FN T mix(T a, T b, T t) {
  return T(a + (b - a) * t);
}
template <class T, int N>
MSL_FN vec<T, N> max(const vec<T, N>& a, const vec<T, N>& b) {
  vec<T, N> r;
  for (int i = 0; i < N; i++) r[i] = max(a[i], b[i]);
  return r;
}
template <class T, int N>
MSL_FN vec<T, N> min(const vec<T, N>& a, const vec<T, N>& b) {
  vec<T, N> r;
  for (int i = 0; i < N; i++) r[i] = min(a[i], b[i]);
  return r;
}
template <class T, int N>
MSL_FN vec<T, N> clamp(const vec<T, N>& x, const vec<T, N>& low, const vec<T, N>& high) {
  return min(max(x, low), high);
}
template <class T, int N>
MSL_FN vec<T, N> clamp(const vec<T, N>& x, T low, T high) {
  return clamp(x, vec<T, N>(low), vec<T, N>(high));
}
template <class T, int N>
MSL_FN vec<T, N> abs(const vec<T, N>& x) {
  vec<T, N> r;
  for (int i = 0; i < N; i++) r[i] = abs(x[i]);
  return r;
}
template <class T, int N>
MSL_FN vec<T, N> select(const vec<T, N>& a, const vec<T, N>& b, const vec<bool, N>& c) {
  vec<T, N> r;
  for (int i = 0; i < N; i++) r[i] = c[i] ? b[i] : a[i];
  return r;
}
template <class T, int N>
MSL_FN T dot(const vec<T, N>& a, const vec<T, N>& b) {
  T s = T(a[0] * b[0]);
  for (int i = 1; i < N; i++) s = T(s + a[i] * b[i]);
  return s;
}
template <int N>
MSL_FN bool all(const vec<bool, N>& a) {
  for (int i = 0; i < N; i++)
    if (!a[i]) return false;
  return true;
}
template <int N>
MSL_FN bool any(const vec<bool, N>& a) {
  for (int i = 0; i < N; i++)
    if (a[i]) return true;
  return false;
}
namespace fast {
using metal::abs;
using metal::clamp;
using metal::max;
using metal::min;
}  // namespace fast
namespace precise {
using metal::abs;
using metal::clamp;
using metal::max;
using metal::min;
}  // namespace precise

// ---- bits

template <class T>
MSL_FN T popcount(T x) {
  if constexpr (sizeof(T) == 8) return T(MSL_POPCOUNT64((unsigned long long)x));
  else return T(MSL_POPCOUNT((unsigned)make_unsigned_t<T>(x)));
}
template <class T>
MSL_FN T clz(T x) {
  int n = 8 * sizeof(T);
  for (make_unsigned_t<T> u = x; u; u >>= 1) n--;
  return T(n);
}
template <class T>
MSL_FN T ctz(T x) {
  if (!x) return T(8 * sizeof(T));
  int n = 0;
  for (make_unsigned_t<T> u = x; !(u & 1); u >>= 1) n++;
  return T(n);
}
template <class T>
MSL_FN T extract_bits(T x, uint offset, uint bits) {
  static_assert(is_unsigned_v<T>, "extract_bits is provided for unsigned types");
  return bits == 0 ? T(0) : T(T(x << (8 * sizeof(T) - bits - offset)) >> (8 * sizeof(T) - bits));
}

// ---- memory

enum memory_order { memory_order_relaxed, memory_order_acquire, memory_order_release, memory_order_acq_rel, memory_order_seq_cst };
enum class mem_flags : unsigned { mem_none = 0, mem_device = 1, mem_threadgroup = 2, mem_texture = 4 };
MSL_FN constexpr mem_flags operator|(mem_flags a, mem_flags b) {
  return mem_flags(unsigned(a) | unsigned(b));
}

}  // namespace metal

#define M_PI_F 3.14159265358979323846f
#define M_LN2_F 0.693147180559945309417f
#define M_LN10_F 2.30258509299404568402f
#define M_LOG2E_F 1.44269504088896340736f
