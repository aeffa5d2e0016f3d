// Rows as they are packed, eight values at a time: what all kernels that read keys and values share.
//   A row of D values is a bit stream of codes, lowest bits first; eight codes of b bits are b whole bytes.

#define UNROLL _Pragma("clang loop unroll(full)")  // arrays of a thread stay in registers only where loops over them are unrolled

// Eight neighbours of a row (octet o: values 8 o .. 8 o + 7), as codes or, with BITS = 0, as values of type T.
template <typename T, int BITS>
inline void read_octet(const device uchar* row, int octet, thread float* x) {
  const device uchar* at = row + octet * (BITS == 0 ? 8 * int(sizeof(T)) : BITS);
  if (BITS == 0) {
    const device T* values = reinterpret_cast<const device T*>(at);
    UNROLL for (int j = 0; j < 8; j++) x[j] = static_cast<float>(values[j]);
    return;
  }
  uint low = 0, high = 0;  // four codes each
  if (BITS == 8) {
    const device uint* words = reinterpret_cast<const device uint*>(at);
    low = words[0];
    high = words[1];
  } else if (BITS == 6) {
    const device ushort* words = reinterpret_cast<const device ushort*>(at);
    low = uint(words[0]) | uint(words[1]) << 16;
    high = uint(words[1]) >> 8 | uint(words[2]) << 8;
  } else if (BITS == 5) {
    low = uint(at[0]) | uint(at[1]) << 8 | uint(at[2]) << 16;
    high = uint(at[2]) >> 4 | uint(at[3]) << 4 | uint(at[4]) << 12;
  } else if (BITS == 4) {
    low = reinterpret_cast<const device uint*>(at)[0];
    high = low >> 16;
  } else if (BITS == 3) {
    low = uint(at[0]) | uint(at[1]) << 8 | uint(at[2]) << 16;
    high = low >> 12;
  } else {
    low = reinterpret_cast<const device ushort*>(at)[0];
    high = low >> 8;
  }
  constexpr uint MASK = (1u << BITS) - 1;
  UNROLL for (int j = 0; j < 4; j++) {
    x[j] = float(low >> (j * BITS) & MASK);
    x[4 + j] = float(high >> (j * BITS) & MASK);
  }
}

// A row whose lanes hold an octet each, times an orthonormal Hadamard matrix (its own inverse) in blocks of BLOCK values.
template <int BLOCK>
inline void hadamard(thread float* x, uint lane) {
  for (int step = 1; step < (BLOCK < 8 ? BLOCK : 8); step *= 2) {
    UNROLL for (int j = 0; j < 8; j++) {
      if ((j & step) == 0) {
        float a = x[j], b = x[j + step];
        x[j] = a + b;
        x[j + step] = a - b;
      }
    }
  }
  for (int step = 1; step < BLOCK / 8; step *= 2) {
    float sign = (lane & uint(step)) == 0 ? 1.0f : -1.0f;
    UNROLL for (int j = 0; j < 8; j++) x[j] = simd_shuffle_xor(x[j], ushort(step)) + sign * x[j];
  }
  float norm = rsqrt(float(BLOCK));
  UNROLL for (int j = 0; j < 8; j++) x[j] *= norm;
}
