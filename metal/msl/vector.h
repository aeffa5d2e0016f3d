// The types of Metal Shading Language in C++17: traits, vectors with swizzles, packed vectors.
//
// Shared by the CUDA adapter and by the CPU emulator of the tests. Whoever includes this defines first:
//   MSL_FN (how a function is declared), MSL_STD (std or cuda::std), MSL_MEMCPY, and the types half and bfloat.
#pragma once

typedef unsigned char uchar;
#ifndef MSL_HAVE_UINT
typedef unsigned int uint;
typedef unsigned short ushort;
typedef unsigned long ulong;
#endif

namespace metal {

// ---- traits

using MSL_STD::bool_constant;
using MSL_STD::conditional;
using MSL_STD::conditional_t;
using MSL_STD::conjunction;
using MSL_STD::disjunction;
using MSL_STD::enable_if;
using MSL_STD::enable_if_t;
using MSL_STD::false_type;
using MSL_STD::integral_constant;
using MSL_STD::is_convertible_v;
using MSL_STD::is_empty_v;
using MSL_STD::is_integral_v;
using MSL_STD::is_pointer_v;
using MSL_STD::is_same;
using MSL_STD::is_same_v;
using MSL_STD::is_signed_v;
using MSL_STD::is_unsigned_v;
using MSL_STD::is_void_v;
using MSL_STD::make_unsigned_t;
using MSL_STD::negation;
using MSL_STD::remove_cv_t;
using MSL_STD::remove_reference_t;
using MSL_STD::true_type;
template <class... A>
using _disjunction = MSL_STD::disjunction<A...>;  // the name that MLX's headers use

template <class T>
static constexpr bool is_floating_point_v = is_same_v<T, float> || is_same_v<T, half> || is_same_v<T, bfloat>;
template <class T>
static constexpr bool is_scalar_msl = is_integral_v<T> || is_floating_point_v<T>;

// ---- vectors

template <class T, int N>
struct vec;

template <class T>
struct n_components {
  static constexpr int value = 1;
};
template <class T, int N>
struct n_components<vec<T, N>> {
  static constexpr int value = N;
};

// Some components of a vector, v.zw: lies in a union with the vector's storage.
template <class T, int N, int... I>
struct swizzle {
  T d[N == 3 ? 4 : N];
  typedef vec<T, sizeof...(I)> value;
  MSL_FN operator value() const {
    value r;
    int k = 0;
    ((r[k++] = d[I]), ...);
    return r;
  }
  MSL_FN swizzle& operator=(const value& other) {
    int k = 0;
    ((d[I] = other[k++]), ...);
    return *this;
  }
#define MSL_SWIZZLE_OP(op)                                                                    \
  MSL_FN friend value operator op(const swizzle& a, const value& b) { return value(a) op b; } \
  MSL_FN friend value operator op(const value& a, const swizzle& b) { return a op value(b); }
  MSL_SWIZZLE_OP(+) MSL_SWIZZLE_OP(-) MSL_SWIZZLE_OP(*) MSL_SWIZZLE_OP(/)
#undef MSL_SWIZZLE_OP
};
#define MSL_SWIZZLE_OP(op)                                                                      \
  template <class T, int N, int... I, int M, int... J>                                          \
  MSL_FN enable_if_t<sizeof...(I) == sizeof...(J), vec<T, sizeof...(I)>> operator op(           \
      const swizzle<T, N, I...>& a, const swizzle<T, M, J...>& b) {                             \
    return vec<T, sizeof...(I)>(a) op vec<T, sizeof...(I)>(b);                                  \
  }
MSL_SWIZZLE_OP(+) MSL_SWIZZLE_OP(-) MSL_SWIZZLE_OP(*) MSL_SWIZZLE_OP(/)
#undef MSL_SWIZZLE_OP
template <class T, int N, int... I>
struct n_components<swizzle<T, N, I...>> {
  static constexpr int value = sizeof...(I);
};

template <class T, int N>
struct vec_storage;
#define MSL_PAIR(N, a, i, b, j) swizzle<T, N, i, j> a##b;
#define MSL_PAIRS_2(N, a, i) MSL_PAIR(N, a, i, x, 0) MSL_PAIR(N, a, i, y, 1)
#define MSL_PAIRS_3(N, a, i) MSL_PAIRS_2(N, a, i) MSL_PAIR(N, a, i, z, 2)
#define MSL_PAIRS_4(N, a, i) MSL_PAIRS_3(N, a, i) MSL_PAIR(N, a, i, w, 3)
template <class T>
struct alignas(2 * sizeof(T)) vec_storage<T, 2> {
  union {
    T d_[2];
    struct { T x, y; };
    struct { T r, g; };
    MSL_PAIRS_2(2, x, 0) MSL_PAIRS_2(2, y, 1)
  };
};
template <class T>
struct alignas(4 * sizeof(T)) vec_storage<T, 3> {
  union {
    T d_[4];
    struct { T x, y, z; };
    struct { T r, g, b; };
    MSL_PAIRS_3(3, x, 0) MSL_PAIRS_3(3, y, 1) MSL_PAIRS_3(3, z, 2)
    swizzle<T, 3, 0, 1, 2> xyz;
    swizzle<T, 3, 2, 1, 0> zyx;
  };
};
template <class T>
struct alignas(4 * sizeof(T)) vec_storage<T, 4> {
  union {
    T d_[4];
    struct { T x, y, z, w; };
    struct { T r, g, b, a; };
    MSL_PAIRS_4(4, x, 0) MSL_PAIRS_4(4, y, 1) MSL_PAIRS_4(4, z, 2) MSL_PAIRS_4(4, w, 3)
    swizzle<T, 4, 0, 1, 2> xyz;
    swizzle<T, 4, 1, 2, 3> yzw;
    swizzle<T, 4, 0, 1, 2> rgb;
    swizzle<T, 4, 0, 1, 2, 3> xyzw;
    swizzle<T, 4, 3, 2, 1, 0> wzyx;
  };
};

#undef MSL_PAIR
#undef MSL_PAIRS_2
#undef MSL_PAIRS_3
#undef MSL_PAIRS_4

template <class T, int N>
struct vec : vec_storage<T, N> {
  using vec_storage<T, N>::d_;
  vec() = default;

  template <class S, enable_if_t<is_scalar_msl<S> && is_convertible_v<S, T>, int> = 0>
  MSL_FN vec(S s) {
    for (int i = 0; i < N; i++) d_[i] = T(s);
  }
  template <class S, enable_if_t<is_scalar_msl<S> && !is_convertible_v<S, T>, int> = 0, class = void>
  MSL_FN explicit vec(S s) {
    for (int i = 0; i < N; i++) d_[i] = T(s);
  }
  template <class A, class B, class... R>
  MSL_FN vec(A a, B b, R... rest) {
    static_assert(
        n_components<A>::value + n_components<B>::value + (0 + ... + n_components<R>::value) == N,
        "a vector's constructor needs as many components as it has");
    int i = 0;
    put(i, a);
    put(i, b);
    (put(i, rest), ...);
  }
  template <class U, enable_if_t<!is_same_v<U, T>, int> = 0>
  MSL_FN explicit vec(const vec<U, N>& other) {
    for (int i = 0; i < N; i++) d_[i] = T(other[i]);
  }
  template <class U, int M, int... I, enable_if_t<sizeof...(I) == N, int> = 0>
  MSL_FN explicit vec(const swizzle<U, M, I...>& other) {
    int i = 0;
    ((d_[i++] = T(other.d[I])), ...);
  }

  MSL_FN T& operator[](int i) { return d_[i]; }
  MSL_FN const T& operator[](int i) const { return d_[i]; }

#define MSL_ARITHMETIC(op)                                    \
  MSL_FN friend vec operator op(const vec& a, const vec& b) { \
    vec r;                                                    \
    for (int i = 0; i < N; i++) r.d_[i] = T(a.d_[i] op b.d_[i]); \
    return r;                                                 \
  }                                                           \
  MSL_FN vec& operator op##=(const vec& b) { return *this = *this op b; }
  MSL_ARITHMETIC(+) MSL_ARITHMETIC(-) MSL_ARITHMETIC(*) MSL_ARITHMETIC(/)
#undef MSL_ARITHMETIC

// For integers only; the template parameter defers the check to the call.
#define MSL_BITWISE(op)                                                                                     \
  template <class U>                                                                                        \
  MSL_FN friend enable_if_t<is_same_v<U, T> && is_integral_v<U>, vec> operator op(const vec& a, const vec<U, N>& b) { \
    vec r;                                                                                                  \
    for (int i = 0; i < N; i++) r.d_[i] = T(a.d_[i] op b.d_[i]);                                            \
    return r;                                                                                               \
  }                                                                                                         \
  template <class S>                                                                                        \
  MSL_FN friend enable_if_t<is_integral_v<S> && is_integral_v<T>, vec> operator op(const vec& a, S b) {     \
    vec r;                                                                                                  \
    for (int i = 0; i < N; i++) r.d_[i] = T(a.d_[i] op T(b));                                               \
    return r;                                                                                               \
  }                                                                                                         \
  template <class S>                                                                                        \
  MSL_FN vec& operator op##=(const S& b) {                                                                  \
    return *this = *this op b;                                                                              \
  }
  MSL_BITWISE(&) MSL_BITWISE(|) MSL_BITWISE(^) MSL_BITWISE(<<) MSL_BITWISE(>>) MSL_BITWISE(%)
#undef MSL_BITWISE

#define MSL_COMPARE(op)                                                 \
  MSL_FN friend vec<bool, N> operator op(const vec& a, const vec& b) {  \
    vec<bool, N> r;                                                     \
    for (int i = 0; i < N; i++) r[i] = a.d_[i] op b.d_[i];              \
    return r;                                                           \
  }
  MSL_COMPARE(<) MSL_COMPARE(>) MSL_COMPARE(<=) MSL_COMPARE(>=) MSL_COMPARE(==) MSL_COMPARE(!=)
#undef MSL_COMPARE

  MSL_FN vec operator-() const {
    vec r;
    for (int i = 0; i < N; i++) r.d_[i] = -d_[i];
    return r;
  }
  MSL_FN vec operator~() const {
    vec r;
    for (int i = 0; i < N; i++) r.d_[i] = ~d_[i];
    return r;
  }

 private:
  template <class S>
  MSL_FN enable_if_t<is_scalar_msl<S>> put(int& i, S s) {
    d_[i++] = T(s);
  }
  template <class U, int M>
  MSL_FN void put(int& i, const vec<U, M>& s) {
    for (int k = 0; k < M; k++) d_[i++] = T(s[k]);
  }
  template <class U, int M, int... I>
  MSL_FN void put(int& i, const swizzle<U, M, I...>& s) {
    ((d_[i++] = T(s.d[I])), ...);
  }
};

template <class T, int N>
struct packed_vec {
  T d_[N];
  MSL_FN operator vec<T, N>() const {
    vec<T, N> r;
    for (int i = 0; i < N; i++) r[i] = d_[i];
    return r;
  }
  MSL_FN packed_vec& operator=(const vec<T, N>& other) {
    for (int i = 0; i < N; i++) d_[i] = other[i];
    return *this;
  }
  MSL_FN T& operator[](int i) { return d_[i]; }
  MSL_FN const T& operator[](int i) const { return d_[i]; }
};

#define MSL_NAMES(T)                  \
  typedef vec<T, 2> T##2;             \
  typedef vec<T, 3> T##3;             \
  typedef vec<T, 4> T##4;             \
  typedef packed_vec<T, 2> packed_##T##2; \
  typedef packed_vec<T, 3> packed_##T##3; \
  typedef packed_vec<T, 4> packed_##T##4;
MSL_NAMES(float) MSL_NAMES(half) MSL_NAMES(bfloat) MSL_NAMES(bool)
MSL_NAMES(char) MSL_NAMES(short) MSL_NAMES(int) MSL_NAMES(long)
MSL_NAMES(uchar) MSL_NAMES(ushort) MSL_NAMES(uint) MSL_NAMES(ulong)
#undef MSL_NAMES

using ::bfloat;
using ::half;
using ::uchar;
using ::uint;
using ::ulong;
using ::ushort;

template <class To, class From>
MSL_FN To as_type(From from) {
  static_assert(sizeof(To) == sizeof(From), "as_type needs types of one size");
  To to;
  MSL_MEMCPY(&to, &from, sizeof(to));
  return to;
}

}  // namespace metal

using metal::as_type;
