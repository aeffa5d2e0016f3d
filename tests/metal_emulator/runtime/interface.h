// What compiled kernels, the runtime and Python share. Python's side is launch.py.
#pragma once
#include <cstddef>
#include <cstdint>

// Thread attributes, in the order of wrapper.ATTRIBUTES: vectors of three, then single numbers.
struct msl_ids {
  uint32_t vectors[9][4];
  uint32_t numbers[11];
};

// What the lanes of a simdgroup hand to each other in one simd operation.
struct msl_exchange {
  alignas(64) unsigned char value[32][64];
  alignas(64) unsigned char result[64];  // of a reduction: the first lane to run computes it for all
  uint32_t active;                       // a bit per lane that took part
  uint32_t has_result;
};

extern "C" {
msl_exchange* msl_simd_exchange(const void* value, uint32_t size, int operation, int line);
uint32_t msl_lane();
void msl_barrier(uint32_t memory, int line);
void msl_simd_barrier(uint32_t memory, int line);
void* msl_threadgroup_memory(int site, uint64_t nbytes, uint32_t cell, const char* name);
void msl_atomic_access(void* address, uint32_t nbytes, int is_write);
void msl_fail(int line, uint64_t pc, const char* format, ...);
}
