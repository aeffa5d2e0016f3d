"""Attention of the last query."""

from dataclasses import dataclass

import mlx.core as mx

from mlx_kvprune.scorers.base import Held, Scorer, State


@dataclass(frozen=True)
class Tova(Scorer):
    """``score_i`` = attention weight that the newest query gives token i, mean over all heads of the layer.

    The same for every KV head of a layer, as published. Oren et al. 2024, "Transformers are Multi-State RNNs"
    (arXiv 2401.06104). Where heads compete for slots (``head_adaptive``, ``global``) each KV head scores by its own query
    heads: with one score for all of them there would be nothing to share out.
    """

    needs = frozenset({"attention"})
    memory = True

    def attended(self, memory: mx.array, weights: mx.array) -> mx.array:
        return weights[..., -1, :].astype(mx.float32).mean(axis=2)

    def score(self, held: Held, state: State) -> mx.array:
        assert held.memory is not None
        if held.ragged:
            return held.memory
        return mx.broadcast_to(held.memory.mean(axis=1, keepdims=True), held.memory.shape)
