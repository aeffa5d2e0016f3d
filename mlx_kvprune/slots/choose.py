"""Which slots of a pool are overwritten by which tokens."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

NOTHING = -0x7F800001  # the upper half of an order key whose score is minus infinity


def order_key(scores: mx.array, positions: mx.array) -> mx.array:
    """Scores and positions as one integer each, so that comparing integers compares (score, position).

    Float32 scores tie more often than one thinks (attention mass of exactly zero, half-precision keys); the newer token
    then wins, and sorting need not be stable.

    Args:
        scores: ``(...)`` float32; no NaN.
        positions: ``(...)`` int32.

    Returns:
        ``(...)`` int64.
    """
    bits = (scores.astype(mx.float32) + 0.0).view(mx.int32)  # + 0.0: the two zeros are equal
    ordered = mx.where(bits < 0, bits ^ 0x7FFFFFFF, bits)  # IEEE 754: negative floats count backwards
    return (ordered.astype(mx.int64) << 32) + positions.astype(mx.int64)


def grouped(scores: mx.array, positions: mx.array, granule: int) -> tuple[mx.array, mx.array]:
    """Score and position of what is written together: ``granule`` neighbours share their mean and the newest.

    Args:
        scores: ``(B, H_kv, n)``; minus infinity where a slot is empty.
        positions: ``(B, H_kv, n)`` int32.
        granule: slots that are written together.

    Returns:
        Both ``(B, H_kv, n / granule)``.
    """
    if granule == 1:
        return scores, positions
    shape = (*scores.shape[:2], scores.shape[2] // granule, granule)
    scores, positions = scores.reshape(shape), positions.reshape(shape)
    held = positions >= 0
    mean = mx.where(held, scores, 0.0).sum(axis=-1) / mx.maximum(held.sum(axis=-1), 1)
    return mx.where(held.any(axis=-1), mean, -mx.inf), positions.max(axis=-1)


@dataclass(frozen=True)
class Exchange:
    """``slots[i]`` of the pool is overwritten by ``leaving[i]`` where ``replace[i]``; all ``(B, H_kv, m)``.

    Attributes:
        beaten: leaving tokens that were not set against a slot ``(B, H_kv, n - m)``.
    """

    slots: mx.array
    leaving: mx.array
    replace: mx.array
    beaten: mx.array


def exchange(pool_keys: mx.array, leaving_keys: mx.array) -> Exchange:
    """Keep the best ``P`` of the pool's ``P`` slots and the ``n`` leaving tokens.

    The i-th worst slot is set against the i-th best leaving token; where the token is better it takes the slot. That
    gives exactly the top ``P`` of the union, with shapes that do not depend on the data.

    Args:
        pool_keys: order keys of the slots ``(B, H_kv, P)``; empty slots carry the smallest keys.
        leaving_keys: order keys of the leaving tokens ``(B, H_kv, n)``.

    Returns:
        The pairs, ``m = min(P, n)`` of them.
    """
    m = min(pool_keys.shape[-1], leaving_keys.shape[-1])
    worst = mx.argpartition(pool_keys, kth=m - 1, axis=-1)[..., :m]
    worst_keys = mx.take_along_axis(pool_keys, worst, axis=-1)
    ascending = mx.argsort(worst_keys, axis=-1)
    order = mx.argsort(-leaving_keys, axis=-1)
    descending = order[..., :m]
    replace = mx.take_along_axis(leaving_keys, descending, -1) > mx.take_along_axis(worst_keys, ascending, -1)
    return Exchange(mx.take_along_axis(worst, ascending, -1), descending, replace, order[..., m:])


def exchange_by_scores(
    pool_scores: mx.array, pool_positions: mx.array, scores: mx.array, positions: mx.array
) -> Exchange:
    """``exchange`` of slots and tokens with these retention scores and positions, ``(B, H_kv, P)`` and ``(B, H_kv, n)``."""
    return exchange(order_key(pool_scores, pool_positions), order_key(scores, positions))


def best_of_spans(keys: mx.array, positions: mx.array, starts: tuple[int, ...], n: int) -> mx.array:
    """Which slots are among the ``n`` best of their span of the text; slots after the last start belong to none.

    Args:
        keys: order keys ``(B, H_kv, S)``.
        positions: ``(B, H_kv, S)`` int32.
        starts: first position of each span, rising; a span ends where the next one starts, the last one is open.
        n: how many of each closed span.

    Returns:
        ``(B, H_kv, S)`` bool.
    """
    first = mx.array(starts, mx.int32)
    span = (positions[..., None] >= first).sum(axis=-1) - 1  # (B, H_kv, S); -1 before the first
    best_first = mx.argsort(mx.argsort(-keys, axis=-1), axis=-1)  # rank of each slot among all
    slots = keys.shape[-1]
    place = mx.argsort(mx.argsort(span * slots + best_first, axis=-1), axis=-1)  # by span, then by rank
    before = (span[..., None, :] < mx.arange(len(starts))[:, None]).sum(axis=-1)  # (B, H_kv, spans)
    rank = place - mx.take_along_axis(before, mx.maximum(span, 0), axis=-1)
    return (rank < n) & (span >= 0) & (span < len(starts) - 1)
