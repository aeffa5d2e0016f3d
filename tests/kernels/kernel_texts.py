"""The texts of the kernels that something launches, for the compilers that check them without running them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
from metal_emulator import Definition

from mlx_kvprune.kernels import launch


@dataclass
class Texts:
    """Stands in for ``mx.fast.metal_kernel``: computes zeros, and keeps what ``mlx_text`` and ``cuda_text`` take."""

    found: list[tuple[Any, ...]] = field(default_factory=list)

    def metal_kernel(self, **definition: Any) -> Callable[..., list[mx.array]]:
        def call(inputs, template, output_shapes, output_dtypes, **_: Any) -> list[mx.array]:
            self.found.append((Definition(**definition), inputs, template, output_dtypes))
            return [mx.zeros(shape, dtype) for shape, dtype in zip(output_shapes, output_dtypes, strict=True)]

        return call


def texts_of(launches: Callable[[], object]) -> list[tuple[Any, ...]]:
    """Arguments of ``mlx_text`` and ``cuda_text`` for each kernel that ``launches`` launches."""
    texts = Texts()
    with launch.stand_in(texts.metal_kernel):
        launches()
    return texts.found
