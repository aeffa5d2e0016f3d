"""How a kernel of ``metal/`` is built and called: on Metal, on CUDA, or by what a test puts in their place."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, cast

import mlx.core as mx

from mlx_kvprune.places import shipped

Builder = Callable[..., Callable[..., list[mx.array]]]
Size = tuple[int, int, int]
SIMD = 32  # threads that run in step
BODY = "// ---- body"  # what stands before this line in a kernel's file is functions, what follows is the kernel
LEAST = 8  # an input with fewer elements is handed over in another address space
launches: Counter[str] = Counter()  # calls of each kernel in this process
_stand_in: ContextVar[Builder | None] = ContextVar("stand_in", default=None)


@dataclass(frozen=True)
class Kernel:
    """A kernel of ``metal/``; it is built at its first call, once.

    Attributes:
        name: its file is ``metal/<name>.metal``.
        inputs: names of its inputs.
        outputs: of its outputs.
    """

    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]

    def __call__(
        self,
        inputs: Sequence[mx.array],
        *,
        template: Sequence[tuple[str, Any]],
        grid: Size,
        threadgroup: Size,
        output_shapes: Sequence[tuple[int, ...]],
        output_dtypes: Sequence[mx.Dtype],
    ) -> list[mx.array]:
        """Run it.

        Args:
            inputs: arrays, each of ``LEAST`` elements or more (see ``enough``); not copied, whatever their strides.
            template: constants by name: int, bool or MLX type.
            grid: threads in all; a multiple of ``threadgroup``.
            threadgroup: threads that share memory.
            output_shapes: of the outputs.
            output_dtypes: likewise.
        """
        assert all(x.size >= LEAST for x in inputs), "pad small inputs with ``enough``"
        assert all(n % own == 0 for n, own in zip(grid, threadgroup, strict=True)), "only full threadgroups"
        launches[self.name] += 1
        built = _build(self, _stand_in.get() or _builder())
        return built(
            inputs=list(inputs),
            template=list(template),
            grid=grid,
            threadgroup=threadgroup,
            output_shapes=list(output_shapes),
            output_dtypes=list(output_dtypes),
        )

    def text(self) -> tuple[str, str]:
        """What stands in its file: ``(header, body)``, other files that it includes by name filled in."""
        return _text(self.name)


@contextmanager
def stand_in(builder: Builder) -> Iterator[None]:
    """While this is entered, kernels are built by ``builder``, which is called like ``mx.fast.metal_kernel``."""
    token = _stand_in.set(builder)
    try:
        yield
    finally:
        _stand_in.reset(token)


def engine() -> str:
    """What runs kernels here: ``metal``, ``cuda``, ``stand-in``, or nothing."""
    if _stand_in.get():
        return "stand-in"
    if mx.default_device().type != mx.DeviceType.gpu:
        return ""
    return "metal" if mx.metal.is_available() else "cuda"


def enough(x: mx.array) -> mx.array:
    """``x`` flat, with zeros up to ``LEAST`` elements, if it has fewer; else as it is."""
    return x if x.size >= LEAST else mx.pad(x.reshape(-1), (0, LEAST - x.size))


def folder() -> Path:
    """The ``metal/`` directory: beside the package in a checkout, inside it in an installed wheel."""
    return shipped("metal")


def _builder() -> Builder:
    if mx.metal.is_available():
        return cast(Builder, mx.fast.metal_kernel)
    from mlx_kvprune.kernels.cuda_adapter import cuda_kernel

    return cast(Builder, cuda_kernel)


@cache
def _build(kernel: Kernel, builder: Builder) -> Callable[..., list[mx.array]]:
    header, source = kernel.text()
    return builder(
        name=kernel.name,
        input_names=list(kernel.inputs),
        output_names=list(kernel.outputs),
        source=source,
        header=header,
        ensure_row_contiguous=False,
    )


@cache
def _text(name: str) -> tuple[str, str]:
    header, body = _filled(f"{name}.metal").split(BODY + "\n")
    return header, body


def _filled(file: str) -> str:
    """A file of ``metal/`` with the files that it includes filled in."""
    text = (folder() / file).read_text(encoding="utf-8")
    return re.sub(r'^#include "([\w.]+)"\n', lambda match: _filled(match[1]), text, flags=re.MULTILINE)
