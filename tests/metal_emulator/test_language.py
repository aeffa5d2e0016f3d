"""The language that the emulator knows: vectors, bits, simdgroup functions, matrices, atomics, attributes, dtypes."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from metal_emulator import (
    Definition,
    Emulator,
    MetalError,
    address_space_errors,
    address_spaces_unavailable,
    mlx_text,
    unavailable,
)

pytestmark = pytest.mark.skipif(bool(unavailable()), reason=unavailable())

SIMD = 32
DTYPES = [
    *(mx.bool_, mx.uint8, mx.uint16, mx.uint32, mx.uint64, mx.int8, mx.int16, mx.int32, mx.int64),
    *(mx.float16, mx.float32, mx.bfloat16),
]


def run(source, inputs, out_shape, out_dtype, *, threads=SIMD, threadgroup=None, names="xyz", header="", **options):
    """Run a body with one output in check mode, after a check of its address spaces."""
    of_kernel = {k: options.pop(k) for k in ("ensure_row_contiguous", "atomic_outputs") if k in options}
    definition = Definition("body", list(names[: len(inputs)]), ["out"], source, header, **of_kernel)
    if not address_spaces_unavailable():
        assert address_space_errors(mlx_text(definition, inputs, options.get("template", ()), [out_dtype])) == []
    kernel = Emulator("check").metal_kernel(**vars(definition))
    grid = threads if isinstance(threads, tuple) else (threads, 1, 1)
    (out,) = kernel(
        inputs=inputs,
        grid=grid,
        threadgroup=threadgroup or grid,
        output_shapes=[out_shape],
        output_dtypes=[out_dtype],
        **options,
    )
    return np.array(out.astype(mx.float32)) if out_dtype == mx.bfloat16 else np.array(out)


def randoms(*shape, seed=0):
    return mx.array(np.random.default_rng(seed).standard_normal(shape), mx.float32)


# ---- dtypes


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", [1, 7, 8, 33])
def test_dtypes_pass_unchanged(dtype, n):
    values = mx.arange(n).astype(dtype)
    source = "uint i = thread_position_in_grid.x; T t = x[i]; out[i] = t;"
    out = run(source, [values], (n,), dtype, threads=n, template=[("T", dtype)])
    assert np.array_equal(out, np.array(values.astype(mx.float32) if dtype == mx.bfloat16 else values))


def test_large_integers_keep_all_bits():
    values = mx.array(np.array([-(2**63), 2**63 - 1, 3], np.int64))
    out = run("uint i = thread_position_in_grid.x; out[i] = x[i];", [values], (3,), mx.int64, threads=3)
    assert out.tolist() == values.tolist()


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_half_types_round_after_each_operation(dtype):
    a, b, c = (randoms(64, seed=s).astype(dtype) for s in range(3))
    source = "uint i = thread_position_in_grid.x; T t = x[i] * y[i] + z[i]; t += T(1); t /= y[i]; out[i] = t - x[i];"
    out = run(source, [a, b, c], (64,), dtype, threads=64, template=[("T", dtype)])
    expected = (a * b + c + mx.array(1, dtype)) / b - a
    assert np.array_equal(out, np.array(expected.astype(mx.float32)))


def test_scalars_are_references_and_strides_are_seen():
    x = randoms(8, 16)[::2, 1:].T
    source = """
    uint i = thread_position_in_grid.x;
    out[i] = x[elem_to_loc(i, x_shape, x_strides, x_ndim)] * y;
    """
    out = run(source, [x, 2.5], x.shape, mx.float32, threads=x.size, ensure_row_contiguous=False)
    assert np.array_equal(out, np.array(x) * np.float32(2.5))


def test_row_contiguous_copies():
    x = randoms(6, 5).T
    out = run("uint i = thread_position_in_grid.x; out[i] = x[i];", [x], x.shape, mx.float32, threads=x.size)
    assert np.array_equal(out, np.array(x))


def test_init_value_fills_what_is_not_written():
    out = run(
        "if (thread_position_in_grid.x == 0) out[1] = bfloat(x);", [3.0], (4,), mx.bfloat16, threads=4, init_value=2.0
    )
    assert out.tolist() == [2, 3, 2, 2]


# ---- vectors and bits


def test_vectors_and_swizzles():
    source = """
    uint i = thread_position_in_grid.x;
    float4 v = reinterpret_cast<const device float4*>(x)[i];
    float4 w = float4(v.zw, v.x, 1.0) * 2.0 + v.wzyx;
    w.xy = v.yw;
    half4 h = half4(w);
    float2 low = float2(h.xy);
    float4 u = fma(w, float4(2), select(v, -v, v > float4(0))) + float4(low, 0, 0);
    u += clamp(v, -0.5f, 0.5f) + float4(dot(v.xy + v.zw, float2(1)));
    reinterpret_cast<device float4*>(out)[i] = u;
    """
    x = randoms(6, 4)
    v = np.array(x).astype(np.float64)
    w = np.stack([v[:, 2], v[:, 3], v[:, 0], np.ones(6)], 1) * 2 + v[:, ::-1]
    w[:, :2] = v[:, [1, 3]]
    expected = 2 * w - np.abs(v) + v.clip(-0.5, 0.5) + v.sum(1, keepdims=True)
    expected[:, :2] += w[:, :2].astype(np.float16)
    assert np.abs(run(source, [x], (6, 4), mx.float32, threads=6) - expected).max() < 1e-5


def test_packed_codes():
    source = """
    uint i = thread_position_in_grid.x;
    uint4 words = reinterpret_cast<const device uint4*>(x)[i];
    uint total = 0;
    for (int w = 0; w < 4; w++)
      for (int n = 0; n < 8; n++) total += (n + 1) * ((words[w] >> (4 * n)) & 15u);
    words >>= 28;
    words &= uint4(3u);
    uchar4 bytes = as_type<uchar4>(x[4 * i]);
    out[i] = total + words.x + words.w + bytes[3] + extract_bits(x[4 * i], 5, 7) + popcount(x[4 * i]) + clz(x[4 * i]);
    """
    x = np.random.default_rng(0).integers(0, 2**32, (9, 4), dtype=np.uint32)
    nibbles = (x[:, :, None] >> (4 * np.arange(8, dtype=np.uint32))) & 15
    first = x[:, 0].astype(np.int64)
    expected = (nibbles * (np.arange(8) + 1)).sum((1, 2)) + ((x[:, 0] >> 28) & 3) + ((x[:, 3] >> 28) & 3)
    expected += (first >> 24) + ((first >> 5) & 127) + [int(f).bit_count() + 32 - int(f).bit_length() for f in first]
    assert np.array_equal(run(source, [mx.array(x)], (9,), mx.uint32, threads=9), expected)


def test_mathematics():
    names = ["exp", "exp2", "metal::fast::exp2", "precise::exp", "sin", "tanh", "floor", "rint", "fabs", "sign"]
    source = "uint i = thread_position_in_grid.x; float t = x[i];" + "".join(
        f"out[{n} * 64 + i] = {name}(t);" for n, name in enumerate(names)
    )
    x = randoms(64)
    t = np.array(x).astype(np.float64)
    functions = [np.exp, np.exp2, np.exp2, np.exp, np.sin, np.tanh, np.floor, np.rint, np.abs, np.sign]
    out = run(source, [x], (len(names), 64), mx.float32, threads=64)
    assert np.abs(out - np.stack([f(t) for f in functions])).max() < 1e-5


# ---- simdgroups


def test_reductions_and_scans():
    source = """
    uint i = thread_index_in_simdgroup;
    int t = x[i];
    out[i] = simd_sum(t); out[32 + i] = simd_max(t); out[64 + i] = simd_min(t);
    out[96 + i] = simd_prefix_inclusive_sum(t); out[128 + i] = simd_prefix_exclusive_sum(t);
    out[160 + i] = simd_any(t > 90); out[192 + i] = simd_all(t > 90); out[224 + i] = simd_or(t);
    out[256 + i] = int((simd_vote::vote_t)simd_ballot(t > 50));
    """
    t = np.random.default_rng(0).integers(0, 100, 32).astype(np.int32)
    out = run(source, [mx.array(t)], (9, 32), mx.int32)
    ballot = np.array([sum(1 << i for i in range(32) if t[i] > 50)]).astype(np.uint32).view(np.int32)[0]
    rows = [t.sum(), t.max(), t.min(), t.cumsum(), t.cumsum() - t, (t > 90).any(), (t > 90).all()]
    for row, expected in zip(out, [*rows, np.bitwise_or.reduce(t), ballot], strict=True):
        assert np.array_equal(row, np.broadcast_to(expected, 32))


def test_shuffles():
    source = """
    uint i = thread_index_in_simdgroup;
    float2 t = float2(x[i], -x[i]);
    out[i] = simd_shuffle_xor(t, 5).y; out[32 + i] = simd_shuffle(t.x, (7 * i) % 32);
    out[64 + i] = simd_broadcast(t.x, 3); out[96 + i] = simd_broadcast_first(t.x);
    out[128 + i] = simd_shuffle_down(t.x, 2); out[160 + i] = simd_shuffle_up(t.x, 2);
    out[192 + i] = simd_shuffle_and_fill_down(t.x, t.y, 2);
    """
    x = randoms(32)
    t, lane = np.array(x), np.arange(32)
    rows = [-t[lane ^ 5], t[7 * lane % 32], np.full(32, t[3]), np.full(32, t[0])]
    rows += [np.where(lane < 30, t[(lane + 2) % 32], t), np.where(lane > 1, t[lane - 2], t)]
    rows += [np.where(lane < 30, t[(lane + 2) % 32], -t[(lane + 2) % 32])]
    assert np.array_equal(run(source, [x], (7, 32), mx.float32), np.stack(rows))


def test_sum_of_a_partial_simdgroup():
    out = run(
        "out[thread_position_in_grid.x] = simd_sum(x[thread_position_in_grid.x]);",
        [mx.ones(40)],
        (40,),
        mx.float32,
        threads=40,
    )
    assert out.tolist() == [32.0] * 32 + [8.0] * 8


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16])
def test_simdgroup_matrices(dtype):
    source = """
    simdgroup_matrix<T, 8, 8> a, b;
    simdgroup_matrix<float, 8, 8> c(0);
    for (int k = 0; k < 2; k++) {
      simdgroup_load(a, x + 8 * k, 16);
      simdgroup_load(b, y + 8 * k, 16, ulong2(0), true);
      simdgroup_multiply_accumulate(c, a, b, c);
    }
    if (thread_index_in_simdgroup < 32) simdgroup_store(c, out, 8);
    """
    x, y = (randoms(8, 16, seed=s).astype(dtype) for s in (0, 1))
    out = run(source, [x, y], (8, 8), mx.float32, template=[("T", dtype)])
    expected = np.array(x).astype(np.float64) @ np.array(y).astype(np.float64).T
    assert np.abs(out - expected).max() < 1e-5


def test_atomics():
    source = """
    uint i = thread_position_in_grid.x;
    atomic_fetch_add_explicit(&out[i % 3], x[i], memory_order_relaxed);
    """
    out = run(
        source,
        [mx.arange(96).astype(mx.int32)],
        (3,),
        mx.int32,
        threads=96,
        threadgroup=(32, 1, 1),
        init_value=0,
        atomic_outputs=True,
    )
    assert out.tolist() == [sum(range(r, 96, 3)) for r in range(3)]


@pytest.mark.parametrize("plain", [0, 5])
def test_atomic_and_plain_write_race(plain):
    source = f"""
    uint i = thread_position_in_grid.x;
    if (i == {plain}) ((device int*)out)[0] = 1;
    else atomic_fetch_add_explicit(&out[0], x[0], memory_order_relaxed);
    """
    with pytest.raises(MetalError, match=r"^race: write of 'out' \+ 0"):
        run(source, [mx.ones(8, mx.int32)], (1,), mx.int32, init_value=0, atomic_outputs=True)


def test_attributes_on_an_uneven_grid():
    source = """
    uint3 p = thread_position_in_grid;
    uint i = p.x + threads_per_grid.x * (p.y + threads_per_grid.y * p.z);
    out[4 * i] = thread_index_in_threadgroup;
    out[4 * i + 1] = threads_per_threadgroup.x;
    out[4 * i + 2] = threadgroup_position_in_grid.x;
    out[4 * i + 3] = x[0] + dispatch_threads_per_threadgroup.x + thread_position_in_threadgroup.y;
    """
    x = mx.ones(3, mx.uint32)
    out = run(source, [x], (3, 5, 10, 4), mx.uint32, threads=(10, 5, 3), threadgroup=(4, 4, 1))
    assert out[0, 0, :, 1].tolist() == [4] * 8 + [2] * 2
    assert out[0, 0, :, 2].tolist() == [0] * 4 + [1] * 4 + [2] * 2
    assert out[2, 4, :, 0].tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 0, 1]
    assert out[2, :, 0, 3].tolist() == [5, 6, 7, 8, 5]


def test_header_functions_take_threadgroup_memory():
    header = """
    template <typename T>
    METAL_FUNC T total(const threadgroup T* values, uint n) {
      T sum = 0;
      for (uint i = 0; i < n; i++) sum += values[i];
      return sum;
    }
    """
    source = """
    uint i = thread_index_in_threadgroup;
    threadgroup float tile[64];
    tile[i] = x[i];
    threadgroup_barrier(mem_flags::mem_threadgroup);
    if (i == 0) out[0] = total(tile, 64);
    """
    out = run(source, [mx.arange(64).astype(mx.float32)], (1,), mx.float32, threads=64, header=header)
    assert out.tolist() == [2016.0]
