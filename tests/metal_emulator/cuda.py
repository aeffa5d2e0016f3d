"""Compiles the CUDA form of a kernel with NVRTC, as MLX's CUDA backend would; needs no GPU and runs nothing.

Needs the PyPI packages ``nvidia-cuda-nvrtc``, ``nvidia-cuda-runtime`` and ``nvidia-cuda-cccl`` of CUDA 13.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_kvprune.kernels.cuda_adapter import CudaSource, cuda_source

from .arrays import as_mlx
from .compiler import SHIM, mlx_headers
from .report import MetalError
from .wrapper import Definition, Template

ARCHITECTURE = "sm_90a"
CUDA_TYPES = {mx.float16: "__half", mx.bfloat16: "__nv_bfloat16", mx.float32: "float", mx.bool_: "bool"}
PREAMBLE = """
#include "mlx/backend/cuda/device/utils.cuh"

#include <cooperative_groups.h>

#define inf cuda::std::numeric_limits<float>::infinity()

"""


@functools.cache
def cuda_unavailable() -> str:
    """Why CUDA source cannot be compiled on this machine, or an empty string."""
    folder = _toolkit()
    if folder is None or not list(folder.glob("lib/libnvrtc.so.*")):
        return "compiling for CUDA needs the PyPI package nvidia-cuda-nvrtc"
    for header, package in (("cuda_fp16.h", "runtime"), ("cccl/cuda/std/limits", "cccl")):
        if not (folder / "include" / header).exists():
            return f"compiling for CUDA needs the PyPI package nvidia-cuda-{package}"
    return ""


def cuda_text(
    definition: Definition, inputs: Sequence[Any], template: Template, output_dtypes: Sequence[mx.Dtype]
) -> tuple[str, str]:
    """What MLX builds of a kernel's CUDA form (``mlx/backend/cuda/custom_kernel.cpp``), and its function's name."""
    arrays = [as_mlx(x) for x in inputs]
    adapted = cuda_source(
        definition.source,
        definition.header,
        input_names=definition.input_names,
        output_names=definition.output_names,
        inputs=arrays,
        output_dtypes=output_dtypes,
        template=template,
        atomic_outputs=definition.atomic_outputs,
    )
    function = "custom_kernel_" + definition.name
    constants = ""
    for name, value in adapted.template:
        text = str(value).lower()
        constants += f"  constexpr {'bool' if isinstance(value, bool) else 'int'} {name} = {text};\n"
    parameters = ",\n".join(_parameters(adapted, arrays, output_dtypes))
    text = (
        f"{PREAMBLE}{adapted.header}namespace mlx::core::cu {{\n\nnamespace cg = cooperative_groups;\n\n"
        f"__global__ void {function}(\n{parameters}) {{\n{constants}\n{adapted.source}\n}}\n\n"
        "} // namespace mlx::core::cu\n"
    )
    return text, f"mlx::core::cu::{function}"


def _parameters(adapted: CudaSource, inputs: Sequence[mx.array], output_dtypes: Sequence[mx.Dtype]) -> list[str]:
    found = []
    for name, array in zip(adapted.input_names, inputs, strict=True):
        found.append(f"    const {_cuda_type(array.dtype)}* {name}")
        if array.ndim == 0:
            continue
        for kind, type_ in (("shape", "Shape"), ("strides", "Strides"), ("ndim", "int")):
            if f"{name}_{kind}" in adapted.source:
                found.append(f"    const __grid_constant__ {type_} {name}_{kind}")
    return found + [
        f"    {_cuda_type(dtype)}* {name}" for name, dtype in zip(adapted.output_names, output_dtypes, strict=True)
    ]


def _cuda_type(dtype: mx.Dtype) -> str:
    return CUDA_TYPES.get(dtype, str(dtype).removeprefix("mlx.core.") + "_t")


def compile_cuda(text: str, function: str) -> bytes:
    """The machine code of a CUDA source for one architecture; raises MetalError with the compiler's first errors."""
    nvrtc, folder = _nvrtc(), _toolkit()
    assert folder is not None
    program = ctypes.c_void_p()
    header = ctypes.c_char_p((SHIM / "cuda_utils.h").read_bytes())
    name = ctypes.c_char_p(b"mlx/backend/cuda/device/utils.cuh")
    created = nvrtc.nvrtcCreateProgram(
        ctypes.byref(program), text.encode(), b"kernel.cu", 1, ctypes.byref(header), ctypes.byref(name)
    )
    _check(nvrtc, created)
    try:
        _check(nvrtc, nvrtc.nvrtcAddNameExpression(program, function.encode()))
        folders = [mlx_headers(), folder / "include", folder / "include" / "cccl"]
        options = ["--device-as-default-execution-space", f"--gpu-architecture={ARCHITECTURE}"]
        options += [f"--include-path={path}" for path in folders]
        encoded = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
        if nvrtc.nvrtcCompileProgram(program, len(options), encoded):
            log = _bytes(nvrtc, program, "ProgramLog").decode()
            errors = [line for line in log.splitlines() if "error" in line]
            raise MetalError("nvrtc: " + "; ".join(errors[:4] or log.splitlines()[:4]))
        return _bytes(nvrtc, program, "CUBIN")
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


def _bytes(nvrtc: ctypes.CDLL, program: ctypes.c_void_p, what: str) -> bytes:
    size = ctypes.c_size_t()
    _check(nvrtc, nvrtc[f"nvrtcGet{what}Size"](program, ctypes.byref(size)))
    buffer = ctypes.create_string_buffer(size.value)
    _check(nvrtc, nvrtc[f"nvrtcGet{what}"](program, buffer))
    return buffer.raw.rstrip(b"\0") if what == "ProgramLog" else buffer.raw


def _check(nvrtc: ctypes.CDLL, code: int) -> None:
    if code:
        nvrtc.nvrtcGetErrorString.restype = ctypes.c_char_p
        raise MetalError(f"nvrtc: {nvrtc.nvrtcGetErrorString(code).decode()}")


@functools.cache
def _nvrtc() -> ctypes.CDLL:
    folder = _toolkit()
    assert folder is not None
    return ctypes.CDLL(str(next(folder.glob("lib/libnvrtc.so.*"))))


def _toolkit() -> Path | None:
    """Where NVIDIA's packages for CUDA 13 lie."""
    spec = importlib.util.find_spec("nvidia")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        if Path(folder, "cu13").exists():
            return Path(folder, "cu13")
    return None
