"""What the student is told: how its slots weigh, how far its output is from the full cache's, what its gates may hold.

Two ways to make eviction differentiable, for the same rule at inference (rank by ``(t + 1 - i) log beta_i``):

``decay``   TRIM-KV's: the weight of slot i at time t is multiplied by ``beta_i^(t - i)``, and a penalty keeps the sum of these
            weights at the budget. Unlike there, what the cache holds anyway, sinks and ring, does not decay.
``budget``  ours: ``(t - i) log beta_i`` ranks as ``s_i(t) = -log(-log beta_i) - log(t - i)`` does. Over all heads, the
            threshold ``tau(t)`` is found at which as many slots stay as the budget has, floors of heads counted; the weight of
            a slot is multiplied by ``sigmoid((s_i - tau) / temperature)``. At temperature zero that is the cache itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from mlx_kvprune.numerics import log_sigmoid
from mlx_kvprune.settings import floor_slots
from mlx_kvprune.training.bias import Bias
from mlx_kvprune.training.reading import pieces

STEP = 64  # queries that share a threshold
GONE = -1e4  # bias of what is not held
SLACK = 4e-6  # by which a score that is the threshold may be rounded below it


@dataclass(frozen=True)
class Bounds:
    """What the student may hold.

    Attributes:
        slots: per KV head on average, everything counted.
        window: the newest tokens, never evicted.
        block: tokens between two upkeeps, held beside them.
        n_sink: first tokens, never evicted.
        head_floor: share of an equal pool that every head keeps.
        scope: who competes: all heads of all layers (``global``), the heads of a layer (``layer``), or nobody (``head``).
        ageing: scores fall as tokens grow older, as a retention score does.
    """

    slots: int
    window: int = 16
    block: int = 128
    n_sink: int = 4
    head_floor: float = 0.2
    scope: str = "global"
    ageing: bool = True

    @property
    def ring(self) -> int:
        """The newest tokens that are held whatever their score, on average: between two upkeeps the block fills up."""
        return self.window + self.block // 2

    @property
    def pool(self) -> int:
        """Slots per head that are competed for."""
        return max(1, self.slots - self.window - self.block - self.n_sink)


def ages(start: int, length: int) -> mx.array:
    """``t - i`` of queries and keys ``(length, start + length)``, float32."""
    at = mx.arange(start, start + length)[:, None]
    return (at - mx.arange(start + length)[None]).astype(mx.float32)


def decay_biases(raws: Sequence[mx.array], start: int, length: int, bounds: Bounds) -> list[Bias]:
    """TRIM-KV's: ``(t - i) log beta_i`` for every slot that is no sink and has left the ring, of each layer."""
    age = ages(start, length)
    return [Bias(mx.maximum(age, 0.0) * log_sigmoid(raw)[:, None], held_anyway(age, bounds)) for raw in raws]


def held_anyway(age: mx.array, bounds: Bounds) -> mx.array:
    """Sinks, and what the ring holds on average, of ages ``(L, S)`` of slots from the first token on: ``(L, S)`` bool."""
    return _sinks_or_newest(age, bounds, bounds.ring)


def _sinks_or_newest(age: mx.array, bounds: Bounds, newest: int) -> mx.array:
    return (age < newest) | (mx.arange(age.shape[1]) < bounds.n_sink)


def held_by_decay(raws: Sequence[mx.array], start: int, length: int, bounds: Bounds) -> mx.array:
    """TRIM-KV's capacity loss at the times of a segment: what the decayed weights sum to beyond the budget.

    ``mean_t max(0, sum_i beta_i^(t - i) - M) / max(t - M, 1)``: over each head, or over all of them together. Sinks and what is
    in the ring count as one.
    """
    times = mx.arange(start + STEP - 1, start + length, STEP)[:, None]
    age = (times - mx.arange(start + length)[None]).astype(mx.float32)
    sums = []
    for raw in raws:
        decayed = mx.exp(mx.maximum(age, 0.0) * log_sigmoid(raw)[:, None])
        weights = mx.where(held_anyway(age, bounds), 1.0, decayed)
        sums.append(mx.where(age < 0, 0.0, weights).sum(axis=-1))  # (H_kv, times)
    held = mx.concatenate(sums)
    held = held.mean(axis=0, keepdims=True) if bounds.scope == "global" else held
    over = mx.maximum(held - bounds.slots, 0.0)
    return (over / mx.maximum(times[:, 0] - bounds.slots, 1)).mean()


def budget_biases(
    scores: Sequence[mx.array], start: int, length: int, bounds: Bounds, temperature: float
) -> list[Bias]:
    """Ours: log of the chance that a slot is still held, of each layer; ``STEP`` neighbouring queries have one in common.

    Args:
        scores: of each layer ``(H_kv, start + length)``: what a token is ``worth``, or a score that does not age.
        temperature: zero for what the cache does.
    """
    taus = thresholds(scores, start, length, bounds)  # (heads, length / STEP)
    spared, log_age = never_evicted(start, length, bounds), mx.zeros((1, 1))
    if bounds.ageing:
        age = mx.array(_middles(start, length))[:, None] - mx.arange(start + length)
        log_age = mx.log(mx.maximum(age, 1).astype(mx.float32))
    out, first = [], 0
    for one in scores:
        tau = mx.array(taus[first : first + one.shape[0]])[:, :, None]
        first += one.shape[0]
        above = one[:, None] - log_age - tau
        added = log_sigmoid(above / temperature) if temperature else mx.where(above >= -SLACK, 0.0, GONE)
        out.append(Bias(added, spared))
    return out


def _middles(start: int, length: int) -> list[int]:
    """The query in the middle of every ``STEP``, whose time counts for all of them; each query where they do not divide."""
    step = STEP if length % STEP == 0 else 1
    return list(range(start + step // 2, start + length, step))


def never_evicted(start: int, length: int, bounds: Bounds) -> mx.array:
    """Sinks and the window ``(length, start + length)`` bool."""
    return _sinks_or_newest(ages(start, length), bounds, bounds.window)


def dropped_biases(drops: Sequence[mx.array], start: int, length: int, bounds: Bounds) -> list[Bias]:
    """Biases that tokens have once they left the window, from ``(H_kv, start + length)`` of each layer."""
    spared = never_evicted(start, length, bounds)
    return [Bias(drop[:, None], spared) for drop in drops]


def outside(of: mx.array, bounds: Bounds) -> mx.array:
    """The part of ``(H_kv, S)`` that may be evicted: no sinks, and not the last window."""
    return of[:, bounds.n_sink : max(bounds.n_sink + 1, of.shape[1] - bounds.window)]


def thresholds(scores: Sequence[mx.array], start: int, length: int, bounds: Bounds) -> np.ndarray:
    """The score at which a slot is just held, of each head and ``STEP`` queries ``(heads, length / STEP)``; no gradient."""
    static = [np.array(mx.stop_gradient(x)) for x in scores]  # of each layer (H_kv, start + length)
    static = [np.concatenate(static)] if bounds.scope == "global" else static
    columns = []
    for now in _middles(start, length):
        of = np.arange(bounds.n_sink, max(bounds.n_sink, now - bounds.window))
        older = np.log(now - of) if bounds.ageing else np.zeros(len(of))
        columns.append(np.concatenate([_levels(some[:, of] - older, bounds) for some in static]))
    return np.stack(columns, axis=1).astype(np.float32)


def _levels(scores: np.ndarray, bounds: Bounds) -> np.ndarray:
    """The threshold of each of the heads that compete, from the scores of what they could hold ``(heads, n)``."""
    heads, n = scores.shape
    if n <= bounds.pool:
        return np.full(heads, -1e9)
    ranked = -np.sort(-scores, axis=1)
    if bounds.scope == "head":
        return ranked[:, bounds.pool - 1]
    floor = floor_slots(bounds.pool, bounds.head_floor)
    lowest = ranked[:, floor - 1] if floor else np.full(heads, np.inf)
    rest = ranked[:, floor:].reshape(-1)  # what is competed for once every head has its floor
    room = heads * (bounds.pool - floor)
    if not room:
        return lowest
    level = np.partition(rest, len(rest) - room)[len(rest) - room]
    return np.minimum(lowest, level)


def divergence(logits: mx.array, top: mx.array, ids: mx.array) -> mx.array:
    """KL(full || student) in nats, mean over rows, with all but the teacher's ``TOP`` likeliest tokens taken as one.

    That is a lower bound of the exact one. Rows are worked on in pieces, for a vocabulary may be large.

    Args:
        logits: of the student ``(L, vocab)``.
        top: the teacher's log-probabilities ``(L, TOP)``.
        ids: which tokens they are ``(L, TOP)``.
    """
    total = mx.array(0.0)
    for rows in pieces(logits):
        total = total + _divergence(logits[rows], top[rows], ids[rows]).sum()
    return total / logits.shape[0]


def _divergence(logits: mx.array, top: mx.array, ids: mx.array) -> mx.array:
    """Of each row."""
    logits = logits.astype(mx.float32)
    mine = mx.take_along_axis(logits, ids, axis=-1) - mx.logsumexp(logits, axis=-1, keepdims=True)
    rest = lambda x: mx.log(mx.maximum(1.0 - mx.exp(x).sum(axis=-1), 1e-7))
    p_rest, q_rest = rest(top), rest(mine)
    shared = (mx.exp(top) * (top - mine)).sum(axis=-1)
    return shared + mx.exp(p_rest) * (p_rest - q_rest)


def surprisal(logits: mx.array, targets: mx.array) -> mx.array:
    """Cross entropy of the tokens that came ``(L,)``, mean."""
    total = mx.array(0.0)
    for rows in pieces(logits):
        one = logits[rows].astype(mx.float32)
        picked = mx.take_along_axis(one, targets[rows, None], axis=-1)[:, 0]
        total = total + (mx.logsumexp(one, axis=-1) - picked).sum()
    return total / logits.shape[0]
