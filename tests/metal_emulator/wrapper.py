"""The text that MLX builds around a kernel's body, and the same text as MLX itself prints it.

``mlx_text`` follows ``mlx/backend/common/metal_kernel.cpp`` of MLX 0.32; ``exported_text`` has MLX print what it builds,
which a CPU build does while it traces a function for export. The tests demand that both agree byte for byte.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_kvprune.kernels.cuda_adapter import TYPES as METAL_TYPES

from .arrays import as_mlx

Template = Sequence[tuple[str, Any]]

VECTORS = (
    "thread_position_in_grid",
    "thread_position_in_threadgroup",
    "threadgroup_position_in_grid",
    "threadgroups_per_grid",
    "threads_per_grid",
    "threads_per_threadgroup",
    "dispatch_threads_per_threadgroup",
    "grid_origin",
    "grid_size",
)
NUMBERS = (
    "thread_index_in_threadgroup",
    "thread_index_in_simdgroup",
    "simdgroup_index_in_threadgroup",
    "simdgroups_per_threadgroup",
    "dispatch_simdgroups_per_threadgroup",
    "threads_per_simdgroup",
    "thread_execution_width",
    "thread_index_in_quadgroup",
    "quadgroup_index_in_threadgroup",
    "quadgroups_per_threadgroup",
    "dispatch_quadgroups_per_threadgroup",
)
# Where the runtime takes an attribute from: see shim/entry.h.
ATTRIBUTES = {name: -1 - i for i, name in enumerate(VECTORS)} | {name: -101 - i for i, name in enumerate(NUMBERS)}
# In the order in which MLX looks for them.
PARAMETERS = sorted([(name, "uint3") for name in VECTORS] + [(name, "uint") for name in NUMBERS])
SMALL = 8  # inputs of fewer elements are passed in constant memory


@dataclass(frozen=True)
class Definition:
    """What ``mx.fast.metal_kernel`` is given."""

    name: str
    input_names: Sequence[str]
    output_names: Sequence[str]
    source: str
    header: str = ""
    ensure_row_contiguous: bool = True
    atomic_outputs: bool = False


@dataclass(frozen=True)
class Wrapped:
    """A kernel's full text.

    Attributes:
        text: what MLX hands to the compiler after its own ``utils.h``.
        function: the kernel function, with template arguments.
        buffers: per buffer what it carries, ``(kind, name)``; the kind is input, shape, strides, ndim or output.
        attributes: the thread attributes that follow the buffers.
    """

    text: str
    function: str
    buffers: tuple[tuple[str, str], ...]
    attributes: tuple[str, ...]


def wrap(
    definition: Definition, inputs: Sequence[Any], template: Template, output_dtypes: Sequence[mx.Dtype]
) -> Wrapped:
    """The full text of a kernel for these inputs, template values and output dtypes."""
    arrays = [as_mlx(x) for x in inputs]
    parameters: list[str] = []
    buffers: list[tuple[str, str]] = []

    def add(kind: str, name: str, declared: str) -> None:
        parameters.append(f"  {declared} [[buffer({len(buffers)})]]")
        buffers.append((kind, name))

    for name, array in zip(definition.input_names, arrays, strict=True):
        space = "constant" if array.size < SMALL else "device"
        add("input", name, f"const {space} {METAL_TYPES[array.dtype]}{'*' if array.ndim else '&'} {name}")
        for kind, type_ in (("shape", "int*"), ("strides", "int64_t*"), ("ndim", "int&")):
            if array.ndim and f"{name}_{kind}" in definition.source:
                add(kind, name, f"const constant {type_} {name}_{kind}")
    for name, dtype in zip(definition.output_names, output_dtypes, strict=True):
        type_ = f"atomic<{METAL_TYPES[dtype]}>" if definition.atomic_outputs else METAL_TYPES[dtype]
        add("output", name, f"device {type_}* {name}")
    attributes = tuple(name for name, _ in PARAMETERS if name in definition.source)
    parameters += [f"  {type_} {name} [[{name}]]" for name, type_ in PARAMETERS if name in definition.source]

    values = [(name, *_template_value(value)) for name, value in template]
    arguments = f"<{', '.join(value for _, _, value in values)}>" if values else ""
    name = _kernel_name(definition.name, arguments, arrays, output_dtypes)
    text = definition.header
    if values:
        text += f"template <{', '.join(f'{kind} {name}' for name, kind, _ in values)}>\n"
    text += f"[[kernel]] void {name}(\n" + ",\n".join(parameters) + ") {\n" + definition.source + "\n}\n"
    if values:
        instance = f"{name}{arguments}"
        text += f'\ntemplate [[host_name("{name}")]] [[kernel]] decltype({instance}) {instance};\n'
    return Wrapped(text, name + arguments, tuple(buffers), attributes)


def mlx_text(
    definition: Definition, inputs: Sequence[Any], template: Template, output_dtypes: Sequence[mx.Dtype]
) -> str:
    """The text that MLX builds for a call of a kernel."""
    return wrap(definition, inputs, template, output_dtypes).text


def exported_text(
    definition: Definition, inputs: Sequence[Any], template: Template, output_dtypes: Sequence[mx.Dtype]
) -> str:
    """The text that MLX itself builds for that call, as it prints it."""
    kernel = mx.fast.metal_kernel(**vars(definition))

    def call(*arrays: mx.array) -> tuple[mx.array, ...]:
        outputs = kernel(
            inputs=list(arrays),
            grid=(32, 1, 1),
            threadgroup=(32, 1, 1),
            output_shapes=[(8,)] * len(output_dtypes),
            output_dtypes=list(output_dtypes),
            verbose=True,
            **({"template": list(template)} if template else {}),
        )
        return tuple(outputs)

    with tempfile.TemporaryDirectory() as folder:
        arrays = [as_mlx(x) for x in inputs]
        printed = _printed(lambda: mx.export_function(str(Path(folder, "kernel.mlxfn")), call, *arrays))
    return printed[printed.index("```\n") + 4 : printed.rindex("\n```")]


def _template_value(value: Any) -> tuple[str, str]:
    """The kind of a template parameter and its argument."""
    if isinstance(value, bool):
        return "bool", str(int(value))
    if isinstance(value, int):
        return "int", str(value)
    return "typename", METAL_TYPES[value]


def _kernel_name(name: str, arguments: str, inputs: Sequence[mx.array], output_dtypes: Sequence[mx.Dtype]) -> str:
    parts = ["custom_kernel_" + name]
    if arguments:
        parts.append(re.sub(r"[<>-]", "_", arguments).replace(", ", "_")[:-1])
    for array in inputs:
        parts.append(METAL_TYPES[array.dtype] + ("s" if array.ndim == 0 else "c" if array.size < SMALL else ""))
    return "_".join([*parts, *(METAL_TYPES[dtype] for dtype in output_dtypes)])


def _printed(action: Callable[[], object]) -> str:
    """What ``action`` writes to the process's standard output, C++ included."""
    saved = os.dup(1)
    with tempfile.TemporaryFile() as file:
        try:
            os.dup2(file.fileno(), 1)
            action()
        finally:
            os.dup2(saved, 1)
            os.close(saved)
        file.seek(0)
        return file.read().decode()
