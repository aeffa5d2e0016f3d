"""The model over a context that the full cache read, whose slots weigh what their gates say."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_kvprune.attach import replaced
from mlx_kvprune.cache import Handle
from mlx_kvprune.forward import leaves
from mlx_kvprune.numerics import softmax_beside
from mlx_kvprune.training.bias import Bias
from mlx_kvprune.training.reading import SEGMENT, Reading

LEAST = -10.0  # a bias below which a slot counts as evicted; gradients on a novel are the same to 4e-5 (LOG.md)


class StudentLayer:
    """Stands in the place of one layer's cache: a fixed context, and logits that gates lower.

    Args:
        keys: of the context ``(1, H_kv, c, D)``.
        values: ``(1, H_kv, c, D_v)``.
        bias: what gates add to the logits.
        offset: position of the next token: there may be fewer keys.
    """

    def __init__(self, keys: mx.array, values: mx.array, bias: Bias, offset: int):
        self.keys, self.values, self.bias, self.offset = keys, values, bias, offset

    def stage(self, x: mx.array) -> None:
        """The gates of the segment were read off the full cache's own reading."""

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[Any, Any]:
        shape = (*keys.shape[:2], self.keys.shape[2] + keys.shape[2], keys.shape[3])
        self.handle = Handle(self, keys, values, shape, keys.dtype)  # type: ignore[arg-type]
        return self.keys_and_values()

    def keys_and_values(self) -> tuple[Any, Any]:
        """For later layers that share these keys."""
        return self.handle, self.handle

    def make_mask(self, N: int, return_array: bool = False, window_size: int | None = None) -> Any:
        return "causal" if N > 1 else None

    def attend(self, queries: mx.array, handle: Any, scale: float, mask: Any, sinks: Any) -> mx.array:
        batch, n_heads, length, width = queries.shape
        keys = mx.concatenate([self.keys, handle.keys], axis=2)
        values = mx.concatenate([self.values, handle.values], axis=2)
        heads, slots = keys.shape[1], keys.shape[2]
        grouped = (queries * scale).reshape(batch, heads, -1, width)
        logits = (grouped @ keys.swapaxes(-1, -2)).reshape(batch, heads, n_heads // heads, length, slots)
        weights = softmax_beside(self.bias(logits), sinks)
        out = weights.reshape(batch, heads, -1, slots) @ values
        return out.reshape(batch, n_heads, length, -1).astype(queries.dtype)


class LiveLayer(StudentLayer):
    """A layer without a context, whose biases are made of the attention's own input: gates that train with their model.

    Args:
        bias_of: gives the bias for attention inputs ``(L, width)``.
    """

    def __init__(self, bias_of: Callable[[mx.array], Bias]):
        self.bias_of, self.offset = bias_of, 0
        self.staged: mx.array | None = None

    def stage(self, x: mx.array) -> None:
        """Whose keys come next counts: a later layer that shares them has an input of its own."""
        self.staged = x[0]

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[Any, Any]:
        assert self.staged is not None
        self.bias = self.bias_of(self.staged)
        self.keys, self.values = keys[:, :, :0], values[:, :, :0]
        return super().update_and_fetch(keys, values)


def run(model: nn.Module, reading: Reading, start: int, length: int, biases: Sequence[Bias]) -> mx.array:
    """Logits ``(length, vocab)`` of the tokens ``start .. start + length - 1``, over the full cache's context.

    Args:
        biases: of each bounded layer.
    """

    def layer(i: int) -> StudentLayer:
        one, bias = reading.layers[i], biases[i]
        keys, values = one.keys[:, :start], one.values[:, :start]
        if (ids := bias.near(LEAST)) is not None:
            keys, values = (mx.take_along_axis(x, ids[..., None], axis=1) for x in (keys, values))
            bias = bias.of(ids)
        return StudentLayer(keys[None].astype(mx.float32), values[None].astype(mx.float32), bias, start)

    caches = replaced(model, layer)
    theirs = [c for c in leaves(caches) if not isinstance(c, StudentLayer)]
    for cache, state in zip(theirs, reading.others[start // SEGMENT] if theirs else (), strict=True):
        if state is not None:
            cache.state = state
    logits: Any = model(mx.array(reading.tokens[None, start : start + length]), cache=caches)
    return logits[0]


def run_live(model: nn.Module, tokens: mx.array, bias_of: Callable[[int, mx.array], Bias]) -> mx.array:
    """Logits ``(L, vocab)`` of a whole text ``(L,)``; ``bias_of(layer, x)`` gives the biases of its own inputs."""
    caches = replaced(model, lambda layer: LiveLayer(functools.partial(bias_of, layer)))
    logits: Any = model(tokens[None], cache=caches)
    return logits[0]
