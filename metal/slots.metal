// What attend_slots and slot_mass read slots with. Their bodies are put together of slots_queries and slots_logits.

#include "rows.metal"
// What is read of one kind of rows: values of type T, or octets of codes that become code * scale + bias.
template <typename T, int BITS, int GROUP, int D>
inline void read_row(const device uchar* row, const device half* scales, const device half* biases, int octet, thread float* x) {
  if (octet * 8 >= D) {
    UNROLL for (int j = 0; j < 8; j++) x[j] = 0.0f;
    return;
  }
  read_octet<T, BITS>(row, octet, x);
  if (BITS > 0) {
    float scale = float(scales[octet * 8 / GROUP]), bias = float(biases[octet * 8 / GROUP]);
    UNROLL for (int j = 0; j < 8; j++) x[j] = x[j] * scale + bias;
  }
}

// The code of one token of a page whose channels are packed one after the other (32 tokens of BITS bits each).
template <int BITS>
inline float page_code(const device uint* words, int channel, uint token) {
  if (BITS == 0) return 0.0f;
  uint bit = token * uint(BITS), word = uint(channel * BITS) + bit / 32, shift = bit % 32;
  uint low = words[word] >> shift;
  if (shift + uint(BITS) > 32) low |= words[word + 1] << (32 - shift);
  return float(low & ((1u << BITS) - 1));
}

// Rotate a row that lies octet by octet in LPS lanes: y = x cos + partner sin, the first DIMS channels.
template <int DIMS, bool NEIGHBOURS>
inline void rotate_row(thread float* x, const device float* cosines, const device float* sines, int octet, uint lane) {
  if (DIMS == 0) return;
  constexpr int HALF = DIMS / 16;  // octets from a channel to its partner
  uint first = lane - uint(octet);
  int other = NEIGHBOURS ? octet : octet < HALF ? octet + HALF : octet < 2 * HALF ? octet - HALF : octet;
  float partner[8];
  UNROLL for (int j = 0; j < 8; j++) partner[j] = NEIGHBOURS ? x[j ^ 1] : simd_shuffle(x[j], ushort(first + uint(other)));
  if (octet * 8 >= DIMS) return;
  UNROLL for (int j = 0; j < 8; j++) x[j] = x[j] * cosines[octet * 8 + j] + partner[j] * sines[octet * 8 + j];
}
