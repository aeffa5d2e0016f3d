"""Runs kernels that are written out in full, with buffer indices and function constants, as MLX's own are."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import mlx.core as mx

from . import compiler
from .arrays import as_mlx, bits, from_bits
from .emulator import Emulator, Size
from .launch import Argument
from .wrapper import ATTRIBUTES


@dataclass(frozen=True)
class Parameter:
    """A parameter of a kernel: its name, its attribute, and the index if that is ``buffer``."""

    name: str
    attribute: str
    buffer: int | None


def parameters(text: str, function: str) -> list[Parameter]:
    """The parameters of a kernel function in Metal text."""
    match = re.search(rf"\b{function}\s*\((.*?)\)\s*\{{", text, re.DOTALL)
    assert match is not None, f"no function {function}"
    found = []
    for declared, attribute in re.findall(r"([^\[\]]+)\[\[(.*?)\]\]", match[1], re.DOTALL):
        index = re.match(r"\s*buffer\((\d+)\)", attribute)
        name = re.findall(r"\w+", declared)[-1]
        found.append(Parameter(name, attribute.split("(")[0].strip(), int(index[1]) if index else None))
    return found


def run_library_kernel(
    emulator: Emulator,
    header: str,
    function: str,
    template: str,
    *,
    inputs: Mapping[str, object],
    outputs: Mapping[str, tuple[Sequence[int], mx.Dtype]],
    grid: Size,
    threadgroup: Size,
    constants: Mapping[str, bool | int] | None = None,
) -> dict[str, mx.array]:
    """Run a kernel of one of MLX's headers.

    Args:
        header: the header, below ``mlx/backend/metal/kernels``.
        function: the kernel function in it; ``template`` its arguments, ``"<float, 64, 64>"``.
        inputs: arrays and scalars by the parameter's name; those left out are empty buffers.
        outputs: shape and dtype by the parameter's name.
        constants: values of all function constants of the header.
    """
    path = f"mlx/backend/metal/kernels/{header}"
    found = parameters((compiler.mlx_headers() / path).read_text(), function)
    buffers = sorted((p for p in found if p.buffer is not None), key=lambda p: p.buffer or 0)
    place = {p.name: i for i, p in enumerate(buffers)}
    sources = tuple(ATTRIBUTES[p.attribute] if p.buffer is None else place[p.name] for p in found)
    constants = constants or {}
    text = f'#include "{path}"\n'
    module = compiler.build(text, function + template, sources, emulator.mode, tuple(constants))
    for name, value in constants.items():
        kind = ctypes.c_bool if isinstance(value, bool) else ctypes.c_int32
        kind.from_address(module.constant(name)).value = value
    arguments = [_argument(p.name, inputs, outputs) for p in buffers]
    raw = emulator.run(module, arguments, grid, threadgroup, function)
    return {name: from_bits(raw[name], dtype) for name, (_, dtype) in outputs.items()}


def _argument(
    name: str, inputs: Mapping[str, object], outputs: Mapping[str, tuple[Sequence[int], mx.Dtype]]
) -> Argument:
    if name in outputs:
        shape, dtype = outputs[name]
        return Argument(name, bits(mx.zeros(tuple(shape), dtype)), is_output=True, is_initialised=False)
    if name in inputs:
        return Argument(name, bits(as_mlx(inputs[name])))
    return Argument(name, bits(mx.zeros((0,), mx.uint8)))
