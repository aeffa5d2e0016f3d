"""Which slots of the pool are overwritten by which tokens that leave the ring."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx


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


@dataclass(frozen=True)
class Exchange:
    """``slots[i]`` of the pool is overwritten by ``leaving[i]`` of the ring where ``replace[i]``; all ``(B, H_kv, m)``."""

    slots: mx.array
    leaving: mx.array
    replace: mx.array


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
    descending = mx.argsort(-leaving_keys, axis=-1)[..., :m]
    replace = mx.take_along_axis(leaving_keys, descending, -1) > mx.take_along_axis(worst_keys, ascending, -1)
    return Exchange(mx.take_along_axis(worst, ascending, -1), descending, replace)
