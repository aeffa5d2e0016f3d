// 8x8 simdgroup matrices. A lane holds two neighbours of one row, placed as MLX's steel/gemm/mma.h assumes.
#pragma once

namespace metal {

template <class T, int ROWS, int COLUMNS>
struct simdgroup_matrix {
  static_assert(ROWS == 8 && COLUMNS == 8, "simdgroup matrices are 8x8");
  vec<T, 2> elements;
  simdgroup_matrix() = default;
  explicit simdgroup_matrix(T v) : elements(v) {}
  vec<T, 2>& thread_elements() { return elements; }
  const vec<T, 2>& thread_elements() const { return elements; }
};
typedef simdgroup_matrix<float, 8, 8> simdgroup_float8x8;
typedef simdgroup_matrix<half, 8, 8> simdgroup_half8x8;
typedef simdgroup_matrix<bfloat, 8, 8> simdgroup_bfloat8x8;

namespace emulated {

struct Place {
  int row, column;
};
inline Place place(int lane) {
  int quad = lane / 4;
  return {(quad & 4) + (lane / 2) % 4, (quad & 2) * 2 + (lane % 2) * 2};
}

template <class T>
MSL_HOST void gather(const vec<T, 2>& mine, float* matrix, int operation, int line) {
  msl_exchange* exchange = msl_simd_exchange(&mine, sizeof mine, operation, line);
  for (int lane = 0; lane < 32; lane++) {
    Place p = place(lane);
    vec<T, 2> pair = lane_value<vec<T, 2>>(exchange, lane);
    for (int i = 0; i < 2; i++) matrix[p.row * 8 + p.column + i] = float(pair[i]);
  }
}

// d = a * b + c. Products are added in the order of the inner index, in float.
template <class D, class A, class B, class C>
MSL_HOST void multiply_accumulate(vec<D, 2>& d, const vec<A, 2>& a, const vec<B, 2>& b, const vec<C, 2>& c, int line) {
  float left[64], right[64];
  gather(a, left, MATRIX_A, line);
  gather(b, right, MATRIX_B, line);
  Place p = place(msl_lane());
  for (int i = 0; i < 2; i++) {
    float sum = float(c[i]);
    for (int k = 0; k < 8; k++) sum += left[p.row * 8 + k] * right[k * 8 + p.column + i];
    d[i] = D(sum);
  }
}

}  // namespace emulated

template <class T, class P>
MSL_FN void simdgroup_load(simdgroup_matrix<T, 8, 8>& d, const P* from, ulong row_stride = 8, ulong2 origin = ulong2(0), bool transpose = false) {
  emulated::Place p = emulated::place(msl_lane());
  for (int i = 0; i < 2; i++) {
    ulong row = transpose ? p.column + i : p.row, column = transpose ? p.row : p.column + i;
    d.elements[i] = T(from[(origin.y + row) * row_stride + origin.x + column]);
  }
}
template <class T, class P>
MSL_FN void simdgroup_store(const simdgroup_matrix<T, 8, 8>& d, P* to, ulong row_stride = 8, ulong2 origin = ulong2(0), bool transpose = false) {
  emulated::Place p = emulated::place(msl_lane());
  for (int i = 0; i < 2; i++) {
    ulong row = transpose ? p.column + i : p.row, column = transpose ? p.row : p.column + i;
    to[(origin.y + row) * row_stride + origin.x + column] = P(d.elements[i]);
  }
}
template <class D, class A, class B, class C>
MSL_FN void simdgroup_multiply_accumulate(
    simdgroup_matrix<D, 8, 8>& d, simdgroup_matrix<A, 8, 8>& a, simdgroup_matrix<B, 8, 8>& b, simdgroup_matrix<C, 8, 8>& c, MSL_LINE) {
  emulated::multiply_accumulate(d.elements, a.elements, b.elements, c.elements, line);
}
template <class D, class A, class B>
MSL_FN void simdgroup_multiply(simdgroup_matrix<D, 8, 8>& d, simdgroup_matrix<A, 8, 8>& a, simdgroup_matrix<B, 8, 8>& b, MSL_LINE) {
  emulated::multiply_accumulate(d.elements, a.elements, b.elements, vec<D, 2>(D(0)), line);
}

}  // namespace metal
