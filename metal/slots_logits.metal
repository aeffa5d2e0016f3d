    // Logits of a tile: x[r] of the lane's own slot, to the base of two; minus infinity where it may not be seen.
    // -- where the tile lies, and which of its slots may be seen
    int page = PAGED ? table[head * width + tile] : tile;
    int slot = PAGED ? int(lane) : tile * PAGE + int(lane);  // its row, counted from ``base``
    int64_t key_base = PAGED ? page * keys_strides[0] : batch * keys_strides[0] + kv_head * keys_strides[1];
    int64_t value_base = PAGED ? page * values_strides[0] : batch * values_strides[0] + kv_head * values_strides[1];
    int64_t key_row = keys_strides[PAGED ? 1 : 2], value_row = values_strides[PAGED ? 1 : 2];
    int64_t scale_base = 0, scale_row = 0, value_scale_base = 0, value_scale_row = 0;
    if (KEY_BITS > 0) {
      scale_base = PAGED ? page * key_scales_strides[0] : batch * key_scales_strides[0] + kv_head * key_scales_strides[1];
      scale_row = key_scales_strides[PAGED ? 1 : 2];
    }
    if (VALUE_BITS > 0) {
      value_scale_base =
          PAGED ? page * value_scales_strides[0] : batch * value_scales_strides[0] + kv_head * value_scales_strides[1];
      value_scale_row = value_scales_strides[PAGED ? 1 : 2];
    }
    int64_t slot_at = PAGED ? int64_t(page) * PAGE + int(lane) : int64_t(head) * stride + slot;  // in arrays of one per slot
    bool seen = PAGED ? true : slot < count;
    if (MASKED && seen) seen = mask[slot_at];
    uint alive = uint(ulong(simd_vote::vote_t(simd_ballot(seen))));
    if (alive == 0) continue;

    // -- logits: lane's slot, every row
    float x[ROWS];
    UNROLL for (int r = 0; r < ROWS; r++) x[r] = 0.0f;
    if (PAGED_KEYS) {
      int64_t granule = PAGED ? 0 : tile;
      const device uint* words = reinterpret_cast<const device uint*>(key_bytes + (key_base + granule * key_row) * KEY_ITEM);
      const device half* scales = key_scales + scale_base + granule * scale_row;
      const device half* biases = key_biases + scale_base + granule * scale_row;
      for (int channel = 0; channel < D; channel++) {
        float k = page_code<KEY_BITS>(words, channel, lane) * float(scales[channel]) + float(biases[channel]);
        UNROLL for (int r = 0; r < ROWS; r++) x[r] += shared_queries[r * D + channel] * k;
      }
    } else {
      for (int i = 0; i < LPS; i++) {
        int there = int(sub) * LPS + i, at = PAGED ? there : tile * PAGE + there;
        bool reads = (alive >> uint(there) & 1) != 0;
        float k[8];
        UNROLL for (int j = 0; j < 8; j++) k[j] = 0.0f;
        if (reads) {
          read_row<T, KEY_BITS, KEY_GROUP, D>(
              key_bytes + (key_base + at * key_row) * KEY_ITEM, key_scales + scale_base + at * scale_row,
              key_biases + scale_base + at * scale_row, octet, k);
        }
        if (TURNED) {
          if (KEY_HADAMARD > 0) hadamard<KEY_HADAMARD>(k, lane);
          if (FRAMED) {
            UNROLL for (int j = 0; j < 8; j++) {
              int channel = frame + (octet * 8 < D ? octet * 8 + j : 0);
              k[j] = k[j] * frame_scale[channel] + frame_offset[channel];
            }
          }
          int64_t one = PAGED ? int64_t(page) * PAGE + there : int64_t(head) * stride + at;
          int turn = reads ? (ranks[one] + shift) * DIMS : 0;
          rotate_row<DIMS, NEIGHBOURS>(k, cosines + turn, sines + turn, octet, lane);
        }
        UNROLL for (int r = 0; r < ROWS; r++) {
          float product = 0.0f;
          UNROLL for (int j = 0; j < 8; j++) product += q[r][j] * k[j];
          for (int step = 1; step < LPS; step *= 2) product += simd_shuffle_xor(product, ushort(step));
          if (octet == i) x[r] = product;
        }
      }
    }

    // -- gates, and what may not be seen
    float gate = 0.0f, decay = 0.0f;
    int position = 0;
    if (GATED && seen) gate = gates[slot_at];
    if (DECAYED && seen) decay = decays[slot_at];
    if ((DECAYED || WINDOWED) && seen) position = positions[slot_at];
    UNROLL for (int r = 0; r < ROWS; r++) {
      int token = (row0 + r) % NEW;  // of the new ones; the last of them is the newest
      int age = newest - (NEW - 1 - token) - position;
      float logit = x[r] + shared_lift[r];
      if (SOFTCAP) logit = softcap * tanh(logit / softcap);
      logit = (logit + gate + float(age) * decay) * LOG2E;
      bool visible = seen && row0 + r < R;
      if (CAUSAL) visible = visible && slot <= count - NEW + token;
      if (WINDOWED) visible = visible && age < window;
      x[r] = visible ? logit : -INFINITY;
    }
