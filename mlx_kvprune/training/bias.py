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
        return logits + self.full()[None, :, None]

    @property
    def ahead(self) -> mx.array:
        """Which slots are later than the query ``(L, S)`` bool."""
        length, slots = self.spared.shape
        return mx.arange(slots) > mx.arange(slots - length, slots)[:, None]

    def full(self) -> mx.array:
        """All of it ``(H_kv, L, S)``: by sums and products, which cost the CPU backend a tenth of ``mx.where``."""
        heads, (length, slots) = self.added.shape[0], self.spared.shape
        counts = (1.0 - self.spared.astype(mx.float32)).reshape(self.added.shape[1], -1, slots)
        biased = (self.added[:, :, None] * counts).reshape(heads, length, slots)
        return biased + mx.where(self.ahead, -mx.inf, 0.0)
