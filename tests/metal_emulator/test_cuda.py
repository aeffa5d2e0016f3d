"""The CUDA form of Metal kernels compiles for sm_90a. Nothing here runs it."""

from __future__ import annotations

import mlx.core as mx
import pytest

from metal_emulator import Definition, MetalError
from metal_emulator.attend_body import BODY, definition, problem
from metal_emulator.cuda import compile_cuda, cuda_text, cuda_unavailable
from mlx_kvprune.kernels.cuda_adapter import cuda_source

needs_nvrtc = pytest.mark.skipif(bool(cuda_unavailable()), reason=cuda_unavailable())

HEADER = """
template <typename T>
METAL_FUNC float total(const threadgroup T* values, uint n) {
  float sum = 0;
  for (uint i = 0; i < n; i++) sum += static_cast<float>(values[i]);
  return sum;
}
"""
FEATURES = """
  threadgroup T tile[64];
  threadgroup float4 rows[2][8];
  uint i = thread_position_in_grid.x, lane = thread_index_in_simdgroup;
  tile[i % 64] = x[elem_to_loc(i, x_shape, x_strides, x_ndim)] * T(scale);
  rows[i % 2][lane % 8] = float4(scale, lane, 0.5, 1);
  threadgroup_barrier(mem_flags::mem_threadgroup | mem_flags::mem_device);
  float4 v = fma(rows[0][lane % 8], float4(2), float4(total(tile, 64)));
  vec<T, 4> narrow = vec<T, 4>(v);
  v.xy = v.zw * v.yx + float2(dot(v, v));
  uint4 words = reinterpret_cast<const device uint4*>(codes)[i % 4];
  words = (words >> 4) & uint4(15u);
  words |= 1u;
  uchar4 bytes = as_type<uchar4>(words.x);
  float t = simd_sum(v.x) + simd_max(float(narrow.y)) + simd_shuffle_xor(v, 3).z + simd_broadcast(v.w, 5);
  t += simd_prefix_inclusive_sum(t) + simd_prefix_exclusive_sum(float(bytes[1])) + simd_shuffle(narrow, 2).x;
  t += fast::exp2(t) + metal::exp2(t) + clamp(t, -1.0f, 1.0f) + select(t, 2.0f, t > 3.0) + as_type<float>(words.y);
  t += float(popcount(words.z)) + extract_bits(words.w, 3, 4) + simd_shuffle_down(t, 1) + (simd_any(t > 0) ? INFINITY : 0);
  T narrow_t = T(t); narrow_t += T(1); narrow_t = max(narrow_t, T(0.25h)) * narrow_t - narrow_t / T(3);
  if (FLAG && N > 2) atomic_fetch_add_explicit(&counts[i % N], 1, memory_order_relaxed);
  simdgroup_barrier(mem_flags::mem_threadgroup);
  if (lane == 0 && simdgroup_index_in_threadgroup < simdgroups_per_threadgroup)
    atomic_store_explicit(&counts[N], threads_per_threadgroup.x, memory_order_relaxed);
  if (isnan(t) || t > static_cast<float>(narrow_t)) atomic_fetch_max_explicit(&counts[N + 1], 7, memory_order_relaxed);
"""


def text_of_features(source: str = FEATURES, dtype: mx.Dtype = mx.float16) -> tuple[str, str]:
    kernel = Definition("features", ["x", "codes", "scale"], ["counts"], source, HEADER, atomic_outputs=True)
    inputs = [mx.zeros((4, 16), dtype), mx.zeros(16, mx.uint32), 0.5]
    return cuda_text(kernel, inputs, [("T", dtype), ("N", 4), ("FLAG", True)], [mx.int32])


@needs_nvrtc
@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16], ids=str)
@pytest.mark.parametrize("width", [64, 128])
def test_attention_compiles(dtype, width):
    call, _ = problem(37, width, dtype)
    assert compile_cuda(*cuda_text(definition(), call["inputs"], call["template"], call["output_dtypes"]))


@needs_nvrtc
@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16], ids=str)
def test_the_language_compiles(dtype):
    assert compile_cuda(*text_of_features(dtype=dtype))


@needs_nvrtc
def test_a_mistake_is_reported():
    call, _ = problem(37, 64, mx.float32)
    kernel = definition(BODY.replace("simd_sum(s)", "simd_summ(s)"))
    with pytest.raises(MetalError, match=r"^nvrtc: .*simd_summ"):
        compile_cuda(*cuda_text(kernel, call["inputs"], call["template"], call["output_dtypes"]))


def test_what_mlx_is_given():
    made = cuda_source(
        "threadgroup float tile[N];\nout[0] = x[0] * 0.5 * s + x_shape[1];",
        "constant float HALF = 0.5;",
        input_names=["x", "s"],
        output_names=["out"],
        inputs=[mx.zeros((2, 8)), mx.array(1.0)],
        output_dtypes=[mx.bfloat16],
        template=[("T", mx.float16), ("N", 4), ("FLAG", True)],
    )
    assert made.template == [("N", 4), ("FLAG", True)]
    assert made.input_names == ["x_mlx_in", "s_mlx_in"]
    assert made.output_names == ["out_mlx_out"]
    assert made.header.endswith("constant float HALF = 0.5f;")
    for line in (
        "using T = float16_t;",
        "const float* x = reinterpret_cast<const float*>(x_mlx_in);",
        "const int* x_shape = x_mlx_in_shape.data();",
        "const float& s = *reinterpret_cast<const float*>(s_mlx_in);",
        "bfloat16_t* out = reinterpret_cast<bfloat16_t*>(out_mlx_out);",
        "__shared__ float tile[N];",
        "out[0] = x[0] * 0.5f * s + x_shape[1];",
    ):
        assert line in made.source


def test_matrices_are_refused():
    with pytest.raises(ValueError, match="simdgroup_matrix"):
        text_of_features("simdgroup_matrix<float, 8, 8> m;")
