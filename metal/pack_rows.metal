// pack_rows: rows of keys or values as codes of a few bits.
//   rows (B, H, n, D), any strides   offset, scale (B * H, D)   by rows:  codes (B, H, n, PADDED * BITS / 8) bytes,
//   scales, biases (B, H, n, PADDED / GROUP)                    by pages: codes (B, H, n / 32, D * 4 * BITS) bytes,
//   scales, biases (B, H, n / 32, D)
//   x = hadamard((x - offset) / scale), zeros up to PADDED; each group of x on its own:
//   line = ((max - min) / levels, min); with 3 and 2 bits twice: line = least_squares(x, nearest codes)
//   line = float16(line); codes = clamp(rint((x - bias) / scale), 0, levels)
// A lane owns an octet of a row: LANES lanes make a row, GROUP / 8 of them a group; a SIMD group packs 32 / LANES rows.
// By pages a thread owns a channel, 32 tokens; where rows are rotated, SIMD groups first do so into a tile of the page.
#include "rows.metal"

constexpr constant int PACKED_PAGE = 32;
constexpr constant float HALF_MOST = 65504.0f;

// Scale and bias of a group: value = code * x + y.
typedef float2 Line;

inline float within_half(float x) { return fmin(fmax(x, -HALF_MOST), HALF_MOST); }

inline float to_half(float x) { return static_cast<float>(static_cast<half>(within_half(x))); }

template <int LANES>
inline float sum_of(float x) {
  for (int step = 1; step < LANES; step *= 2) x += simd_shuffle_xor(x, ushort(step));
  return x;
}

template <int LANES>
inline float least_of(float x) {
  for (int step = 1; step < LANES; step *= 2) x = fmin(x, simd_shuffle_xor(x, ushort(step)));
  return x;
}

// The nearest levels of N values.
template <int N, int BITS>
inline void nearest(const thread float* x, Line line, thread float* codes) {
  float step = line.x > 0.0f ? line.x : 1.0f;  // all alike: any step will do
  for (int j = 0; j < N; j++) codes[j] = clamp(rint((x[j] - line.y) / step), 0.0f, float((1 << BITS) - 1));
}

// The line of the least squared error for these codes; groups of one code keep their scale.
template <int N, int LANES>
inline Line least_squares(const thread float* x, const thread float* codes, Line line) {
  float code = 0.0f, value = 0.0f;
  for (int j = 0; j < N; j++) {
    code += codes[j];
    value += x[j];
  }
  code = sum_of<LANES>(code) / float(N * LANES);
  value = sum_of<LANES>(value) / float(N * LANES);
  float spread = 0.0f, slope = 0.0f;
  for (int j = 0; j < N; j++) {
    float off = codes[j] - code;
    spread += off * off;
    slope += off * (x[j] - value);
  }
  spread = sum_of<LANES>(spread);
  slope = sum_of<LANES>(slope);
  if (spread > 0.0f) line.x = slope / spread;
  line.y = value - line.x * code;
  return line;
}

// A group that lies in LANES lanes, N values in each: values become codes; the line is what float16 can hold.
template <int N, int LANES, int BITS>
inline Line quantize_group(thread float* x) {
  float low = HALF_MOST, high = -HALF_MOST;
  for (int j = 0; j < N; j++) {
    x[j] = within_half(x[j]);
    low = fmin(low, x[j]);
    high = fmax(high, x[j]);
  }
  low = least_of<LANES>(low);
  high = -least_of<LANES>(-high);
  float codes[N];
  Line line;
  line.x = (high - low) / float((1 << BITS) - 1);
  line.y = low;
  for (int turn = 0; turn < (BITS <= 3 ? 2 : 0); turn++) {
    nearest<N, BITS>(x, line, codes);
    line = least_squares<N, LANES>(x, codes, line);
  }
  line.x = to_half(line.x);
  line.y = to_half(line.y);
  nearest<N, BITS>(x, line, codes);
  for (int j = 0; j < N; j++) x[j] = codes[j];
  return line;
}

// Eight codes as BITS bytes, lowest bits first: the inverse of read_octet.
template <int BITS>
inline void write_octet(device uchar* at, const thread float* codes) {
  uint low = 0, high = 0;  // four codes each
  for (int j = 0; j < 4; j++) {
    low |= uint(codes[j]) << (j * BITS);
    high |= uint(codes[4 + j]) << (j * BITS);
  }
  if (BITS == 8) {
    device uint* words = reinterpret_cast<device uint*>(at);
    words[0] = low;
    words[1] = high;
  } else if (BITS == 6) {
    device ushort* words = reinterpret_cast<device ushort*>(at);
    words[0] = ushort(low);
    words[1] = ushort(low >> 16 | high << 8);
    words[2] = ushort(high >> 8);
  } else if (BITS == 5) {
    at[0] = uchar(low);
    at[1] = uchar(low >> 8);
    at[2] = uchar(low >> 16 | high << 4);
    at[3] = uchar(high >> 4);
    at[4] = uchar(high >> 12);
  } else if (BITS == 4) {
    reinterpret_cast<device uint*>(at)[0] = low | high << 16;
  } else if (BITS == 3) {
    at[0] = uchar(low);
    at[1] = uchar(low >> 8 | high << 4);
    at[2] = uchar(high >> 4);
  } else {
    reinterpret_cast<device ushort*>(at)[0] = ushort(low | high << 8);
  }
}

// ---- body
constexpr int ROWS = 32 / LANES;  // of a SIMD group
const int lane = int(thread_index_in_simdgroup), simd_at = int(simdgroup_index_in_threadgroup);
const int octet = lane % LANES, nth = lane / LANES;
const int heads = rows_shape[1], n = rows_shape[2];
const int64_t next = rows_strides[3];
threadgroup float tile[PAGED && BLOCK > 0 ? PACKED_PAGE * D : 1];

if (PAGED) {
  const int page = int(threadgroup_position_in_grid.x), pages = n / PACKED_PAGE;
  const int head = page / pages, first = page % pages * PACKED_PAGE;
  const device T* start =
      rows + head / heads * rows_strides[0] + head % heads * rows_strides[1] + first * rows_strides[2];
  if (BLOCK > 0) {
    for (int t = simd_at * ROWS + nth; t < PACKED_PAGE; t += int(simdgroups_per_threadgroup) * ROWS) {
      float x[8];
      const bool inside = 8 * octet < D;
      for (int j = 0; j < 8; j++)
        x[j] = inside ? static_cast<float>(start[t * rows_strides[2] + (8 * octet + j) * next]) : 0.0f;
      hadamard<BLOCK>(x, uint(lane));
      if (inside) {
        for (int j = 0; j < 8; j++) tile[t * D + 8 * octet + j] = x[j];
      }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
  }
  const int channel = int(thread_position_in_threadgroup.x);
  if (channel < D) {
    float x[PACKED_PAGE];
    for (int t = 0; t < PACKED_PAGE; t++)
      x[t] = BLOCK > 0 ? tile[t * D + channel] : static_cast<float>(start[t * rows_strides[2] + channel * next]);
    const Line line = quantize_group<PACKED_PAGE, 1, BITS>(x);
    const int64_t at = int64_t(page) * D + channel;
    for (int o = 0; o < PACKED_PAGE / 8; o++) write_octet<BITS>(codes + (at * (PACKED_PAGE / 8) + o) * BITS, x + 8 * o);
    scales[at] = static_cast<half>(line.x);
    biases[at] = static_cast<half>(line.y);
  }
} else {
  const int row = (int(threadgroup_position_in_grid.x * simdgroups_per_threadgroup) + simd_at) * ROWS + nth;
  const int head = row / n;
  const bool held = row < int(rows_shape[0]) * heads * n, inside = held && 8 * octet < D;
  const int64_t start =
      head / heads * rows_strides[0] + head % heads * rows_strides[1] + row % n * rows_strides[2];
  float x[8];
  for (int j = 0; j < 8; j++) {
    const int channel = 8 * octet + j;
    x[j] = inside ? static_cast<float>(rows[start + channel * next]) : 0.0f;
    if (FRAMED && inside) {
      const int64_t at = int64_t(head) * D + channel;
      x[j] = (x[j] - static_cast<float>(offset[at])) / static_cast<float>(scale[at]);
    }
  }
  if (BLOCK > 0) hadamard<BLOCK>(x, uint(lane));
  const Line line = quantize_group<8, GROUP / 8, BITS>(x);
  if (held && 8 * octet < PADDED) {
    write_octet<BITS>(codes + (int64_t(row) * (PADDED / 8) + octet) * BITS, x);
    if (octet % (GROUP / 8) == 0) {
      const int64_t at = int64_t(row) * (PADDED / GROUP) + octet / (GROUP / 8);
      scales[at] = static_cast<half>(line.x);
      biases[at] = static_cast<half>(line.y);
    }
  }
}
