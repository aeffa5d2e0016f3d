// choose_slots: per head, the worst slots of the pool against the best of the tokens that come.
//   pool_scores, pool_positions (B, H, P)   scores, positions (B, H, n)   sizes: P, n
//   slots, replace (B, H, m), m = min(P, n)   order (B, H, n)
//   key = (score, position, index): unique; the lowest index wins where slots are empty alike
//   until all keys that begin with prefix are wanted: histogram of their next byte; prefix += the m-th least key's byte
//   sorted = sort(slots up to prefix, m of them), sort(tokens, best first)
//   slots, order = sorted's indices; replace[i] = token i's key > slot i's key
// A threadgroup owns a head. Its threads walk the slots side by side, once per byte, then sort in pairs (bitonic).

constexpr constant int KEY_BYTES = 12;

// An order key (mlx_kvprune/slots/choose.py) as unsigned words, x the more significant one; z is what it is the key of.
typedef uint3 Key;

inline Key key_of(uint high, uint low, uint at) {
  Key key;
  key.x = high;
  key.y = low;
  key.z = at;
  return key;
}

inline Key order_key(float score, int position, int at) {
  uint bits = as_type<uint>(score);
  if (bits == 0x80000000u) bits = 0u;  // the two zeros are equal
  uint high = (bits & 0x80000000u) != 0u ? ~bits : bits ^ 0x80000000u;  // IEEE 754: negative floats count backwards
  return key_of(position < 0 ? high - 1u : high, uint(position), uint(at));  // 64 bits: high * 2^32 + position
}

// The same for the other order: best first, still the lowest index first.
inline Key best_first(Key key) { return key_of(~key.x, ~key.y, key.z); }

inline bool precedes(Key a, Key b) {
  if (a.x != b.x) return a.x < b.x;
  return a.y != b.y ? a.y < b.y : a.z < b.z;
}

inline uint byte_of(Key key, int nth) {
  uint word = nth < 4 ? key.x : nth < 8 ? key.y : key.z;
  return word >> (24 - 8 * (nth % 4)) & 255u;
}

// The first bytes of a word, or of a key; zeros after them.
inline uint head_of_word(uint word, int bytes) {
  if (bytes <= 0) return 0u;
  return bytes >= 4 ? word : word & ~(0xFFFFFFFFu >> (8 * bytes));
}

inline Key head_of(Key key, int bytes) {
  return key_of(head_of_word(key.x, bytes), head_of_word(key.y, bytes - 4), head_of_word(key.z, bytes - 8));
}

inline Key with_byte(Key key, int nth, uint byte) {
  uint shifted = byte << (24 - 8 * (nth % 4));
  if (nth < 4) key.x |= shifted;
  else if (nth < 8) key.y |= shifted;
  else key.z |= shifted;
  return key;
}

inline bool same(Key a, Key b) { return a.x == b.x && a.y == b.y && a.z == b.z; }

// ---- body
const int thread_at = int(thread_position_in_threadgroup.x), n_threads = int(threads_per_threadgroup.x);
const int head = int(threadgroup_position_in_grid.x);
const int P = sizes[0], n = sizes[1], m = P < n ? P : n;
const device float* head_scores = pool_scores + int64_t(head) * P;
const device int* head_positions = pool_positions + int64_t(head) * P;

threadgroup Key sorted[2 * SIZE];         // the slots, then the tokens
threadgroup atomic<uint> histogram[256];  // of the next byte, of keys that begin with prefix
threadgroup atomic<uint> taken;
threadgroup uint found[3];                // the byte to go on with, how many are wanted and how many there are

// The m least keys: those less than prefix, and `wanted` of the `in_bucket` that begin with it; in the end that is all.
Key prefix = key_of(0u, 0u, 0u);
int bytes = 0;
uint wanted = uint(m), in_bucket = uint(P);
while (wanted != in_bucket && bytes < KEY_BYTES) {
  for (int i = thread_at; i < 256; i += n_threads) atomic_store_explicit(&histogram[i], 0u, memory_order_relaxed);
  threadgroup_barrier(mem_flags::mem_threadgroup);
  for (int s = thread_at; s < P; s += n_threads) {
    const Key key = order_key(head_scores[s], head_positions[s], s);
    if (same(head_of(key, bytes), prefix))
      atomic_fetch_add_explicit(&histogram[byte_of(key, bytes)], 1u, memory_order_relaxed);
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  if (simdgroup_index_in_threadgroup == 0) {
    const int lane = int(thread_index_in_simdgroup);
    uint mine = 0u;
    for (int i = 8 * lane; i < 8 * lane + 8; i++) mine += atomic_load_explicit(&histogram[i], memory_order_relaxed);
    uint below = simd_prefix_exclusive_sum(mine);
    for (int i = 8 * lane; i < 8 * lane + 8; i++) {
      const uint count = atomic_load_explicit(&histogram[i], memory_order_relaxed);
      if (below < wanted && wanted <= below + count) {  // of one byte only
        found[0] = uint(i);
        found[1] = wanted - below;
        found[2] = count;
      }
      below += count;
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  prefix = with_byte(prefix, bytes, found[0]);
  wanted = found[1];
  in_bucket = found[2];
  bytes++;
}

for (int i = thread_at; i < 2 * SIZE; i += n_threads) {
  Key key = key_of(0xFFFFFFFFu, 0xFFFFFFFFu, 0xFFFFFFFFu);  // after all others
  const int token = i - SIZE;
  if (token >= 0 && token < n) {
    const int64_t at = int64_t(head) * n + token;
    key = best_first(order_key(scores[at], positions[at], token));
  }
  sorted[i] = key;
}
if (thread_at == 0) atomic_store_explicit(&taken, 0u, memory_order_relaxed);
threadgroup_barrier(mem_flags::mem_threadgroup);
for (int s = thread_at; s < P; s += n_threads) {
  const Key key = order_key(head_scores[s], head_positions[s], s);
  if (!precedes(prefix, head_of(key, bytes))) sorted[atomic_fetch_add_explicit(&taken, 1u, memory_order_relaxed)] = key;
}
threadgroup_barrier(mem_flags::mem_threadgroup);

for (int run = 2; run <= SIZE; run *= 2) {
  for (int step = run / 2; step > 0; step /= 2) {
    for (int pair = thread_at; pair < SIZE; pair += n_threads) {
      const int i = pair / step * 2 * step + pair % step;
      const bool falling = (i & run & (SIZE - 1)) != 0;
      const Key a = sorted[i], b = sorted[i + step];
      if (precedes(b, a) != falling) {
        sorted[i] = b;
        sorted[i + step] = a;
      }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
  }
}

for (int i = thread_at; i < n; i += n_threads) {
  const Key token = sorted[SIZE + i];
  order[int64_t(head) * n + i] = token.z;
  if (i < m) {
    const Key slot = sorted[i], key = best_first(token);
    const int64_t at = int64_t(head) * m + i;
    slots[at] = slot.z;
    replace[at] = key.x != slot.x ? key.x > slot.x : key.y > slot.y;
  }
}
