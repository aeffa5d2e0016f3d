// Runs a compiled kernel over a grid: one threadgroup after the other, its threads as fibers.
#include <algorithm>

#include "scheduler.h"
#ifdef MSL_CHECK
#include "callbacks.h"
#else
extern "C" void msl_atomic_access(void*, uint32_t, int) {}
void forget_threadgroup_regions() {}
void add_threadgroup_region(void*, uint64_t, uint32_t, const char*) {}
static void make_buffer_regions() {}
static void finish_buffer_regions() {}
#endif

struct Size {
  uint32_t v[3];
  uint32_t count() const { return v[0] * v[1] * v[2]; }
  Size place(uint32_t i) const { return {i % v[0], i / v[0] % v[1], i / (v[0] * v[1])}; }
};

static void set_ids(msl_ids& ids, const Size& grid, const Size& full, const Size& groups, const Size& group, const Size& size, uint32_t t) {
  Size local = size.place(t);
  for (int i = 0; i < 3; i++) {
    uint32_t values[9] = {group.v[i] * full.v[i] + local.v[i], local.v[i], group.v[i], groups.v[i], grid.v[i], size.v[i], full.v[i], 0, grid.v[i]};
    for (int k = 0; k < 9; k++) ids.vectors[k][i] = values[k];
  }
  uint32_t n = size.count(), n_full = full.count();
  uint32_t numbers[11] = {t, t % LANES, t / LANES, (n + 31) / LANES, (n_full + 31) / LANES, LANES, LANES, t % 4, t / 4, (n + 3) / 4, (n_full + 3) / 4};
  memcpy(ids.numbers, numbers, sizeof numbers);
}

// Threadgroups at the end of a grid are smaller where the grid is no multiple of the threadgroup, as in dispatchThreads.
static void start_threadgroup(uint32_t index, const Size& grid, const Size& full, const Size& groups) {
  Size group = groups.place(index), size;
  for (int i = 0; i < 3; i++) size.v[i] = std::min(full.v[i], grid.v[i] - group.v[i] * full.v[i]);
  threadgroup_index = index;
  n_threads = n_live = size.count();
  n_at_barrier = 0;
  ready.clear();
  next_ready = 0;
  simdgroups.assign((n_threads + LANES - 1) / LANES, SimdGroup());
  for (uint32_t t = 0; t < n_threads; t++) {
    Thread& thread = threads[t];
    SimdGroup& simdgroup = simdgroups[t / LANES];
    thread.state = State::READY;
    thread.index = t;
    thread.lane = t % LANES;
    thread.id = index * MAX_THREADS + t;
    thread.simdgroup = &simdgroup;
    for (int m = 0; m < N_MEMORIES; m++) thread.barriers[m] = thread.simd_barriers[m] = 1;
    thread.stack_pointer = prepared_stack(thread.stack, thread_main);
    simdgroup.lanes[thread.lane] = &thread;
    simdgroup.n_lanes++;
    simdgroup.n_live++;
    set_ids(thread.ids, grid, full, groups, group, size, t);
    ready.push_back(&thread);
  }
}

static std::vector<uint32_t> order_of_threadgroups(uint32_t n) {
  std::vector<uint32_t> order(n);
  for (uint32_t i = 0; i < n; i++) order[i] = i;
  if (launch->schedule == REVERSE) std::reverse(order.begin(), order.end());
  if (launch->schedule == RANDOM)
    for (uint32_t i = n; i > 1; i--) std::swap(order[i - 1], order[random_below(i)]);
  return order;
}

// Returns 0, or 1 with a message in `l`.
extern "C" int msl_launch(void (*entry)(void**, const msl_ids*), Launch* l) {
  launch = l;
  kernel_entry = entry;
  failed = false;
  current = nullptr;
  random_state = l->seed * 2654435761u + 88172645463325252ull;
  Size grid, full, groups;
  for (int i = 0; i < 3; i++) {
    grid.v[i] = l->grid[i];
    full.v[i] = std::min(l->threadgroup[i], l->grid[i]);
    groups.v[i] = (grid.v[i] + full.v[i] - 1) / full.v[i];
  }
  char* stacks = map_stacks(full.count());
  threads.assign(full.count(), Thread());
  for (uint32_t t = 0; t < full.count(); t++) threads[t].stack = stacks + t * STACK_BYTES;
  make_buffer_regions();
  for (uint32_t index : order_of_threadgroups(groups.count())) {
    start_threadgroup(index, grid, full, groups);
    run_threadgroup();
    if (failed) break;
  }
  finish_buffer_regions();
  unmap_stacks(stacks, full.count());  // a process may load hundreds of kernels
  return failed;
}
