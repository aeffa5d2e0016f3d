"""Attention of the last query."""

from dataclasses import dataclass

import mlx.core as mx

from mlx_kvprune.scorers.base import Held, Scorer, State


@dataclass(frozen=True)
class Tova(Scorer):
    """``score_i`` = attention weight that the newest query gives token i, mean over all heads of the layer.

    The same for every KV head of a layer, as published: so ``head_adaptive`` finds nothing to share out. Where heads hold
    different tokens all the same (``global``), the mean is over those that hold the token. Oren et al. 2024, "Transformers
    are Multi-State RNNs" (arXiv 2401.06104).
    """

    needs = frozenset({"attention"})
    memory = True

    def attended(self, memory: mx.array, weights: mx.array) -> mx.array:
        return weights[..., -1, :].astype(mx.float32).mean(axis=2)

    def score(self, held: Held, state: State) -> mx.array:
        assert held.memory is not None
        if not held.ragged:
            return mx.broadcast_to(held.memory.mean(axis=1, keepdims=True), held.memory.shape)
        at = mx.where(held.live, held.positions, held.now)  # one entry a token, and one for empty slots
        rows = mx.arange(at.shape[0])[:, None, None]
        none = mx.zeros((at.shape[0], held.now + 1))
        total, heads = none.at[rows, at].add(held.memory), none.at[rows, at].add(mx.ones(at.shape))
        return (total / mx.maximum(heads, 1))[rows, at]
