"""The question asks what is held."""

from dataclasses import dataclass

import mlx.core as mx

from mlx_kvprune.scorers.base import Held, Scorer, State, in_text_order, max_pool


@dataclass(frozen=True)
class Probe(Scorer):
    """``score_i`` = the question's attention, max-pooled over ``span`` held neighbours.

    After each block the question's tokens run through the model as temporary queries; what they attend to is remembered
    per slot. The question finds the *place*, the answer lies in the tokens after it: so spans are kept, not tokens.

    Attributes:
        span: width of the pooling, odd.
        keep: share of the older probes' memory that is carried on.
    """

    span: int = 17
    keep: float = 0.0

    needs = frozenset({"attention", "question"})
    memory = True

    def probed(self, memory: mx.array, weights: mx.array) -> mx.array:
        """The memory after the question's weights over what is held ``(B, H_kv, gqa_factor, L, S)``."""
        return self.keep * memory + weights.astype(mx.float32).mean(axis=(2, 3))

    def score(self, held: Held, state: State) -> mx.array:
        assert held.memory is not None
        return in_text_order(held.positions, held.memory, lambda x: max_pool(x, self.span))
