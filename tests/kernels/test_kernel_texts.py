"""What is handed to MLX: its own text of it, address spaces, and a compiler for CUDA; nothing is run."""

from __future__ import annotations

from functools import cache

import mlx.core as mx
import pytest
from attend_cases import Case, run
from kernel_texts import texts_of
from metal_emulator import address_space_errors, exported_text, mlx_text, unavailable
from metal_emulator.address_spaces import address_spaces_unavailable
from metal_emulator.cuda import compile_cuda, cuda_text, cuda_unavailable

from mlx_kvprune.kernels import cuda_adapter
from mlx_kvprune.kernels.attend_slots import ATTEND, MASS, MERGE

CASES = {
    f"{dtype} {case}": (dtype, case)
    for dtype in ("float32", "float16", "bfloat16")
    for case in ("tiny", "packed", "everything", "page")
}
pytestmark = pytest.mark.skipif(bool(unavailable()), reason=unavailable() or "-")


def case_of(name: str) -> Case:
    dtype, kind = CASES[name]
    more = {
        "tiny": {"slots": 0, "ring": 1, "heads": 1, "gqa": 1},
        "packed": {"slots": (33, 5), "bits": (3, 6), "scheme": "channel", "width": 80, "n_new": 2},
        "everything": {
            "slots": 40,
            "bits": (4, 5),
            "gated": True,
            "window": 99,
            "softcap": 4.0,
            "sinks": True,
            "holes": 0.3,
        },
        "page": {"slots": 64, "bits": (2, 8), "scheme": "page", "width": 256},
    }[kind]
    turned = {"turned": True} if kind == "packed" else {}
    return Case(dtype=getattr(mx, dtype), **more, **turned)


@cache
def texts(name: str):
    case = case_of(name)
    return texts_of(lambda: run(case, weights=case.n_new == 1))


@pytest.mark.parametrize("name", CASES)
def test_the_text_is_what_mlx_makes_of_it(name):
    for text in texts(name):
        assert mlx_text(*text) == exported_text(*text)


@pytest.mark.skipif(bool(address_spaces_unavailable()), reason=address_spaces_unavailable() or "-")
@pytest.mark.parametrize("name", CASES)
def test_address_spaces(name):
    for text in texts(name):
        assert address_space_errors(mlx_text(*text)) == []


@pytest.mark.skipif(bool(cuda_unavailable()), reason=cuda_unavailable() or "-")
@pytest.mark.parametrize("name", ["float16 packed", "bfloat16 everything", "float32 page"])
def test_compiles_for_cuda(name):
    for text in texts(name):
        assert compile_cuda(*cuda_text(*text))


def test_no_kernel_takes_more_than_31_buffers():
    for kernel in (ATTEND, MASS, MERGE):
        strides = 4 if kernel is not MERGE else 0
        assert len(kernel.inputs) + len(kernel.outputs) + strides <= 31


def test_a_cuda_kernel_is_built_once_for_types_ranks_and_constants(monkeypatch):
    built = []

    def build(**definition):
        built.append(definition["name"])
        return lambda **call: [mx.zeros(shape) for shape in call["output_shapes"]]

    monkeypatch.setattr(mx.fast, "cuda_kernel", build)
    kernel = cuda_adapter.cuda_kernel("twice", ["x"], ["out"], "out[0] = T(N) * x[0];")
    launch = {"grid": (1, 1, 1), "threadgroup": (1, 1, 1), "output_shapes": [(1,)]}
    for dtype, n in ((mx.float32, 1), (mx.float32, 1), (mx.float16, 1), (mx.float16, 2)):
        kernel(inputs=[mx.zeros(8, dtype)], template=[("T", dtype), ("N", n)], output_dtypes=[dtype], **launch)
    assert len(built) == 3 and len(set(built)) == 3
