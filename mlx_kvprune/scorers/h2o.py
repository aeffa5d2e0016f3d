"""Heavy hitters: accumulated attention."""

from dataclasses import dataclass

import mlx.core as mx

from mlx_kvprune.scorers.base import Held, Scorer, State


@dataclass(frozen=True)
class H2O(Scorer):
    """``score_i = sum_t a[t, i]``: all attention that token i has received, summed over queries and the query heads of
    its KV head.

    Zhang et al. 2023, "H2O: Heavy-Hitter Oracle for Efficient Generative Inference" (arXiv 2306.14048).
    """

    needs = frozenset({"attention"})
    memory = True

    def attended(self, memory: mx.array, weights: mx.array) -> mx.array:
        return memory + weights.astype(mx.float32).sum(axis=(2, 3))

    def score(self, held: Held, state: State) -> mx.array:
        assert held.memory is not None
        return held.memory
