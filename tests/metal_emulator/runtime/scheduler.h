// Who runs next. Barriers and simd operations are the only places where one thread gives way to another.
#pragma once
#include "state.h"

static void resume(Thread* thread, void** save) {
  launch->n_switches++;
  current = thread;
  msl_switch(save, thread->stack_pointer);
}

static void back_to_scheduler(Thread* thread) {
  current = nullptr;
  msl_switch(&thread->stack_pointer, scheduler_stack);
}

static Thread* take_ready() {
  if (next_ready == ready.size()) return nullptr;
  if (launch->schedule == RANDOM) std::swap(ready[next_ready], ready[next_ready + random_below(ready.size() - next_ready)]);
  Thread* thread = launch->schedule == REVERSE ? ready.back() : ready[next_ready];
  if (launch->schedule == REVERSE) ready.pop_back();
  else next_ready++;
  if (next_ready == ready.size()) {
    ready.clear();
    next_ready = 0;
  }
  return thread;
}

// The current thread waits: the next ready one runs, or else the scheduler looks at what all of them wait for.
static void give_way() {
  Thread* me = current;
  Thread* next = take_ready();
  if (next == me) return;
  if (next) resume(next, &me->stack_pointer);
  else back_to_scheduler(me);
  current = me;
}

// Ends the launch. Called by a thread it does not return: the thread is left where it is.
extern "C" __attribute__((noinline)) void msl_fail(int line, uint64_t pc, const char* format, ...) {
  if (!failed) {
    failed = true;
    va_list arguments;
    va_start(arguments, format);
    int n = vsnprintf(launch->message, launch->message_size, format, arguments);
    va_end(arguments);
    if (current && n < (int)launch->message_size)
      snprintf(launch->message + n, launch->message_size - n, " [threadgroup %u, thread %u]", threadgroup_index, current->index);
    launch->message_pc = pc;
    launch->message_line = line;
  }
  if (current) back_to_scheduler(current);
}

// What the threads wait for, for a message.
static std::string waiting() {
  std::map<std::string, int> counts;
  for (uint32_t i = 0; i < n_threads; i++) {
    const Thread& t = threads[i];
    std::string what = t.state == State::FINISHED     ? "finished"
                       : t.state == State::AT_BARRIER ? "at threadgroup_barrier, line " + std::to_string(t.line)
                                                      : "at a simd operation, line " + std::to_string(t.line);
    counts[what]++;
  }
  std::string all;
  for (auto& [what, n] : counts) all += (all.empty() ? "" : "; ") + std::to_string(n) + " threads " + what;
  return all;
}

// ---- simd operations

// Lets a simdgroup go on if all its live lanes have arrived at the same operation.
static void complete_simd_operation(SimdGroup* group, Thread* running) {
  if (group->n_arrived == 0 || group->n_arrived != group->n_live) return;
  Thread* first = nullptr;
  for (Thread* t : group->lanes) {
    if (!t || t->state == State::FINISHED) continue;
    if (!first) first = t;
    if (t->operation != first->operation || t->line != first->line) return;  // the scheduler will report this
  }
  if (group->n_live != group->n_lanes) {
    if (running)
      msl_fail(first->line, 0, "divergence: simd operation reached by %u of %u lanes, the others have finished", group->n_live, group->n_lanes);
    return;
  }
  msl_exchange& exchange = group->exchange;
  exchange.active = exchange.has_result = 0;
  for (Thread* t : group->lanes) {
    if (!t) continue;
    memcpy(exchange.value[t->lane], t->value, t->value_size);
    exchange.active |= 1u << t->lane;
    t->state = State::READY;
    if (t != running) ready.push_back(t);
  }
  group->n_arrived = 0;
}

extern "C" __attribute__((noinline)) msl_exchange* msl_simd_exchange(const void* value, uint32_t size, int operation, int line) {
  Thread* me = current;
  launch->n_simd_ops++;
  if (size > sizeof me->value) msl_fail(line, 0, "unsupported: simd operation on a value of %u bytes", size);
  memcpy(me->value, value, size);
  me->value_size = size;
  me->operation = operation;
  me->line = line;
  me->state = State::IN_SIMD_OP;
  me->simdgroup->n_arrived++;
  complete_simd_operation(me->simdgroup, me);
  if (me->state != State::READY) give_way();
  return &me->simdgroup->exchange;
}

extern "C" uint32_t msl_lane() { return current->lane; }

extern "C" void msl_simd_barrier(uint32_t memory, int line) {
  const int SIMD_BARRIER = 1000;
  char nothing = 0;
  msl_simd_exchange(&nothing, 1, SIMD_BARRIER, line);
  for (int m = 0; m < N_MEMORIES; m++)
    if (memory >> m & 1) current->simd_barriers[m]++;
}

// ---- threadgroup barriers and memory

extern "C" __attribute__((noinline)) void msl_barrier(uint32_t memory, int line) {
  launch->n_barriers++;
  current->state = State::AT_BARRIER;
  current->line = line;
  current->memory = memory;
  n_at_barrier++;
  give_way();
}

static bool complete_barrier() {
  if (n_at_barrier == 0 || n_at_barrier != n_live) return false;
  Thread* first = nullptr;
  bool same = n_live == n_threads;
  for (uint32_t i = 0; i < n_threads; i++) {
    Thread* t = &threads[i];
    if (t->state != State::AT_BARRIER) continue;
    if (!first) first = t;
    same = same && t->line == first->line && t->memory == first->memory;
  }
  if (!same) {
    msl_fail(first->line, 0, "divergence: threadgroup_barrier not reached by all threads: %s", waiting().c_str());
    return false;
  }
  uint32_t memory = first->memory;
  for (uint32_t i = 0; i < n_threads; i++) {
    Thread* t = &threads[i];
    t->state = State::READY;
    ready.push_back(t);
    for (int m = 0; m < N_MEMORIES; m++) {
      if (!(memory >> m & 1)) continue;
      t->barriers[m]++;
      t->simd_barriers[m]++;
    }
  }
  n_at_barrier = 0;
  return true;
}

extern "C" __attribute__((noinline)) void* msl_threadgroup_memory(int site, uint64_t nbytes, uint32_t cell, const char* name) {
  auto known = shared_memory.find(site);
  if (known != shared_memory.end()) return known->second.data;
  shared_nbytes += (nbytes + 15) & ~15ull;
  if (shared_nbytes > launch->threadgroup_nbytes) launch->threadgroup_nbytes = shared_nbytes;
  if (shared_nbytes > MAX_THREADGROUP_BYTES)
    msl_fail(0, (uint64_t)__builtin_return_address(0), "limit: '%s' brings threadgroup memory to %llu bytes, of %u", name, (unsigned long long)shared_nbytes, MAX_THREADGROUP_BYTES);
  void* data = nullptr;
  if (posix_memalign(&data, 64, nbytes + 4096)) abort();
  memset(data, 0xFF, nbytes);
  shared_memory[site] = {data, nbytes};
  add_threadgroup_region(data, nbytes, cell, name);
  return data;
}

static void free_threadgroup_memory() {
  forget_threadgroup_regions();
  for (auto& [site, memory] : shared_memory) free(memory.data);
  shared_memory.clear();
  shared_nbytes = 0;
}

// ---- one threadgroup from its first thread to its last

static void thread_main() {
  kernel_entry(launch->arguments, &current->ids);
  Thread* me = current;
  me->state = State::FINISHED;
  n_live--;
  me->simdgroup->n_live--;
  complete_simd_operation(me->simdgroup, nullptr);
  give_way();
  abort();
}

// Nobody can run, and it is not that all wait at one barrier: some lanes wait for others that are elsewhere.
static void report_divergence() {
  int line = 0;
  for (uint32_t i = 0; i < n_threads && !line; i++)
    if (threads[i].state == State::IN_SIMD_OP) line = threads[i].line;
  msl_fail(line, 0, "divergence: %s", waiting().c_str());
}

static void run_threadgroup() {
  while (!failed && n_live) {
    if (Thread* next = take_ready()) resume(next, &scheduler_stack);
    else if (!complete_barrier()) report_divergence();
  }
  free_threadgroup_memory();
}
