// Threads of a threadgroup are fibers on one OS thread: each has a stack and runs until it waits for others.
#pragma once
#include <sys/mman.h>

#include <cstdint>
#include <cstdlib>

constexpr size_t STACK_BYTES = 1 << 16;

// Saves the callee-saved registers and the stack pointer of the running fiber, and continues another (System V x86-64).
extern "C" void msl_switch(void** save, void* resume);
__asm__(R"(
.text
.globl msl_switch
.hidden msl_switch
.type msl_switch,@function
msl_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size msl_switch,.-msl_switch
)");

inline char* map_stacks(size_t n) {
  void* stacks = mmap(nullptr, n * STACK_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (stacks == MAP_FAILED) abort();
  return (char*)stacks;
}
inline void unmap_stacks(char* stacks, size_t n) { munmap(stacks, n * STACK_BYTES); }

// The stack pointer of a fiber that starts with a call of main() when it is first resumed.
inline void* prepared_stack(char* stack, void (*main)()) {
  void** top = (void**)(((uintptr_t)stack + STACK_BYTES) & ~(uintptr_t)15);
  *--top = nullptr;  // main's return address: it never returns
  *--top = (void*)main;
  for (int i = 0; i < 6; i++) *--top = nullptr;
  return top;
}
