  // What a threadgroup works on, and its queries as they meet rows: scaled, and turned where keys are kept turned.
  constexpr int OCTETS = (D > DV ? D : DV) / 8;
  constexpr int LPS = OCTETS <= 8 ? 8 : OCTETS <= 16 ? 16 : 32;
  constexpr int PAGED_KEYS = KEY_SCHEME == 2 ? 1 : 0;
  constexpr float LOG2E = 1.44269504088896340736f;
  const uint lane = thread_index_in_simdgroup;
  const uint simd = simdgroup_index_in_threadgroup;
  const uint item = threadgroup_position_in_grid.y;
  const int head = items[3 * item], first_tile = items[3 * item + 1], last_tile = items[3 * item + 2];
  const int row0 = int(threadgroup_position_in_grid.z) * ROWS;
  const int batch = head / KV_HEADS, kv_head = head % KV_HEADS;
  const int octet = int(lane) % LPS;
  const uint sub = lane / uint(LPS);
  const int count = numbers[0], newest = numbers[1], window = numbers[2], shift = numbers[3];
  const int R = numbers[6], NEW = numbers[7];  // query rows of a KV head; new tokens, which they are a multiple of
  const int stride = numbers[4], width = numbers[5];  // slots of a head in arrays of one per slot; pages of a head in ``table``
  const int frame = head * D;
  const float scale = factors[0], softcap = factors[1];
  const device uchar* key_bytes = reinterpret_cast<const device uchar*>(keys);
  const device uchar* value_bytes = reinterpret_cast<const device uchar*>(values);
  constexpr int KEY_ITEM = KEY_BITS == 0 ? int(sizeof(T)) : 4;
  constexpr int VALUE_ITEM = VALUE_BITS == 0 ? int(sizeof(T)) : 4;
  constexpr int PAGE = 32;

  threadgroup float shared_queries[ROWS * D];
  threadgroup float shared_lift[ROWS];
  if (simd == 0) {
    UNROLL for (int r = 0; r < ROWS; r++) {
      float x[8], raised = 0.0f;
      UNROLL for (int j = 0; j < 8; j++) {
        int channel = octet * 8 + j;
        bool there = channel < D && row0 + r < R;
        x[j] = there ? static_cast<float>(queries[(head * R + row0 + r) * D + channel]) * scale : 0.0f;
        if (FRAMED && !TURNED && there) {
          raised += x[j] * frame_offset[frame + channel];
          x[j] *= frame_scale[frame + channel];
        }
      }
      for (int step = 1; step < LPS; step *= 2) raised += simd_shuffle_xor(raised, ushort(step));
      if (KEY_HADAMARD > 0 && !TURNED) hadamard<KEY_HADAMARD>(x, lane);
      if (lane < uint(LPS) && octet * 8 < D) {
        UNROLL for (int j = 0; j < 8; j++) shared_queries[r * D + octet * 8 + j] = x[j];
      }
      if (lane == 0) shared_lift[r] = raised;
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);

  float q[ROWS][8];
  UNROLL for (int r = 0; r < ROWS; r++) {
    UNROLL for (int j = 0; j < 8; j++) q[r][j] = octet * 8 < D ? shared_queries[r * D + octet * 8 + j] : 0.0f;
  }

