"""Importance minus redundancy."""

from dataclasses import dataclass

import mlx.core as mx

from mlx_kvprune.numerics import softmax
from mlx_kvprune.scorers.base import Held, Scorer, Seen, State, in_text_order, is_count, max_pool, recent, require


@dataclass(frozen=True)
class RKV(Scorer):
    """``score = mix * importance - (1 - mix) * redundancy``.

    Importance: mean attention of the last ``last`` queries to what is older than they are, by the largest logits of the
    query heads of the KV head, max-pooled over ``kernel`` held neighbours.

    Redundancy: softmax over the slots of the mean cosine similarity of a key to the
    other keys, where each key's latest near-duplicate (similarity above ``threshold``) is not held against that
    duplicate. Quadratic in the slots held. Cai et al. 2025, "R-KV: Redundancy-aware KV Cache Compression for Reasoning
    Models" (arXiv 2505.24133).

    Attributes:
        last: queries whose attention counts.
        kernel: width of the pooling, odd.
        mix: weight of importance; the rest is that of redundancy.
        threshold: cosine similarity above which two keys are near-duplicates.
    """

    last: int = 8
    kernel: int = 7
    mix: float = 0.1
    threshold: float = 0.5

    needs = frozenset({"queries"})

    def check(self) -> None:
        require("last", self.last, is_count(self.last), "8")
        require("kernel", self.kernel, is_count(self.kernel) and self.kernel % 2 == 1, "an odd number such as 7")
        require("mix", self.mix, 0 <= self.mix <= 1, "0.1")

    def observe(self, state: State, seen: Seen) -> State:
        return recent(state, seen.queries, self.last)

    def score(self, held: Held, state: State) -> mx.array:
        scores = -(1 - self.mix) * redundancy(held.keys, held.positions, self.threshold)
        if "queries" in state:  # else they were dropped
            attention = past_attention(state["queries"], held)
            scores = scores + self.mix * in_text_order(held.positions, attention, lambda x: max_pool(x, self.kernel))
        return mx.where(held.observed(self.last), mx.inf, scores)

    def state_nbytes(self, n_heads: int, head_dim: int) -> int:
        return 4 * n_heads * self.last * head_dim


def past_attention(queries: mx.array, held: Held) -> mx.array:
    """Mean attention of the newest queries ``(B, H_q, w, D)`` to what is older than they are ``(B, H_kv, S)``.

    The largest logits of the query heads of a KV head are taken before the softmax, as in the published code.
    """
    batch, n_heads, w, width = queries.shape
    kv_heads = held.keys.shape[1]
    grouped = held.in_place(queries).reshape(batch, kv_heads, n_heads // kv_heads, w, width) * held.scale
    logits = (grouped @ held.keys[:, :, None].swapaxes(-1, -2)).max(axis=2).astype(mx.float32)
    old = held.live[:, :, None] & (held.positions[:, :, None] < held.now - w)
    return softmax(mx.where(old, logits, -mx.inf)).mean(axis=2)


def redundancy(keys: mx.array, positions: mx.array, threshold: float) -> mx.array:
    """How much each key repeats the others ``(B, H_kv, S, D) -> (B, H_kv, S)``; sums to one over the slots."""
    keys = keys.astype(mx.float32)
    keys = keys / mx.maximum(mx.linalg.norm(keys, axis=-1, keepdims=True), 1e-8)
    live = positions >= 0
    similar = (keys @ keys.swapaxes(-1, -2)) * (1 - mx.eye(keys.shape[2]))
    similar = mx.where(live[:, :, None, :] & live[..., None], similar, 0.0)
    when = mx.where(similar > threshold, positions[:, :, None, :], -1)
    latest = when.max(axis=-1, keepdims=True)
    spared = (when == latest) & (latest >= 0)
    mean = mx.where(spared, 0.0, similar).sum(axis=-2) / live.sum(axis=-1, keepdims=True)
    return mx.softmax(mx.where(live, mean, -mx.inf), axis=-1)
