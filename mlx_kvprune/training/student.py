"""The model over a context that the full cache read, whose slots weigh what their gates say."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_kvprune.attach import replaced
from mlx_kvprune.cache import Handle
from mlx_kvprune.training.reading import Reading, flat


class StudentLayer:
    """Stands in the place of one layer's cache: a fixed context, and logits that gates lower.

    Args:
        keys: of the context ``(1, H_kv, c, D)``.
        values: ``(1, H_kv, c, D_v)``.
        bias: added to the logits of each KV head's queries ``(H_kv, L / n, c + L)``: ``n`` neighbours have one in common.
        spared: what no bias is added to ``(L, c + L)`` bool.
    """

    def __init__(self, keys: mx.array, values: mx.array, bias: mx.array, spared: mx.array):
        self.keys, self.values, self.bias, self.spared = keys, values, bias, spared
        self.offset = keys.shape[2]
        ahead = mx.arange(spared.shape[1]) > mx.arange(self.offset, spared.shape[1])[:, None]
        self.causal = mx.where(ahead, -mx.inf, 0.0)

    def stage(self, x: mx.array) -> None:
        """The gates of the segment were read off the full cache's own reading."""

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[Any, Any]:
        shape = (*keys.shape[:2], self.offset + keys.shape[2], keys.shape[3])
        handle = Handle(self, keys, values, shape, keys.dtype)  # type: ignore[arg-type]
        return handle, handle

    def make_mask(self, N: int, return_array: bool = False, window_size: int | None = None) -> Any:
        return "causal" if N > 1 else None

    def attend(self, queries: mx.array, handle: Any, scale: float, mask: Any, sinks: Any) -> mx.array:
        batch, n_heads, length, width = queries.shape
        keys = mx.concatenate([self.keys, handle.keys], axis=2)
        values = mx.concatenate([self.values, handle.values], axis=2)
        heads, slots = keys.shape[1], keys.shape[2]
        grouped = (queries * scale).reshape(batch, heads, -1, width)
        logits = (grouped @ keys.swapaxes(-1, -2)).reshape(batch, heads, n_heads // heads, length, slots)
        logits = mx.where(self.spared, logits, self._biased(logits)) + self.causal
        if sinks is not None:
            extra = mx.broadcast_to(sinks.reshape(1, heads, -1, 1, 1), (*logits.shape[:-1], 1))
            weights = mx.softmax(mx.concatenate([logits, extra], axis=-1), axis=-1)[..., :-1]
        else:
            weights = mx.softmax(logits, axis=-1)
        out = weights.reshape(batch, heads, -1, slots) @ values
        return out.reshape(batch, n_heads, length, -1)


    def _biased(self, logits: mx.array) -> mx.array:
        """``(1, H_kv, group, L, S)`` with the bias added."""
        split = (*logits.shape[:3], self.bias.shape[1], -1, logits.shape[4])
        return (logits.reshape(split) + self.bias[None, :, None, :, None]).reshape(logits.shape)


def run(
    model: nn.Module, reading: Reading, start: int, length: int, biases: Sequence[mx.array], spared: mx.array
) -> mx.array:
    """Logits ``(length, vocab)`` of the tokens ``start .. start + length - 1``, over the full cache's context.

    Args:
        biases: of each bounded layer ``(H_kv, length / n, start + length)``.
        spared: what no bias is added to ``(length, start + length)`` bool.
    """
    whole = lambda x: x[None, :, :start].astype(mx.float32)

    def layer(i: int) -> StudentLayer:
        one = reading.layers[i]
        return StudentLayer(whole(one.keys), whole(one.values), biases[i], spared)

    caches = replaced(model, layer)
    theirs = [c for c in flat(caches) if not isinstance(c, StudentLayer)]
    segment = len(reading.tokens) // len(reading.others) if theirs else 1
    for cache, state in zip(theirs, reading.others[start // segment] if theirs else (), strict=True):
        if state is not None:
            cache.state = state
    logits: Any = model(mx.array(reading.tokens[None, start : start + length]), cache=caches)
    return logits[0]
