// Stands in for MLX's complex.h in the check of address spaces.
#pragma once

template <typename T>
struct complex_t {
  T real;
  T imag;
  constexpr complex_t(T r, T i) constant : real(r), imag(i) {}
  complex_t(T r, T i);
  complex_t(const thread complex_t&);
  complex_t(thread complex_t&&);
};
typedef complex_t<float> complex64_t;
