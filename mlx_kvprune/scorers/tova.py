"""Attention of the last query."""

from dataclasses import dataclass

import mlx.core as mx

from mlx_kvprune.scorers.base import Held, Scorer, State


@dataclass(frozen=True)
class Tova(Scorer):
    """``score_i`` = attention weight that the newest query gives token i, mean over all heads of the layer.

    The same for every KV head of a layer, as published. Oren et al. 2024, "Transformers are Multi-State RNNs"
    (arXiv 2401.06104).
    """

    needs = frozenset({"attention"})
    memory = True

    def attended(self, memory: mx.array, weights: mx.array) -> mx.array:
        last = weights[..., -1, :].astype(mx.float32).mean(axis=(1, 2))
        return mx.broadcast_to(last[:, None], memory.shape)

    def score(self, held: Held, state: State) -> mx.array:
        assert held.memory is not None
        return held.memory
