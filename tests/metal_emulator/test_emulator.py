"""Schedules, limits, the report, the cache, and MLX's own attention."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from metal_emulator import Emulator, MetalError, compiler, unavailable
from metal_emulator.attend_body import attention, definition, problem
from metal_emulator.library import run_library_kernel

pytestmark = pytest.mark.skipif(bool(unavailable()), reason=unavailable())

TOLERANCE = {mx.float32: 1e-5, mx.float16: 2e-3, mx.bfloat16: 2e-2}


def copy(
    emulator: Emulator,
    x: mx.array,
    *,
    source="out[thread_position_in_grid.x] = x[thread_position_in_grid.x];",
    **options,
):
    kernel = emulator.metal_kernel(name="copy", input_names=["x"], output_names=["out"], source=source)
    n = options.pop("threads", x.size)
    call = {
        "grid": (n, 1, 1),
        "threadgroup": (min(n, 32), 1, 1),
        "output_shapes": [x.shape],
        "output_dtypes": [x.dtype],
    }
    return kernel(inputs=[x], **call | options)[0]


# ---- schedules


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("schedule", ["forward", "reverse", "random"])
def test_schedules_agree_with_the_reference(dtype, schedule):
    for n_keys, width in [(1, 64), (31, 64), (33, 64), (127, 128), (1000, 64)]:
        call, expected = problem(n_keys, width, dtype)
        (out,) = Emulator("fast", schedule, seed=3).metal_kernel(**vars(definition()))(**call)
        assert out.dtype == dtype
        assert np.abs(np.array(out.astype(mx.float32)) - expected).max() < TOLERANCE[dtype]


def test_schedules_make_a_race_visible():
    source = "if (thread_index_in_simdgroup == 0) out[0] = simdgroup_index_in_threadgroup; (void)x[0];"
    values = {}
    for schedule in ("forward", "reverse"):
        emulator = Emulator("fast", schedule)
        values[schedule] = copy(emulator, mx.zeros(8, mx.uint32), source=source, threads=128, threadgroup=(128, 1, 1))
    assert [v[0].item() for v in values.values()] == [3, 0]


@pytest.mark.parametrize("threadgroup", [1, 96])
def test_random_schedules_follow_their_seed(threadgroup):
    source = "out[0] = thread_position_in_grid.x; (void)x[0];"
    runs = [
        copy(
            Emulator("fast", "random", seed),
            mx.zeros(8, mx.uint32),
            source=source,
            threads=96,
            threadgroup=(threadgroup, 1, 1),
        )
        for seed in (1, 1, 2, 3)
    ]
    first, again, *others = [run[0].item() for run in runs]
    assert first == again
    assert set(others) != {first}


# ---- races that the planted bugs do not reach


@pytest.mark.parametrize(
    ("body", "message"),
    [
        # threads of two threadgroups read an output, then one writes it
        ("if (i == 0) total += out[0]; if (i == 32) { total += out[0]; out[0] = total; }", "write of 'out' .* a read"),
        # two simdgroups read, then the one that read last writes
        ("if (i == 0 || i == 63) total = tile[0]; if (i == 63) tile[0] = 1;", "write of 'tile' .* a read"),
        # two lanes read, then the one that read last writes
        ("if (i < 2) total = tile[0]; if (i == 1) tile[0] = 1;", "write of 'tile' .* a read"),
    ],
    ids=["read by another threadgroup", "shared reads of two simdgroups", "shared reads of two lanes"],
)
def test_write_after_shared_reads(body, message):
    wide = "out[0]" not in body
    source = f"""
    uint i = thread_position_in_grid.x;
    threadgroup float tile[64];
    float total = 0;
    tile[i % 64] = x[i];
    threadgroup_barrier(mem_flags::mem_threadgroup);
    {body}
    if (total > 1e9) out[7] = total;
    """
    options = {"threads": 64, "threadgroup": (64 if wide else 32, 1, 1), "init_value": 0}
    with pytest.raises(MetalError, match=f"race: {message}"):
        copy(Emulator("check"), mx.zeros(64), source=source, **options)


def test_one_simd_operation_in_two_places_is_divergence():
    source = "float t = x[0]; if (thread_index_in_simdgroup < 16) t = simd_sum(t);\nelse t = simd_sum(t);\nout[0] = t;"
    with pytest.raises(MetalError, match=r"divergence: 16 threads at a simd operation, line .*; 16 threads at a simd"):
        copy(Emulator(), mx.zeros(32), source=source)


# ---- limits


def test_threads_per_threadgroup_are_limited():
    x = mx.zeros(2048)
    copy(Emulator(), x, threadgroup=(1024, 1, 1))
    with pytest.raises(MetalError, match="limit: 'copy' has 1056 threads in a threadgroup, of 1024"):
        copy(Emulator(), x, threadgroup=(33, 32, 1))


@pytest.mark.parametrize(("n", "refused"), [(30, False), (31, True)])
def test_buffers_are_limited(n, refused):
    names = [f"x{i}" for i in range(n)]
    kernel = Emulator().metal_kernel(name="many", input_names=names, output_names=["out"], source="out[0] = x0[0];")
    call = {"grid": (1, 1, 1), "threadgroup": (1, 1, 1), "output_shapes": [(1,)], "output_dtypes": [mx.float32]}
    if refused:
        with pytest.raises(MetalError, match="limit: 'many' has 32 buffers, of 31"):
            kernel(inputs=[mx.ones(1)] * n, **call)
    else:
        assert kernel(inputs=[mx.ones(1)] * n, **call)[0].item() == 1


@pytest.mark.parametrize("mode", ["fast", "check"])
@pytest.mark.parametrize(("n", "refused"), [(8188, False), (8189, True)])
def test_threadgroup_memory_is_limited(mode, n, refused):
    source = f"threadgroup float big[{n}], four[4]; big[0] = four[0] = x[0]; out[0] = big[0];"
    emulator = Emulator(mode)
    if refused:
        with pytest.raises(MetalError, match=r"limit: 'four' brings threadgroup memory to 32784 bytes, of 32768"):
            copy(emulator, mx.ones(1), source=source)
    else:
        copy(emulator, mx.ones(1), source=source)
        assert emulator.last is not None and emulator.last.threadgroup_nbytes == 32768


def test_empty_sizes_are_refused():
    with pytest.raises(MetalError, match="limit: 'copy' needs sizes of at least 1"):
        copy(Emulator(), mx.ones(4), grid=(0, 1, 1))


def test_an_overrun_is_not_blamed_on_the_neighbour():
    kernel = Emulator("check").metal_kernel(
        name="two", input_names=["a", "b"], output_names=["out"], source="out[0] = a[200000] + b[0];"
    )
    call = {"grid": (1, 1, 1), "threadgroup": (1, 1, 1), "output_shapes": [(1,)], "output_dtypes": [mx.float32]}
    with pytest.raises(MetalError, match=r"read of 4 bytes at 'a' \+ 800000, which has 64 bytes .* at two:5: out"):
        kernel(inputs=[mx.ones(16), mx.ones(16)], **call)


# ---- the report


def test_traffic_of_a_known_kernel():
    """Two threadgroups of two simdgroups: each lane reads its own float, its simdgroup's first, and one in constant memory."""
    source = """
    uint i = thread_position_in_grid.x;
    out[i] = x[i] + x[i - thread_index_in_simdgroup] + y[1];
    if (i == 0) z[0] = scale;
    """
    emulator = Emulator("check")
    kernel = emulator.metal_kernel(
        name="known", input_names=["x", "y", "scale", "unused"], output_names=["out", "z"], source=source
    )
    kernel(
        inputs=[mx.arange(128).astype(mx.float32), mx.ones(3), 2.0, mx.zeros(100, mx.uint8)],
        grid=(128, 1, 1),
        threadgroup=(64, 1, 1),
        output_shapes=[(128,), ()],
        output_dtypes=[mx.float32, mx.float16],
    )
    report = emulator.last
    assert report is not None
    x, y, scale, unused, out, z = (report.buffers[n] for n in ("x", "y", "scale", "unused", "out", "z"))
    assert (x.nbytes, x.read_bytes, x.read_simd_bytes, x.read_once_bytes) == (512, 2 * 512, 512, 512)
    assert (y.nbytes, y.read_bytes, y.read_simd_bytes, y.read_once_bytes) == (12, 512, 4 * 4, 4)
    assert (scale.nbytes, scale.read_bytes, scale.read_simd_bytes, scale.read_once_bytes) == (4, 4, 4, 4)
    assert (unused.nbytes, unused.read_bytes, unused.written_bytes) == (100, 0, 0)
    assert (out.nbytes, out.written_bytes, out.read_bytes) == (512, 512, 0)
    assert (z.nbytes, z.written_bytes) == (2, 2)
    assert report.read_simd_bytes == 512 + 16 + 4
    assert report.written_bytes == 514
    assert report.unwritten == {"out": 0, "z": 0}
    assert (report.n_threads, report.n_launches) == (128, 1)


def test_traffic_counts_bytes_of_vectors_and_simdgroups_apart():
    source = """
    uint i = thread_position_in_grid.x;
    float4 v = reinterpret_cast<const device float4*>(x)[i % 8];
    reinterpret_cast<device float4*>(out)[i] = v;
    """
    emulator = Emulator("check")
    kernel = emulator.metal_kernel(name="four", input_names=["x"], output_names=["out"], source=source)
    call = {"grid": (64, 1, 1), "threadgroup": (64, 1, 1), "output_shapes": [(64, 4)], "output_dtypes": [mx.float32]}
    kernel(inputs=[mx.ones(64)], **call)
    assert emulator.last is not None
    x = emulator.last.buffers["x"]
    assert (x.read_bytes, x.read_simd_bytes, x.read_once_bytes) == (64 * 16, 2 * 128, 128)


def test_unwritten_outputs():
    source = "uint i = thread_position_in_grid.x; if (i % 4) out[i] = x[i];"
    with pytest.raises(MetalError, match="unwritten: 8 elements of 'out' in copy"):
        copy(Emulator("check"), mx.ones(32), source=source)
    emulator = Emulator("check", allow_unwritten=True)
    out = np.array(copy(emulator, mx.ones(32), source=source))
    assert emulator.last is not None and emulator.last.unwritten == {"out": 8}
    assert np.isnan(out[::4]).all()
    assert copy(Emulator("check"), mx.ones(32), source=source, init_value=5)[:2].tolist() == [5, 1]


def test_calls_are_checked_as_by_mlx():
    kernel = Emulator().metal_kernel(name="k", input_names=["x"], output_names=["out"], source="", compile_options=None)
    call = {"grid": (1, 1, 1), "threadgroup": (1, 1, 1), "output_dtypes": [mx.float32]}
    with pytest.raises(ValueError, match="expected 1 inputs; got 2"):
        kernel(inputs=[1, 2], output_shapes=[(1,)], **call)
    with pytest.raises(ValueError, match="expected 1 outputs; got 2 shapes and 1 dtypes"):
        kernel(inputs=[1], output_shapes=[(1,), (1,)], **call)
    with pytest.raises(ValueError, match="unknown mode"):
        Emulator("slow")


def test_verbose_prints_the_text(capsys):
    copy(Emulator(), mx.ones(8), verbose=True)
    assert "[[kernel]] void custom_kernel_copy" in capsys.readouterr().out


# ---- the cache


def test_processes_compile_the_same_kernel_at_once(tmp_path):
    program = (
        "import mlx.core as mx; from metal_emulator.test_emulator import *;"
        "print(copy(Emulator('check'), mx.ones(40)).sum().item())"
    )
    folders = os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])
    env = os.environ | {"MLX_KVPRUNE_CACHE": str(tmp_path), "PYTHONPATH": folders}
    processes = [
        subprocess.Popen([sys.executable, "-c", program], env=env, stdout=subprocess.PIPE, text=True) for _ in range(2)
    ]
    assert [p.communicate()[0].strip() for p in processes] == ["40.0", "40.0"]
    assert sorted(p.suffix for p in (tmp_path / "metal_emulator").iterdir()) == [".o", ".so"]


def test_a_change_of_the_text_compiles_anew():
    x = mx.ones(8)
    sources = [f"out[thread_position_in_grid.x] = x[thread_position_in_grid.x] + {n};" for n in (1, 2)]
    assert [copy(Emulator(), x, source=s)[0].item() for s in sources] == [2, 3]


# ---- MLX's own kernels


CONSTANTS = dict.fromkeys(
    ("has_mask", "query_transposed", "do_causal", "bool_mask", "float_mask", "has_sinks"), False
) | {"blocks": 32}


@pytest.mark.parametrize("mode", ["fast", "check"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("width", [64, 128])
def test_mlx_attention_agrees_with_float64(dtype, width, mode):
    n_heads, n_kv_heads, n_keys = 8, 2, 1000 if mode == "fast" else 200
    rng = np.random.default_rng(0)
    shapes = [(n_heads, width), (n_kv_heads, n_keys, width), (n_kv_heads, n_keys, width)]
    q, k, v = (mx.array(rng.standard_normal(s), mx.float32).astype(dtype) for s in shapes)
    strides = {
        "k_head_stride": n_keys * width,
        "k_seq_stride": width,
        "v_head_stride": n_keys * width,
        "v_seq_stride": width,
    }
    out = run_library_kernel(
        Emulator(mode),
        "sdpa_vector.h",
        "sdpa_vector",
        f"<{compiler_type(dtype)}, {width}, {width}>",
        inputs={
            "queries": q,
            "keys": k,
            "values": v,
            "gqa_factor": mx.array(n_heads // n_kv_heads, mx.int32),
            "N": mx.array(n_keys, mx.int32),
            "scale": mx.array(width**-0.5),
            **{name: mx.array(value, mx.uint64) for name, value in strides.items()},
        },
        outputs={"out": ((n_heads, width), dtype)},
        grid=(n_heads * 1024, 1, 1),
        threadgroup=(1024, 1, 1),
        constants=CONSTANTS,
    )["out"]
    difference = np.abs(np.array(out.astype(mx.float32)) - attention(q, k, v, width**-0.5)).max()
    assert difference < TOLERANCE[dtype]


def compiler_type(dtype: mx.Dtype) -> str:
    return {mx.float32: "float", mx.float16: "float16_t", mx.bfloat16: "bfloat16_t"}[dtype]


def test_reason_is_empty_where_it_runs():
    assert compiler.unavailable() == ""
