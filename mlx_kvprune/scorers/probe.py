"""The question asks what is held."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

from mlx_kvprune.scorers.base import Held, Scorer, State, in_text_order, is_count, max_pool, require


@dataclass(frozen=True)
class Probe(Scorer):
    """``score_i`` = how much the question attends to token i, max-pooled over ``span`` held neighbours.

    Before slots change hands the question's tokens run through the model as temporary queries over what is held. A head's
    attention (the largest over the question's tokens, mean over the query heads of a KV head) is divided by what the head
    gives to all that can be evicted: most of a head's attention goes to sinks and neighbours, which says nothing about the
    question. The largest over all heads and layers is the score of a token, the same everywhere: a few heads know the
    place, and the others would throw away what they need there.

    The question finds the *place*; the answer lies in the tokens around it: so spans are kept, not tokens.

    Attributes:
        span: width of the pooling, odd.
        share: ``model``: one score for all layers and heads; ``head``: each head by its own attention.
    """

    span: int = 17
    share: str = "model"

    needs = frozenset({"attention", "question"})
    memory = True
    remembers_heard = True

    @property
    def probe(self) -> Probe:
        """How the question listens: as this very scorer."""
        return self

    def check(self) -> None:
        require("span", self.span, is_count(self.span) and self.span % 2 == 1, "an odd number such as 17")
        require("share", self.share, self.share in ("model", "head"), "model or head")

    def heard(self, weights: mx.array) -> mx.array:
        """One layer's answer to the question: weights ``(B, H_kv, gqa_factor, L, S)`` -> ``(B, H_kv, S)``."""
        return weights.astype(mx.float32).max(axis=3).mean(axis=2)

    def combined(
        self, heard: list[mx.array], positions: list[mx.array], evictable: list[mx.array], now: int
    ) -> list[mx.array]:
        """What each layer remembers, from what all layers heard; they may hold different tokens, in any order.

        Args:
            heard: per layer ``(B, H_kv, S)``.
            positions: per layer, which tokens these are ``(B, H_kv, S)`` int32; negative where a slot is empty.
            evictable: per layer ``(B, H_kv, S)`` bool; False for sinks and window.
            now: one more than the largest position.
        """
        shares = [mx.where(may_go, x, 0.0) for x, may_go in zip(heard, evictable, strict=True)]
        shares = [x / mx.maximum(x.sum(axis=-1, keepdims=True), 1e-9) for x in shares]
        if self.share != "model":
            return shares
        rows = mx.arange(heard[0].shape[0])[:, None, None]
        best = mx.zeros((heard[0].shape[0], now + 1))  # one entry a token, and one for empty slots
        index = [mx.where(x < 0, now, x) for x in positions]
        for share, at in zip(shares, index, strict=True):
            best = best.at[rows, at].maximum(share)
        return [best[rows, at] for at in index]

    def score(self, held: Held, state: State) -> mx.array:
        assert held.memory is not None
        return in_text_order(held.positions, held.memory, lambda x: max_pool(x, self.span))
