"""Expected attention of queries that are still to come."""

from dataclasses import dataclass

import mlx.core as mx

from mlx_kvprune.numerics import softmax
from mlx_kvprune.rope import Rope, position_scale, unrotate
from mlx_kvprune.scorers.base import Held, Scorer, Seen, State, is_count, require


@dataclass(frozen=True)
class ExpectedAttention(Scorer):
    """``score_i = softmax_i(s k_i . m + s^2/2 k_i' C k_i) * ||v_i||``, mean over the query heads of the KV head.

    ``m`` and ``C`` are mean and covariance of the queries before rotation, over the text so far without its sinks,
    turned by the mean rotation of the next ``future`` positions; ``s`` is the scale of the attention logits. Devoto et
    al. 2025, "Expected Attention: KV Cache Compression by Estimating Attention from Future Queries Distribution".

    Attributes:
        future: how many positions ahead are averaged over.
        n_sink: first queries that are left out of the statistics.
        covariance: whether the second-order term is used.
        value_norm: whether scores are multiplied by the norm of the value.
    """

    future: int = 512
    n_sink: int = 4
    covariance: bool = True
    value_norm: bool = True

    needs = frozenset({"queries", "rope"})

    def check(self) -> None:
        require("future", self.future, is_count(self.future), "512")

    def observe(self, state: State, seen: Seen) -> State:
        queries, start = seen.queries, seen.start
        if start < self.n_sink:
            queries, start = queries[:, :, self.n_sink - start :], self.n_sink
        if queries.shape[2] == 0:
            return state
        plain = (unrotate(seen.rope, queries, start) if seen.turned else queries).astype(mx.float32)
        new = {"sum": plain.sum(axis=2), "outer": plain.swapaxes(-1, -2) @ plain, "count": mx.array([plain.shape[2]])}
        if "turn" in state:
            return {**state, **{name: state[name] + x for name, x in new.items()}}
        return {**new, "turn": mean_rotation(seen.rope, queries.shape[-1], self.future)}

    def score(self, held: Held, state: State) -> mx.array:
        n = mx.maximum(state["count"], 1)
        turn = rotated(held.rope, state["turn"], held.next)
        mean = state["sum"] / n
        spread = state["outer"] / n - mean[..., :, None] * mean[..., None, :]
        keys = held.keys.astype(mx.float32)[:, :, None]  # (B, H_kv, 1, S, D)
        batch, n_heads, width = mean.shape
        grouped = (batch, keys.shape[1], n_heads // keys.shape[1])
        mean = (mean @ turn).reshape(*grouped, width, 1)
        logits = held.scale * (keys @ mean)[..., 0]
        if self.covariance:
            spread = (turn.T @ spread @ turn).reshape(*grouped, width, width)
            logits = logits + held.scale**2 / 2 * ((keys @ spread) * keys).sum(axis=-1)
        n_sink = self.n_sink if held.sinks is None else min(self.n_sink, held.sinks)
        sinks = held.positions[:, :, None] < n_sink  # always kept (or empty): as published, they take no share
        weights = softmax(mx.where(sinks, -mx.inf, logits)).mean(axis=2)
        if not self.value_norm:
            return weights
        return weights * mx.linalg.norm(held.values.astype(mx.float32), axis=-1)

    def state_nbytes(self, n_heads: int, head_dim: int) -> int:
        return 4 * (n_heads * head_dim * (head_dim + 1) + head_dim * head_dim + 1)


def mean_rotation(rope: Rope, width: int, future: int) -> mx.array:
    """Mean of the rotations by ``0 .. future - 1`` positions as a matrix: ``x @ matrix`` for a row ``x`` ``(D,)``."""
    rows = mx.broadcast_to(mx.eye(width)[None, :, None], (1, width, future, width))
    return rotated_rows(rope, rows, 0).mean(axis=2)[0]


def rotated(rope: Rope, matrix: mx.array, offset: int) -> mx.array:
    """``matrix`` followed by the rotation to position ``offset``."""
    return rotated_rows(rope, matrix[None, :, None], offset)[0, :, 0]


def rotated_rows(rope: Rope, rows: mx.array, offset: int) -> mx.array:
    """Rotation without the factor that some types of RoPE multiply in."""
    if rope is None:
        return rows
    return rope(mx.array(rows), offset=offset) / position_scale(rope, rows.shape[-1])
