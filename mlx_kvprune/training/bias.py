"""What gates add to the logits of one layer's attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import mlx.core as mx

NEARLY_ALL = 0.8  # of the slots: to leave out the others is not worth the trouble


@dataclass(frozen=True)
class Bias:
    """Of one layer, for ``L`` queries over ``S`` slots, the last ``L`` of them their own.

    Attributes:
        added: to the logits of each KV head's queries ``(H_kv, L / n, S)``: ``n`` neighbouring queries have one in common,
            for a log-sigmoid for each would cost more than the model.
        spared: where nothing is added ``(L, S)`` bool: sinks and the window; ``(H_kv, L, S)`` where heads have other slots.
    """

    added: mx.array
    spared: mx.array

    def __call__(self, logits: mx.array) -> mx.array:
        """Logits ``(B, H_kv, group, L, S)`` with the bias, minus infinity for what is to come."""
        return logits + self.full()[None, :, None]

    @property
    def ahead(self) -> mx.array:
        """Which slots are later than the query ``(L, S)`` bool."""
        length, slots = self.spared.shape[-2:]
        return mx.arange(slots) > mx.arange(slots - length, slots)[:, None]

    def full(self) -> mx.array:
        """All of it ``(H_kv, L, S)``: by sums and products, which cost the CPU backend a tenth of ``mx.where``."""
        (heads, groups), (length, slots) = self.added.shape[:2], self.spared.shape[-2:]
        counts = (1.0 - self.spared.astype(mx.float32)).reshape(*self.spared.shape[:-2], groups, -1, slots)
        biased = (self.added[:, :, None] * counts).reshape(heads, length, slots)
        return biased + mx.where(self.ahead, -mx.inf, 0.0)

    def near(self, least: float) -> mx.array | None:
        """The slots before the queries' own that any of these queries sees with a bias above ``least``: ``(H_kv, n)``, rising.

        As many of each head as of the one that has most; None if they are nearly all.
        """
        context = self.spared.shape[-1] - self.spared.shape[-2]
        added = mx.stop_gradient(self.added[..., :context]).max(axis=1)
        seen = mx.where(self.spared[..., :context].any(axis=-2), 0.0, added)
        n: Any = (seen > least).sum(axis=-1).max().item()
        if n > NEARLY_ALL * context:
            return None
        return mx.sort(mx.argsort(-seen, axis=-1)[:, :n], axis=-1)

    def of(self, ids: mx.array) -> Bias:
        """The same where a head has no other slots before the queries' own than these ``(H_kv, n)``."""
        length, slots = self.spared.shape
        own = mx.broadcast_to(mx.arange(slots - length, slots), (ids.shape[0], length))
        ids = mx.concatenate([ids, own], axis=-1)
        return Bias(mx.take_along_axis(self.added, ids[:, None], axis=-1), self.spared[:, ids].swapaxes(0, 1))
