"""A wrong address space is an error at its line, for every dtype and for inputs so small that they become `constant`."""

from __future__ import annotations

import mlx.core as mx
import pytest

from metal_emulator import Definition, address_space_errors, address_spaces_unavailable, mlx_text
from metal_emulator.attend_body import BODY, definition, problem

pytestmark = pytest.mark.skipif(bool(address_spaces_unavailable()), reason=address_spaces_unavailable())

BEFORE_LOOP = "float l = 0;"
MISTAKES = {
    "qualifier missing": ("const device T* qp", "const T* qp", "'const __private float *"),
    "const dropped": ("const device T* kp", "device T* kp", "'__global float *"),
    "threadgroup as device": (BEFORE_LOOP, "float l = 0; device float* p = outputs;", "'__global float *"),
    "device as threadgroup": (BEFORE_LOOP, "float l = 0; threadgroup const T* p = q;", "__local"),
    "write to an input": (BEFORE_LOOP, "float l = 0; q[0] = T(l);", "read-only"),
    "write to a scalar": (BEFORE_LOOP, "float l = 0; scale = l;", "const"),
    "argument of another space": (
        BEFORE_LOOP,
        "float l = 0; auto first = [](threadgroup T* p) { return p[0]; }; l = first(out);",
        "no matching",
    ),
    "misspelt type": (BEFORE_LOOP, "flaot l = 0;", "unknown type name 'flaot'"),
}


def errors(body: str, dtype: mx.Dtype = mx.float32, n_keys: int = 37) -> list[str]:
    call, _ = problem(n_keys, 64, dtype)
    return address_space_errors(mlx_text(definition(body), call["inputs"], call["template"], call["output_dtypes"]))


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16], ids=str)
@pytest.mark.parametrize("n_keys", [1, 37])
def test_attention_is_right(dtype, n_keys):
    assert errors(BODY, dtype, n_keys) == []


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistake_is_found_at_its_line(mistake):
    old, new, about = MISTAKES[mistake]
    text = BODY.replace(old, new, 1)
    call, _ = problem(37, 64, mx.float32)
    lines = mlx_text(definition(text), call["inputs"], call["template"], call["output_dtypes"]).split("\n")
    line = 1 + next(i for i, line in enumerate(lines) if new in line)
    found = errors(text)
    assert len(found) == 1
    assert found[0].startswith(f"{line}: ")
    assert about in found[0]


@pytest.mark.parametrize(("n", "wrong"), [(7, True), (8, False)])
def test_a_small_input_is_constant(n, wrong):
    kernel = Definition("small", ["x"], ["out"], "const device float* p = x; out[0] = p[0];")
    assert bool(address_space_errors(mlx_text(kernel, [mx.zeros(n)], (), [mx.float32]))) == wrong


def test_mlx_attention_is_right():
    include = '#include "mlx/backend/metal/kernels/sdpa_vector.h"\n'
    instances = [
        f"template decltype({k}) {k};\n" for k in ("sdpa_vector<float, 64, 64>", "sdpa_vector<bfloat16_t, 128, 128>")
    ]
    assert address_space_errors(include + "".join(instances)) == []
