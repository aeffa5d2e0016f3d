// What the compiler calls in check mode: g++ instruments with -fsanitize=thread and -fsanitize=<undefined behaviour>,
// but the callbacks are ours, not those of its run-time libraries.
#pragma once
#include "shadow.h"

#define CALLER ((uint64_t)__builtin_return_address(0))

extern "C" {

void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}

#define ACCESSES(n)                                                                        \
  void __tsan_read##n(void* a) { check_access(a, n, false, false, CALLER); }               \
  void __tsan_write##n(void* a) { check_access(a, n, true, false, CALLER); }               \
  void __tsan_unaligned_read##n(void* a) { check_access(a, n, false, false, CALLER); }     \
  void __tsan_unaligned_write##n(void* a) { check_access(a, n, true, false, CALLER); }     \
  void __tsan_volatile_read##n(void* a) { check_access(a, n, false, false, CALLER); }      \
  void __tsan_volatile_write##n(void* a) { check_access(a, n, true, false, CALLER); }
ACCESSES(1) ACCESSES(2) ACCESSES(4) ACCESSES(8) ACCESSES(16)
#undef ACCESSES

void __tsan_read_range(void* a, uint64_t n) { check_access(a, n, false, false, CALLER); }
void __tsan_write_range(void* a, uint64_t n) { check_access(a, n, true, false, CALLER); }
void* __tsan_memcpy(void* to, const void* from, uint64_t n) {
  check_access((void*)from, n, false, false, CALLER);
  check_access(to, n, true, false, CALLER);
  return memcpy(to, from, n);
}
void* __tsan_memmove(void* to, const void* from, uint64_t n) {
  check_access((void*)from, n, false, false, CALLER);
  check_access(to, n, true, false, CALLER);
  return memmove(to, from, n);
}
void* __tsan_memset(void* to, int value, uint64_t n) {
  check_access(to, n, true, false, CALLER);
  return memset(to, value, n);
}
void msl_atomic_access(void* a, uint32_t n, int is_write) { check_access(a, n, is_write, true, CALLER); }

void __ubsan_handle_type_mismatch_v1(void*, void* address) {
  msl_fail(0, CALLER, address ? "misaligned: access at an address that its type does not allow" : "undefined: access through a null pointer");
}
#define UNDEFINED(handler, what) \
  void __ubsan_handle_##handler(...) { msl_fail(0, CALLER, "undefined: " what); }
UNDEFINED(out_of_bounds, "index outside an array")
UNDEFINED(add_overflow, "signed addition overflows")
UNDEFINED(sub_overflow, "signed subtraction overflows")
UNDEFINED(mul_overflow, "signed multiplication overflows")
UNDEFINED(negate_overflow, "negation overflows")
UNDEFINED(divrem_overflow, "integer division by zero")
UNDEFINED(shift_out_of_bounds, "shift by a negative number or by the width and more")
UNDEFINED(float_cast_overflow, "conversion of a float outside the integer's range")
UNDEFINED(load_invalid_value, "bool that is neither true nor false")
#undef UNDEFINED

}  // extern "C"
