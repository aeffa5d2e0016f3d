// attend_slots: the queries of a KV head attend to a stretch of the slots it holds, where they lie.
//   queries (B, H_kv, R, D), R = query heads of a KV head x new tokens     keys, values: rows of T or packed codes
//   items (n, 3): head, first tile, one past the last     mixed (n, R, D_v), stats (n, R, 2): float32, for merge_slots
//
//   for each tile of 32 slots:  x = q . key(slot) [+ gate];  (m, l) = online_softmax(x);  o = o * alpha + p . value(slot)
//   mixed = o, stats = (m, l): not yet divided, so that stretches can be merged exactly
//
// A threadgroup takes one item and up to ROWS rows (grid z counts further ones); its SIMD groups take every SIMDS-th tile.
// In a tile a lane owns one slot's logits. Rows of keys and values are read by LPS lanes at a time, eight values (an octet)
// each: lane = sub * LPS + octet reads, at turn i, slot sub * LPS + i. Each byte of a row is read once for all query rows.
// Logits are to the base of two. Nothing is read of slots that are empty or masked out.

#include "slots.metal"
// ---- body
#include "slots_queries.metal"
  threadgroup float shared_out[SIMDS * DV];
  threadgroup float shared_stats[SIMDS * ROWS * 2];
  float o[ROWS][8], m[ROWS], l[ROWS];
  UNROLL for (int r = 0; r < ROWS; r++) {
    m[r] = -INFINITY;
    l[r] = 0.0f;
    UNROLL for (int j = 0; j < 8; j++) o[r][j] = 0.0f;
  }

  for (int tile = first_tile + int(simd); tile < last_tile; tile += SIMDS) {
#include "slots_logits.metal"

    // -- the softmax so far
    UNROLL for (int r = 0; r < ROWS; r++) {
      float peak = max(m[r], simd_max(x[r]));
      float base = peak == -INFINITY ? 0.0f : peak;
      float alpha = exp2(m[r] - base);
      float p = exp2(x[r] - base);
      m[r] = peak;
      l[r] = l[r] * alpha + p;
      x[r] = p;
      UNROLL for (int j = 0; j < 8; j++) o[r][j] *= alpha;
    }

    // -- values
    for (int i = 0; i < LPS; i++) {
      int there = int(sub) * LPS + i, at = PAGED ? there : tile * PAGE + there;
      float v[8];
      UNROLL for (int j = 0; j < 8; j++) v[j] = 0.0f;
      if ((alive >> uint(there) & 1) != 0) {
        read_row<T, VALUE_BITS, VALUE_GROUP, DV>(
            value_bytes + (value_base + at * value_row) * VALUE_ITEM, value_scales + value_scale_base + at * value_scale_row,
            value_biases + value_scale_base + at * value_scale_row, octet, v);
      }
      UNROLL for (int r = 0; r < ROWS; r++) {
        float p = simd_shuffle(x[r], ushort(there));
        UNROLL for (int j = 0; j < 8; j++) o[r][j] += p * v[j];
      }
    }
  }

  // -- lanes, then SIMD groups, put together what they have
  UNROLL for (int r = 0; r < ROWS; r++) {
    l[r] = simd_sum(l[r]);
    for (int step = LPS; step < 32; step *= 2) {
      UNROLL for (int j = 0; j < 8; j++) o[r][j] += simd_shuffle_xor(o[r][j], ushort(step));
    }
    if (VALUE_HADAMARD > 0) hadamard<VALUE_HADAMARD>(o[r], lane);
    if (lane == 0) {
      shared_stats[(simd * ROWS + uint(r)) * 2] = m[r];
      shared_stats[(simd * ROWS + uint(r)) * 2 + 1] = l[r];
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  UNROLL for (int r = 0; r < ROWS; r++) {
    float peak = -INFINITY, total = 0.0f;
    for (int s = 0; s < SIMDS; s++) peak = max(peak, shared_stats[(s * ROWS + r) * 2]);
    float base = peak == -INFINITY ? 0.0f : peak;
    for (int s = 0; s < SIMDS; s++) {
      total += exp2(shared_stats[(s * ROWS + r) * 2] - base) * shared_stats[(s * ROWS + r) * 2 + 1];
    }
    float own = exp2(m[r] - base);
    if (lane < uint(LPS) && octet * 8 < DV) {
      UNROLL for (int j = 0; j < 8; j++) shared_out[simd * DV + uint(octet * 8 + j)] = o[r][j] * own;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    if (row0 + r < R) {
      int row = int(item) * R + row0 + r;
      for (int c = int(thread_index_in_threadgroup); c < DV; c += SIMDS * 32) {
        float sum = 0.0f;
        for (int s = 0; s < SIMDS; s++) sum += shared_out[s * DV + c];
        mixed[row * DV + c] = sum;
      }
      if (thread_index_in_threadgroup == 0) {
        stats[2 * row] = peak;
        stats[2 * row + 1] = total;
      }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
  }
