// Stands in for MLX's complex.h, whose constructors overload on address spaces.
#pragma once

template <typename T>
struct complex_t {
  T real;
  T imag;
  constexpr complex_t() : real(0), imag(0) {}
  constexpr complex_t(T r, T i) : real(r), imag(i) {}
  template <class U>
  explicit constexpr complex_t(U x) : real(T(x)), imag(0) {}
};
typedef complex_t<float> complex64_t;
