"""What gates add to the logits of one layer's attention."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx


@dataclass(frozen=True)
class Bias:
    """Of one layer, for ``L`` queries over ``S`` slots, the last ``L`` of them their own.

    Attributes:
        added: to the logits of each KV head's queries ``(H_kv, L / n, S)``: ``n`` neighbouring queries have one in common,
            for a log-sigmoid for each would cost more than the model.
        spared: where nothing is added ``(L, S)`` bool: sinks and the window.
    """

    added: mx.array
    spared: mx.array

    def __call__(self, logits: mx.array) -> mx.array:
        """Logits ``(B, H_kv, group, L, S)`` with the bias, minus infinity for what is to come."""
        split = (*logits.shape[:3], self.added.shape[1], -1, logits.shape[4])
        biased = (logits.reshape(split) + self.added[None, :, None, :, None]).reshape(logits.shape)
        return mx.where(self.ahead, -mx.inf, mx.where(self.spared, logits, biased))

    @property
    def ahead(self) -> mx.array:
        """Which slots are later than the query ``(L, S)`` bool."""
        length, slots = self.spared.shape
        return mx.arange(slots) > mx.arange(slots - length, slots)[:, None]

    def full(self) -> mx.array:
        """All of it ``(H_kv, L, S)``."""
        heads, (length, slots) = self.added.shape[0], self.spared.shape
        return self(mx.zeros((1, heads, 1, length, slots)))[0, :, 0]
