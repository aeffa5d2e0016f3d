"""Random eviction: the control that says what a signal is worth."""

from dataclasses import dataclass

import mlx.core as mx

from mlx_kvprune.scorers.base import Held, Scorer, State


@dataclass(frozen=True)
class Random(Scorer):
    """``score_i = hash(seed, layer, head, position_i)``, uniform in [0, 1).

    A token's score never changes, so that the choice does not depend on how the text was cut into calls. The hash is
    the 32-bit finalizer of MurmurHash3 (public domain).
    """

    seed: int = 0

    def score(self, held: Held, state: State) -> mx.array:
        heads = mx.arange(held.positions.shape[1], dtype=mx.uint32)[:, None]
        salt = mx.array((self.seed * 0x9E3779B9 + held.layer * 0x85EBCA6B) & 0xFFFFFFFF, mx.uint32)
        x = held.positions.astype(mx.uint32) * 0x27D4EB2F + heads * 0x165667B1 + salt
        x = (x ^ (x >> 16)) * 0x85EBCA6B
        x = (x ^ (x >> 13)) * 0xC2B2AE35
        return ((x ^ (x >> 16)) >> 8).astype(mx.float32) / 2**24
