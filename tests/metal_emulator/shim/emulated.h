// Metal Shading Language for g++: everything that a kernel's text may name. Comes first in every compiled kernel.
#pragma once
#include "types.h"

#include "msl/vector.h"
#include "msl/math.h"

#include "simd.h"
#include "atomics.h"
#include "matrix.h"
#include "entry.h"

#define METAL_FUNC inline __attribute__((always_inline))
#define __METAL_VERSION__ 310
#define __METAL__ 1

// Address spaces vanish; declarations of `threadgroup` variables were rewritten before (compiler.py). `constant` must not
// become const: a pointer to constant is a type, and `const constant` occurs.
#define kernel
#define device
#define constant
#define thread
#define threadgroup
