"""MLX arrays as NumPy arrays and back; NumPy has no bfloat16, so its bits travel as uint16."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np


def as_mlx(value: Any) -> mx.array:
    """An input as MLX takes it: arrays as they are, Python and NumPy values converted."""
    return value if isinstance(value, mx.array) else mx.array(value)


def numpy_dtype(dtype: mx.Dtype) -> np.dtype:
    """The NumPy dtype with the same bits."""
    return np.dtype(np.uint16 if dtype == mx.bfloat16 else str(dtype).removeprefix("mlx.core.").removesuffix("_"))


def bits(array: mx.array) -> np.ndarray:
    """An array's bits, with its strides."""
    mx.eval(array)
    return np.array(array.view(mx.uint16) if array.dtype == mx.bfloat16 else array, copy=False)


def from_bits(array: np.ndarray, dtype: mx.Dtype) -> mx.array:
    """The MLX array with these bits."""
    out = mx.array(array)
    return out.view(mx.bfloat16) if dtype == mx.bfloat16 else out
