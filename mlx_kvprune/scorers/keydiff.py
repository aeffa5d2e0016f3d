"""Key diversity."""

from dataclasses import dataclass

import mlx.core as mx

from mlx_kvprune.scorers.base import Held, Scorer, State


@dataclass(frozen=True)
class KeyDiff(Scorer):
    """``score_i = -cos(k_i, mean_j k_j / ||k_j||)`` over everything held: keys unlike the others are kept.

    Park et al. 2025, "KeyDiff: Key Similarity-Based KV Cache Eviction" (arXiv 2504.15364).
    """

    def score(self, held: Held, state: State) -> mx.array:
        keys = held.keys.astype(mx.float32)
        keys = keys / mx.maximum(mx.linalg.norm(keys, axis=-1, keepdims=True), 1e-12)
        anchor = mx.where(held.live[..., None], keys, 0.0).sum(axis=2, keepdims=True)  # its length does not matter
        anchor = anchor / mx.maximum(mx.linalg.norm(anchor, axis=-1, keepdims=True), 1e-12)
        return -(keys * anchor).sum(axis=-1)
