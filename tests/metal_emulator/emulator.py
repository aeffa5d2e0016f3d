"""``mx.fast.metal_kernel`` on a CPU.

    emulator = Emulator(mode="check")
    kernel = emulator.metal_kernel(name="add", input_names=["x"], output_names=["out"], source="...")
    (out,) = kernel(inputs=[x], grid=(n, 1, 1), threadgroup=(32, 1, 1), output_shapes=[x.shape], output_dtypes=[x.dtype])
    emulator.last.buffers["x"].read_bytes

*Fast* mode computes; *check* mode also watches every memory access (see ``runtime/shadow.h``) and fills in the report.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from . import compiler, launch
from .arrays import as_mlx, bits, from_bits, numpy_dtype
from .launch import SCHEDULES, Argument
from .report import MetalError, Report
from .wrapper import ATTRIBUTES, Definition, Template, wrap

Size = tuple[int, int, int]


class Emulator:
    """Makes kernels and keeps the report of the last launch in ``last``.

    Args:
        mode: ``"fast"`` or ``"check"``.
        schedule: in which order ready threads and threadgroups run: ``"forward"``, ``"reverse"`` or ``"random"``.
        seed: of the random schedule.
        allow_unwritten: in check mode, do not raise for outputs that were not wholly written.
    """

    def __init__(
        self, mode: str = "fast", schedule: str = "forward", seed: int = 0, *, allow_unwritten: bool = False
    ) -> None:
        if mode not in compiler.MODES or schedule not in SCHEDULES:
            raise ValueError(f"[Emulator] unknown mode or schedule; got {mode!r}, {schedule!r}")
        if reason := compiler.unavailable():
            raise MetalError(reason)
        self.mode = mode
        self.schedule = schedule
        self.seed = seed
        self.allow_unwritten = allow_unwritten
        self.n_launches = 0
        self.last: Report | None = None

    def metal_kernel(
        self,
        name: str,
        input_names: Sequence[str],
        output_names: Sequence[str],
        source: str,
        header: str = "",
        ensure_row_contiguous: bool = True,
        atomic_outputs: bool = False,
        compile_options: Any = None,
    ) -> Kernel:
        """A kernel; arguments as for ``mx.fast.metal_kernel``. ``compile_options`` are ignored."""
        return Kernel(
            self,
            Definition(name, input_names, output_names, source, header, ensure_row_contiguous, atomic_outputs),
        )

    def run(
        self, module: compiler.Module, arguments: Sequence[Argument], grid: Size, threadgroup: Size, name: str
    ) -> dict[str, np.ndarray]:
        """Launch a compiled kernel on arguments in the order of its buffers; returns its outputs by name, as bits."""
        self.last = None
        self.n_launches += 1
        options = {"schedule": self.schedule, "seed": self.seed}
        outputs, report = launch.run(module, arguments, grid, threadgroup, name=name, **options)
        self.last = dataclasses.replace(report, n_launches=self.n_launches)
        missing = {output: n for output, n in report.unwritten.items() if n}
        if missing and not self.allow_unwritten:
            listed = ", ".join(f"{n} elements of '{output}'" for output, n in missing.items())
            raise MetalError(f"unwritten: {listed} in {name}")
        return outputs


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A kernel that is called as the one that ``mx.fast.metal_kernel`` returns."""

    emulator: Emulator
    definition: Definition

    def __call__(
        self,
        *,
        inputs: Sequence[Any],
        output_shapes: Sequence[Sequence[int]],
        output_dtypes: Sequence[mx.Dtype],
        grid: Size,
        threadgroup: Size,
        template: Template | None = None,
        init_value: float | None = None,
        verbose: bool = False,
        stream: Any = None,
    ) -> list[mx.array]:
        """Run it; arguments and result as for the kernel that MLX makes."""
        given = self.definition
        if len(inputs) != len(given.input_names):
            raise ValueError(f"[{given.name}] expected {len(given.input_names)} inputs; got {len(inputs)}")
        if not len(output_shapes) == len(output_dtypes) == len(given.output_names):
            raise ValueError(
                f"[{given.name}] expected {len(given.output_names)} outputs; "
                f"got {len(output_shapes)} shapes and {len(output_dtypes)} dtypes"
            )
        arrays = [as_mlx(x) for x in inputs]
        wrapped = wrap(given, arrays, template or (), output_dtypes)
        if verbose:
            print(wrapped.text)
        began = time.perf_counter()
        sources = (*range(len(wrapped.buffers)), *(ATTRIBUTES[name] for name in wrapped.attributes))
        module = compiler.build(wrapped.text, wrapped.function, sources, self.emulator.mode)
        compile_s = time.perf_counter() - began
        inputs_by_name = dict(zip(given.input_names, map(self._laid_out, arrays), strict=True))
        outputs_by_name = {
            name: _output(name, shape, dtype, init_value)
            for name, shape, dtype in zip(given.output_names, output_shapes, output_dtypes, strict=True)
        }
        arguments = [
            outputs_by_name[name] if kind == "output" else _input(kind, name, inputs_by_name[name])
            for kind, name in wrapped.buffers
        ]
        found = self.emulator.run(module, arguments, (*grid,), (*threadgroup,), given.name)
        assert self.emulator.last is not None
        self.emulator.last = dataclasses.replace(self.emulator.last, compile_s=compile_s)
        return [from_bits(found[n], dtype) for n, dtype in zip(given.output_names, output_dtypes, strict=True)]

    def _laid_out(self, array: mx.array) -> np.ndarray:
        data = bits(array)
        return np.ascontiguousarray(data).reshape(data.shape) if self.definition.ensure_row_contiguous else data


def _input(kind: str, name: str, data: np.ndarray) -> Argument:
    """An input, or what goes with it in a buffer of its own."""
    if kind == "shape":
        return Argument(f"{name}_shape", np.array(data.shape, np.int32))
    if kind == "strides":
        return Argument(f"{name}_strides", np.array([s // data.itemsize for s in data.strides], np.int64))
    if kind == "ndim":
        return Argument(f"{name}_ndim", np.array(data.ndim, np.int32))
    return Argument(name, data)


def _output(name: str, shape: Sequence[int], dtype: mx.Dtype, init_value: float | None) -> Argument:
    if init_value is None:
        return Argument(name, np.empty(shape, numpy_dtype(dtype)), is_output=True, is_initialised=False)
    return Argument(name, bits(mx.full(tuple(shape), init_value, dtype)), is_output=True)
