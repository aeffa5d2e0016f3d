"""What the student is told: how its slots weigh, how far its output is from the full cache's, what its gates may hold.

Two ways to make eviction differentiable, for the same rule at inference (rank by ``(t + 1 - i) log beta_i``):

``decay``   TRIM-KV's: the weight of slot i at time t is multiplied by ``beta_i^(t - i)``, and a penalty keeps the sum of these
            weights at the budget.
``budget``  ours: ``(t - i) log beta_i`` ranks as ``s_i(t) = -log(-log beta_i) - log(t - i)`` does. Over all heads, the threshold
            ``tau(t)`` is found at which as many slots stay as the budget has, floors of heads counted; the weight of a slot
            is multiplied by ``sigmoid((s_i - tau) / temperature)``. At temperature zero that is the cache itself.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from mlx_kvprune.scorers.gated import log_sigmoid
from mlx_kvprune.settings import PAGE

STEP = 64  # queries that share a threshold


@dataclass(frozen=True)
class Bounds:
    """What the student may hold.

    Attributes:
        slots: per KV head on average, everything counted.
        window: the newest tokens, never evicted.
        block: tokens between two upkeeps, held beside them.
        n_sink: first tokens, never evicted.
        head_floor: share of an equal pool that every head keeps.
        shared: all heads of all layers compete; else each has its own budget.
    """

    slots: int
    window: int = 16
    block: int = 128
    n_sink: int = 4
    head_floor: float = 0.2
    shared: bool = True

    @property
    def pool(self) -> int:
        """Slots per head that are competed for."""
        return max(1, self.slots - self.window - self.block - self.n_sink)


def worth(raw: mx.array) -> mx.array:
    """``-log(-log sigmoid(raw))``: the static part of a retention score's rank; about ``raw`` where that is large."""
    return -mx.log(mx.maximum(-log_sigmoid(raw), 1e-30))


def ages(start: int, length: int) -> mx.array:
    """``t - i`` of queries and keys ``(length, start + length)``, float32."""
    at = mx.arange(start, start + length)[:, None]
    return (at - mx.arange(start + length)[None]).astype(mx.float32)


def decay_biases(raws: Sequence[mx.array], start: int, length: int, bounds: Bounds) -> list[mx.array]:
    """TRIM-KV's: ``(t - i) log beta_i``; of each layer ``(H_kv, length, start + length)``."""
    age = mx.maximum(ages(start, length), 0.0)
    return [age * log_sigmoid(raw)[:, None] for raw in raws]


def held_by_decay(raws: Sequence[mx.array], start: int, length: int, bounds: Bounds) -> mx.array:
    """TRIM-KV's capacity loss at the times of a segment: what the decayed weights sum to beyond the budget.

    ``mean_t max(0, sum_i beta_i^(t - i) - M) / max(t - M, 1)``: over each head, or over all of them together.
    """
    times = mx.arange(start + STEP - 1, start + length, STEP)[:, None]
    age = (times - mx.arange(start + length)[None]).astype(mx.float32)
    sums = []
    for raw in raws:
        weights = mx.exp(mx.maximum(age, 0.0) * log_sigmoid(raw)[:, None])
        sums.append(mx.where(age < 0, 0.0, weights).sum(axis=-1))  # (H_kv, times)
    held = mx.concatenate(sums)
    held = held.mean(axis=0, keepdims=True) if bounds.shared else held
    over = mx.maximum(held - bounds.slots, 0.0)
    return (over / mx.maximum(times[:, 0] - bounds.slots, 1)).mean()


def budget_biases(
    raws: Sequence[mx.array], start: int, length: int, bounds: Bounds, temperature: float
) -> list[mx.array]:
    """Ours: log of the chance that a slot is still held; of each layer ``(H_kv, length / STEP, start + length)``."""
    worths = [worth(raw) for raw in raws]
    taus = thresholds(worths, start, length, bounds)  # (heads, length / STEP)
    middle = mx.arange(start + STEP // 2, start + length, STEP)[:, None]
    log_age = mx.log(mx.maximum((middle - mx.arange(start + length)).astype(mx.float32), 1.0))
    out, first = [], 0
    for one in worths:
        tau = mx.array(taus[first : first + one.shape[0]])[:, :, None]
        first += one.shape[0]
        out.append(log_sigmoid((one[:, None] - log_age - tau) / temperature))
    return out


def spared(start: int, length: int, bounds: Bounds, window: bool = True) -> mx.array:
    """Sinks and, if wanted, the window: slots that are held in any case ``(length, start + length)`` bool."""
    sinks = mx.broadcast_to(mx.arange(start + length) < bounds.n_sink, (length, start + length))
    return sinks | (ages(start, length) < bounds.window) if window else sinks


def thresholds(worths: Sequence[mx.array], start: int, length: int, bounds: Bounds) -> np.ndarray:
    """The score at which a slot is just held, of each head and ``STEP`` queries ``(heads, length / STEP)``; no gradient."""
    static = np.concatenate([np.array(mx.stop_gradient(x)) for x in worths])  # (heads, start + length)
    columns = []
    for first in range(start, start + length, STEP):
        stop = min(first + STEP, start + length)
        now = (first + stop) // 2
        of = np.arange(bounds.n_sink, max(bounds.n_sink, now - bounds.window))
        scores = static[:, of] - np.log(now - of) if len(of) else np.zeros((len(static), 0))
        columns.append(_levels(scores, bounds))
    return np.stack(columns, axis=1).astype(np.float32)


def _levels(scores: np.ndarray, bounds: Bounds) -> np.ndarray:
    """The threshold of each head, from the scores of what it could hold ``(heads, n)``."""
    heads, n = scores.shape
    if n <= bounds.pool:
        return np.full(heads, -1e9)
    ranked = -np.sort(-scores, axis=1)
    if not bounds.shared:
        return ranked[:, bounds.pool - 1]
    floor = min(bounds.pool, PAGE * math.ceil(bounds.head_floor * bounds.pool / PAGE))
    lowest = ranked[:, floor - 1] if floor else np.full(heads, np.inf)
    rest = ranked[:, floor:].reshape(-1)  # what is competed for once every head has its floor
    room = heads * (bounds.pool - floor)
    if not room:
        return lowest
    level = np.partition(rest, len(rest) - room)[len(rest) - room]
    return np.minimum(lowest, level)


def divergence(logits: mx.array, top: mx.array, ids: mx.array) -> mx.array:
    """KL(full || student) in nats, mean over rows, with all but the teacher's ``TOP`` likeliest tokens taken as one.

    Args:
        logits: of the student ``(L, vocab)``.
        top: the teacher's log-probabilities ``(L, TOP)``.
        ids: which tokens they are ``(L, TOP)``.
    """
    logits = logits.astype(mx.float32)
    mine = mx.take_along_axis(logits, ids, axis=-1) - mx.logsumexp(logits, axis=-1, keepdims=True)
    rest = lambda x: mx.log(mx.maximum(1.0 - mx.exp(x).sum(axis=-1), 1e-7))
    p = mx.exp(top)
    shared = (p * (top - mine)).sum(axis=-1)
    p_rest, q_rest = rest(top), rest(mine)
    return (shared + mx.exp(p_rest) * (p_rest - q_rest)).mean()


def surprisal(logits: mx.array, targets: mx.array) -> mx.array:
    """Cross entropy of the tokens that came ``(L,)``, mean."""
    logits = logits.astype(mx.float32)
    picked = mx.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]
    return (mx.logsumexp(logits, axis=-1) - picked).mean()
