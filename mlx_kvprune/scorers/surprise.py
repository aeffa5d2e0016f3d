"""Surprise: what the model did not expect."""

from dataclasses import dataclass

import mlx.core as mx

from mlx_kvprune.scorers.base import Held, Scorer, State, require


@dataclass(frozen=True)
class Surprise(Scorer):
    """``score_i(t) = m_i (1 - forget)^(t - i)`` with ``m_i = momentum * m_(i-1) - log p(x_i | x_<i)``.

    Momentary surprise, past surprise and forgetting after Behrouz et al. 2024, "Titans: Learning to Memorize at Test
    Time" (arXiv 2501.00663), with the token's own surprisal under the model in the place of a gradient. The same for
    all layers and heads. The model's hook writes ``m_i`` into the memory once the logits are known.

    Attributes:
        momentum: share of the past surprise that is carried on from token to token.
        forget: share of a token's score that is lost per token read.
    """

    momentum: float = 0.5
    forget: float = 1 / 1024

    needs = frozenset({"logits"})
    memory = True

    def check(self) -> None:
        require("momentum", self.momentum, 0 <= self.momentum < 1, "0.5")
        require("forget", self.forget, 0 <= self.forget < 1, "0.001")

    def score(self, held: Held, state: State) -> mx.array:
        assert held.memory is not None
        age = (held.now - held.positions).astype(mx.float32)
        return held.memory * mx.exp(age * mx.log1p(mx.array(-self.forget)))

    def shared_nbytes(self, vocab: int) -> int:
        return 4 * (vocab + 1)  # the last logits, and the past surprise

    def carried(self, surprisal: mx.array, past: mx.array) -> mx.array:
        """``m_i`` of new tokens from their surprisal ``(B, L)`` and the last ``m`` before them ``(B,)``."""
        n = surprisal.shape[1]
        lag = mx.arange(n)[:, None] - mx.arange(n)[None]
        powers = mx.where(lag >= 0, mx.power(mx.array(self.momentum), mx.maximum(lag, 0).astype(mx.float32)), 0.0)
        start = past[:, None] * mx.power(mx.array(self.momentum), mx.arange(1, n + 1).astype(mx.float32))
        return surprisal @ powers.T + start
