"""StreamingLLM: the first tokens and the newest ones."""

from dataclasses import dataclass

import mlx.core as mx

from mlx_kvprune.scorers.base import Held, Scorer, State


@dataclass(frozen=True)
class Window(Scorer):
    """``score_i = position_i``: sinks + recency, the control that everything else must beat.

    Xiao et al. 2023, "Efficient Streaming Language Models with Attention Sinks" (arXiv 2309.17453).
    """

    def score(self, held: Held, state: State) -> mx.array:
        return held.positions.astype(mx.float32)
