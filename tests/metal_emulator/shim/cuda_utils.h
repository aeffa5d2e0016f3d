// Stands in for MLX's mlx/backend/cuda/device/utils.cuh, which CPU builds of MLX do not ship: what a kernel may use of it.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda/std/array>
#include <cuda/std/limits>

#include "mlx/backend/cuda/device/config.h"

namespace mlx::core::cu {

using Shape = cuda::std::array<int32_t, MAX_NDIM>;
using Strides = cuda::std::array<int64_t, MAX_NDIM>;

template <typename I = int64_t>
inline __host__ __device__ I elem_to_loc(I element, const int* shape, const int64_t* strides, int ndim) {
  I location = 0;
  for (int i = ndim - 1; i >= 0 && element > 0; element /= shape[i--]) location += (element % shape[i]) * I(strides[i]);
  return location;
}

}  // namespace mlx::core::cu
