// slot_mass: how much the queries of a KV head attend to each slot it holds, once their softmax is known.
//   inputs as of attend_slots, and totals (B * H_kv, R, 2) float32: the peaks and sums of merge_slots
//   mass: float32, one number a slot: (B * H_kv, S), or (P, 32) of pages; zero where a slot is empty
//
//   mass(slot) = sum over rows r of 2^(x_r - peak_r) / sum_r
//
// Keys are read a second time; the weights of single rows are never written. What a thread owns: see attend_slots. All
// rows must fit into one threadgroup (R = ROWS).

#include "slots.metal"
// ---- body
#include "slots_queries.metal"
  for (int tile = first_tile + int(simd); tile < last_tile; tile += SIMDS) {
    int64_t own = PAGED ? int64_t(table[head * width + tile]) * 32 + int(lane) : int64_t(head) * stride + tile * 32 + int(lane);
    if (PAGED || tile * 32 + int(lane) < count) mass[own] = 0.0f;
#include "slots_logits.metal"
    float sum = 0.0f;
    UNROLL for (int r = 0; r < ROWS; r++) {
      int row = (head * R + row0 + r) * 2;
      if (row0 + r < R && x[r] != -INFINITY) sum += exp2(x[r] - totals[row]) / totals[row + 1];
    }
    if (seen) mass[own] = sum;
  }
