"""Exponentials and their kin. To the base of two: MLX's CPU backend takes a third of the time of ``mx.exp`` for them."""

from __future__ import annotations

import math
from typing import Any

import mlx.core as mx

LOG2_E = math.log2(math.e)


def device(x: Any) -> mx.array:
    """A NumPy array as an MLX array (its type stubs do not say that it takes one)."""
    return mx.array(x)


def exp2(x: mx.array) -> mx.array:
    """Two to the ``x``."""
    return mx.power(mx.array(2.0, x.dtype), x)


def softmax(x: mx.array) -> mx.array:
    """Softmax along the last axis, float32; ``-inf`` gets zero unless all of a row is. Has a gradient."""
    weights: Any = _softmax(x.astype(mx.float32))
    return weights


def softmax_beside(logits: mx.array, sinks: mx.array | None) -> mx.array:
    """Softmax over slots where a model adds learned sinks to the denominator (gpt_oss); they get no weight of their own.

    Args:
        logits: ``(B, H_kv, group, L, S)``.
        sinks: logits of the sinks ``(H_q,)``, or None.
    """
    if sinks is None:
        return softmax(logits)
    column = mx.broadcast_to(sinks.reshape(1, logits.shape[1], -1, 1, 1), (*logits.shape[:-1], 1))
    return softmax(mx.concatenate([logits, column], axis=-1))[..., :-1]


@mx.custom_function
def _softmax(x: mx.array) -> mx.array:
    weights = exp2((x - x.max(axis=-1, keepdims=True)) * LOG2_E)
    return weights / weights.sum(axis=-1, keepdims=True)


@_softmax.vjp
def _softmax_vjp(x: Any, cotangent: mx.array, out: mx.array) -> mx.array:
    """From the output, without the logarithms that the gradient of a power takes."""
    product = out * cotangent
    return product - out * product.sum(axis=-1, keepdims=True)


def log_sigmoid(x: mx.array) -> mx.array:
    """``log(1 / (1 + exp(-x)))``, float32; exact for large ``x``, where it is ``-exp(-x)``."""
    x = x.astype(mx.float32)
    return mx.minimum(x, 0.0) - mx.log1p(mx.exp(-mx.abs(x)))
