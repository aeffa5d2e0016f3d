// The state of one launch. A compiled kernel holds its own copy of the runtime, so one launch runs at a time.
#pragma once
#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "fiber.h"
#include "interface.h"

// ---- shared with Python

enum : uint32_t { WRITABLE = 1, STARTS_UNWRITTEN = 2 };
struct Buffer {
  char* data;
  uint64_t nbytes;
  uint32_t cell;   // bytes of one element: the unit of race and initialisation checks
  uint32_t flags;
  const char* name;
  uint64_t unwritten;  // elements; this and the rest are filled in by check mode
  uint64_t read_bytes, read_once_bytes, read_simd_bytes, written_bytes;
};
enum : uint32_t { FORWARD, REVERSE, RANDOM };
struct Launch {
  uint32_t grid[3], threadgroup[3];
  uint32_t schedule, n_buffers;
  uint64_t seed;
  Buffer* buffers;
  void** arguments;
  char* message;  // filled in where the launch fails
  uint64_t message_size, message_pc;
  int64_t message_line;
  uint64_t n_switches, n_simd_ops, n_barriers, threadgroup_nbytes;
};

// ---- threads

constexpr uint32_t LANES = 32, MAX_THREADS = 1024, MAX_THREADGROUP_BYTES = 32768;
enum { DEVICE = 0, THREADGROUP = 1, N_MEMORIES = 2 };  // bit i of mem_flags is memory i
enum class State { READY, IN_SIMD_OP, AT_BARRIER, FINISHED };

struct SimdGroup;
struct Thread {
  void* stack_pointer;
  char* stack;
  State state;
  int operation, line;   // what it waits at
  uint32_t memory;       // flags of the barrier it waits at
  SimdGroup* simdgroup;
  uint32_t index, lane;  // in the threadgroup, in the simdgroup
  uint32_t id;           // over the whole grid: threadgroup * MAX_THREADS + index
  uint32_t barriers[N_MEMORIES], simd_barriers[N_MEMORIES];  // passed so far, by the memory that they order
  uint32_t value_size;
  alignas(64) unsigned char value[64];  // handed to the simd operation
  msl_ids ids;
};
struct SimdGroup {
  uint32_t n_lanes, n_live, n_arrived;
  Thread* lanes[LANES];
  msl_exchange exchange;
};

struct SharedMemory {
  void* data;
  uint64_t nbytes;
};

namespace {
Launch* launch;
void (*kernel_entry)(void**, const msl_ids*);
std::vector<Thread> threads;
std::vector<SimdGroup> simdgroups;
std::vector<Thread*> ready;
size_t next_ready;
Thread* current;            // null while the scheduler runs
void* scheduler_stack;      // its stack pointer while a thread runs
uint32_t n_threads, n_live, n_at_barrier, threadgroup_index;
std::map<int, SharedMemory> shared_memory;  // by the place of its declaration
uint64_t shared_nbytes;
bool failed;
uint64_t random_state;

uint64_t random_below(uint64_t n) {
  random_state ^= random_state << 13;
  random_state ^= random_state >> 7;
  random_state ^= random_state << 17;
  return random_state % n;
}
}  // namespace

void forget_threadgroup_regions();
void add_threadgroup_region(void* data, uint64_t nbytes, uint32_t cell, const char* name);
