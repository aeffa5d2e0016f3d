"""Attention of an observation window."""

from dataclasses import dataclass

import mlx.core as mx

from mlx_kvprune.scorers.base import (
    Held,
    Scorer,
    Seen,
    State,
    attention_of,
    in_text_order,
    is_count,
    max_pool,
    mean_pool,
    recent,
    require,
)


@dataclass(frozen=True)
class SnapKV(Scorer):
    """``score_i`` = mean attention of the last ``last`` queries, pooled over ``kernel`` neighbours, mean over the query
    heads of the KV head.

    Neighbours are the next slots that are still held, in text order (what a compacted cache would show). Li et al.
    2024, "SnapKV: LLM Knows What You are Looking for Before Generation" (arXiv 2404.14469).

    Attributes:
        last: queries in the observation window.
        kernel: width of the pooling, odd.
        pooling: ``mean`` (the published code's default) or ``max``.
    """

    last: int = 64
    kernel: int = 5
    pooling: str = "mean"

    needs = frozenset({"queries"})

    def check(self) -> None:
        require("last", self.last, is_count(self.last), "64")
        require("kernel", self.kernel, is_count(self.kernel) and self.kernel % 2 == 1, "an odd number such as 5")
        require("pooling", self.pooling, self.pooling in ("mean", "max"), "mean or max")

    def observe(self, state: State, seen: Seen) -> State:
        return recent(state, seen.queries, self.last)

    def score(self, held: Held, state: State) -> mx.array:
        observed = held.observed(self.last)
        if "queries" not in state:  # they were dropped
            return mx.where(observed, mx.inf, 0.0)
        weights = attention_of(state["queries"], held).mean(axis=3)  # (B, H_kv, gqa_factor, S)
        old = held.live[:, :, None] & (held.positions[:, :, None] < held.now - self.last)
        weights = mx.where(old, weights, 0.0)  # as published, the observation window itself is not pooled
        if self.pooling == "mean":  # then the order of the two means does not matter
            weights = weights.mean(axis=2, keepdims=True)
        pool = max_pool if self.pooling == "max" else mean_pool
        positions = mx.broadcast_to(held.positions[:, :, None], weights.shape)
        return mx.where(
            observed, mx.inf, in_text_order(positions, weights, lambda x: pool(x, self.kernel)).mean(axis=2)
        )

    def state_nbytes(self, n_heads: int, head_dim: int) -> int:
        return 4 * n_heads * self.last * head_dim
