// merge_slots: put together what attend_slots found on stretches of slots, and divide.
//   mixed_i (n_i, R, D_v), stats_i (n_i, R, 2): float32, of up to three kinds of slots     sinks (H_q,): logits, float32
//   firsts_i (B * H_kv + 1,): first item of each head, items lie head by head
//   out (B, H_kv, R, D_v) T     totals (B * H_kv, R, 2) float32: peak and sum of each row, to the base of two
//
//   m = max of the peaks;  out = sum(mixed * 2^(peak - m)) / (sum(l * 2^(peak - m)) + 2^(sink - m))
//
// A thread owns one output: grid x counts channels, grid y rows. A head without any slot gives zeros.

inline float peak_of(const device float* stats, int first, int last, int rows, int row, float peak) {
  for (int i = first; i < last; i++) peak = max(peak, stats[(i * rows + row) * 2]);
  return peak;
}

inline void add_part(
    const device float* mixed, const device float* stats, int first, int last, int rows, int row, int channel, int width, float base,
    thread float& sum, thread float& total) {
  for (int i = first; i < last; i++) {
    float share = exp2(stats[(i * rows + row) * 2] - base);
    total += stats[(i * rows + row) * 2 + 1] * share;
    sum += mixed[(i * rows + row) * width + channel] * share;
  }
}
// ---- body
  const int R = numbers[0], NEW = numbers[1];  // query rows of a KV head; new tokens
  const int channel = int(thread_position_in_grid.x), at = int(thread_position_in_grid.y);
  const int head = at / R, row = at % R;
  float peak = -INFINITY;
  if (SINKS) peak = sinks[(head % KV_HEADS) * (R / NEW) + row / NEW] * 1.44269504088896340736f;
  float sink = peak;
  peak = peak_of(stats0, firsts0[head], firsts0[head + 1], R, row, peak);
  if (PARTS > 1) peak = peak_of(stats1, firsts1[head], firsts1[head + 1], R, row, peak);
  if (PARTS > 2) peak = peak_of(stats2, firsts2[head], firsts2[head + 1], R, row, peak);
  float base = peak == -INFINITY ? 0.0f : peak, sum = 0.0f, total = SINKS ? exp2(sink - base) : 0.0f;
  add_part(mixed0, stats0, firsts0[head], firsts0[head + 1], R, row, channel, DV, base, sum, total);
  if (PARTS > 1) add_part(mixed1, stats1, firsts1[head], firsts1[head + 1], R, row, channel, DV, base, sum, total);
  if (PARTS > 2) add_part(mixed2, stats2, firsts2[head], firsts2[head + 1], R, row, channel, DV, base, sum, total);
  out[at * DV + channel] = static_cast<T>(total > 0.0f ? sum / total : 0.0f);
  if (channel == 0) {
    totals[2 * at] = base;
    totals[2 * at + 1] = total;
  }
