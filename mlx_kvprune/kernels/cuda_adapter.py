"""Metal kernels on CUDA: the body of an ``mx.fast.metal_kernel`` as a body for ``mx.fast.cuda_kernel``.

One source serves both backends. The text in ``metal/msl`` gives CUDA Metal's types and functions; the lines put before
the body give it Metal's names for inputs, outputs and thread attributes. What differs and is covered here: on CUDA
every input is a pointer, also a scalar; dtypes are not template arguments of a function; ``grid`` must be a multiple of
the threadgroup, for CUDA has no partial blocks. ``simdgroup_matrix`` is not supported.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import mlx.core as mx

from mlx_kvprune.kernels.metal_text import Shared, rewrite, shim_folder

HEADERS = ("cuda_types.h", "vector.h", "math.h", "cuda_simd.h")
TYPES = {
    mx.bool_: "bool",
    mx.uint8: "uint8_t",
    mx.uint16: "uint16_t",
    mx.uint32: "uint32_t",
    mx.uint64: "uint64_t",
    mx.int8: "int8_t",
    mx.int16: "int16_t",
    mx.int32: "int32_t",
    mx.int64: "int64_t",
    mx.float16: "float16_t",
    mx.float32: "float",
    mx.bfloat16: "bfloat16_t",
}
VECTORS = {
    "thread_position_in_grid": "blockIdx.{c} * blockDim.{c} + threadIdx.{c}",
    "thread_position_in_threadgroup": "threadIdx.{c}",
    "threadgroup_position_in_grid": "blockIdx.{c}",
    "threadgroups_per_grid": "gridDim.{c}",
    "threads_per_grid": "gridDim.{c} * blockDim.{c}",
    "threads_per_threadgroup": "blockDim.{c}",
    "dispatch_threads_per_threadgroup": "blockDim.{c}",
}
NUMBERS = {
    "thread_index_in_threadgroup": "msl_thread",
    "thread_index_in_simdgroup": "msl_thread % 32",
    "simdgroup_index_in_threadgroup": "msl_thread / 32",
    "simdgroups_per_threadgroup": "(msl_threads + 31) / 32",
    "dispatch_simdgroups_per_threadgroup": "(msl_threads + 31) / 32",
    "threads_per_simdgroup": "32",
    "thread_execution_width": "32",
}
COUNT_THREADS = (
    "  const unsigned msl_thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);\n"
    "  const unsigned msl_threads = blockDim.x * blockDim.y * blockDim.z;\n"
    "  (void)msl_thread; (void)msl_threads;\n"
)


@dataclass(frozen=True)
class CudaSource:
    """What ``mx.fast.cuda_kernel`` takes, and the ``template`` of its call."""

    source: str
    header: str
    input_names: list[str]
    output_names: list[str]
    template: list[tuple[str, int | bool]] = field(default_factory=list)


def cuda_source(
    source: str,
    header: str = "",
    *,
    input_names: Sequence[str],
    output_names: Sequence[str],
    inputs: Sequence[Any],
    output_dtypes: Sequence[mx.Dtype],
    template: Sequence[tuple[str, Any]] = (),
    atomic_outputs: bool = False,
) -> CudaSource:
    """The CUDA kernel that does what a Metal kernel does on the same arguments.

    Args:
        source: the Metal kernel's body.
        header: its header.
        inputs: arrays, or anything with their ``dtype`` and ``ndim``: both enter the text.
        template: as in the call of the Metal kernel. Its dtypes become aliases in the text, the rest is passed on.
    """
    if "simdgroup_matrix" in source + header or "simdgroup_multiply" in source + header:
        raise ValueError("[cuda_source] simdgroup_matrix has no CUDA counterpart here; got a kernel that uses it")
    lines = [COUNT_THREADS]
    for name, value in template:
        if isinstance(value, mx.Dtype):
            lines.append(f"  using {name} = {TYPES[value]};\n")
    for name, array in zip(input_names, inputs, strict=True):
        lines.append(_input(name, array, source))
    for name, dtype in zip(output_names, output_dtypes, strict=True):
        type_ = f"atomic<{TYPES[dtype]}>" if atomic_outputs else TYPES[dtype]
        lines.append(f"  {type_}* {name} = reinterpret_cast<{type_}*>({name}_mlx_out);\n")
    lines += [f"  const uint {name} = {value};\n" for name, value in NUMBERS.items() if name in source]
    for name, value in VECTORS.items():
        if name in source:
            lines.append(f"  const uint3 {name}({', '.join(value.format(c=c) for c in 'xyz')});\n")
    return CudaSource(
        source="".join(lines) + rewrite(source, _declare),
        header=_shim() + rewrite(header, _declare),
        input_names=[f"{name}_mlx_in" for name in input_names],
        output_names=[f"{name}_mlx_out" for name in output_names],
        template=[(name, value) for name, value in template if not isinstance(value, mx.Dtype)],
    )


@cache
def _shim() -> str:
    folder = shim_folder() / "msl"
    return "".join((folder / name).read_text().replace("#pragma once\n", "") for name in HEADERS)


def _declare(shared: Shared) -> str:
    return f"__shared__ {shared.type} {shared.name}{shared.extent};"


def _input(name: str, array: Any, source: str) -> str:
    """Metal's name for an input, and for its shape, strides and rank where the body uses them."""
    type_, given = TYPES[array.dtype], f"{name}_mlx_in"
    if array.ndim == 0:
        return f"  const {type_}& {name} = *reinterpret_cast<const {type_}*>({given});\n"
    lines = [f"  const {type_}* {name} = reinterpret_cast<const {type_}*>({given});\n"]
    if f"{name}_shape" in source:
        lines.append(f"  const int* {name}_shape = {given}_shape.data();\n")
    if f"{name}_strides" in source:
        lines.append(f"  const int64_t* {name}_strides = {given}_strides.data();\n")
    if f"{name}_ndim" in source:
        lines.append(f"  const int& {name}_ndim = {given}_ndim;\n")
    return "".join(lines)


def cuda_kernel(
    name: str,
    input_names: Sequence[str],
    output_names: Sequence[str],
    source: str,
    header: str = "",
    ensure_row_contiguous: bool = True,
) -> Callable[..., list[mx.array]]:
    """What ``mx.fast.metal_kernel`` with these arguments returns, for CUDA.

    The kernel is built at the first call with inputs of new types or ranks, or a new template: they enter its text, and
    its name, by which MLX keeps what it has compiled.
    """
    built: dict[tuple[Any, ...], tuple[Any, CudaSource]] = {}

    def build(
        inputs: Sequence[mx.array], template: Sequence[tuple[str, Any]], dtypes: Sequence[mx.Dtype], key: Any
    ) -> Any:
        made = cuda_source(
            source,
            header,
            input_names=input_names,
            output_names=output_names,
            inputs=inputs,
            output_dtypes=dtypes,
            template=template,
        )
        kernel = mx.fast.cuda_kernel(
            name=f"{name}_{hashlib.sha256(repr(key).encode()).hexdigest()[:12]}",
            input_names=made.input_names,
            output_names=made.output_names,
            source=made.source,
            header=made.header,
            ensure_row_contiguous=ensure_row_contiguous,
        )
        return kernel, made

    def call(
        *,
        inputs: Sequence[mx.array],
        template: Sequence[tuple[str, Any]],
        output_dtypes: Sequence[mx.Dtype],
        **launch: Any,
    ) -> list[mx.array]:
        key = (tuple((str(x.dtype), x.ndim) for x in inputs), tuple(map(str, template)), tuple(map(str, output_dtypes)))
        if key not in built:
            built[key] = build(inputs, template, output_dtypes, key)
        kernel, made = built[key]
        return kernel(inputs=list(inputs), template=made.template, output_dtypes=list(output_dtypes), **launch)

    return call
