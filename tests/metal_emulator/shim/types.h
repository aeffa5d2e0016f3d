// half and bfloat on the CPU. _Float16 rounds after each operation; bfloat is a class that does.
#pragma once
#include <sys/types.h>

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <type_traits>
#include <utility>

#include "runtime/interface.h"
#pragma GCC diagnostic ignored "-Wattributes"

#define MSL_FN inline __attribute__((always_inline))  // so that an access is found at the kernel's line
#define MSL_CE constexpr
#define MSL_STD std
#define MSL_HAVE_UINT
#define MSL_BITCAST(T, bits) __builtin_bit_cast(T, (unsigned short)(bits))
#define MSL_MEMCPY __builtin_memcpy
#define MSL_POPCOUNT __builtin_popcount
#define MSL_POPCOUNT64 __builtin_popcountll
// The emulator's own functions, whose accesses are not the kernel's.
#define MSL_HOST __attribute__((noinline, no_sanitize_thread, no_sanitize_undefined))

typedef _Float16 half;

// Converts implicitly to float and from integers only: Metal rejects `bfloat b = 1.0f`.
struct bfloat {
  unsigned short bits;

  bfloat() = default;
  static constexpr unsigned short rounded(float f) {
    unsigned u = __builtin_bit_cast(unsigned, f);
    bool is_nan = (u & 0x7fffffffu) > 0x7f800000u;
    return is_nan ? (u >> 16) | 0x40 : (u + 0x7fffu + ((u >> 16) & 1)) >> 16;
  }
  constexpr explicit bfloat(float f) : bits(rounded(f)) {}
  constexpr explicit bfloat(half h) : bits(rounded((float)h)) {}
  template <class I, std::enable_if_t<std::is_integral_v<I>, int> = 0>
  constexpr bfloat(I i) : bits(rounded((float)i)) {}
  constexpr operator float() const { return __builtin_bit_cast(float, (unsigned)bits << 16); }
  constexpr explicit operator half() const { return (half)(float)*this; }
  friend constexpr bfloat operator-(bfloat a) { return bfloat(-float(a)); }

#define MSL_INTEGER template <class I, std::enable_if_t<std::is_integral_v<I>, int> = 0>
#define MSL_ARITHMETIC(op)                                                                                   \
  friend constexpr bfloat operator op(bfloat a, bfloat b) { return bfloat(float(a) op float(b)); }           \
  MSL_INTEGER friend constexpr bfloat operator op(bfloat a, I b) { return bfloat(float(a) op float(b)); }    \
  MSL_INTEGER friend constexpr bfloat operator op(I a, bfloat b) { return bfloat(float(a) op float(b)); }    \
  constexpr bfloat& operator op##=(bfloat o) { return *this = bfloat(float(*this) op float(o)); }
  MSL_ARITHMETIC(+) MSL_ARITHMETIC(-) MSL_ARITHMETIC(*) MSL_ARITHMETIC(/)
#undef MSL_ARITHMETIC
#undef MSL_INTEGER
};
