"""Key norm."""

from dataclasses import dataclass

import mlx.core as mx

from mlx_kvprune.scorers.base import Held, Scorer, State


@dataclass(frozen=True)
class KNorm(Scorer):
    """``score_i = -||k_i||``: keys of small norm draw attention. Computed once, when the token comes in,
    and rounded to half precision: RoPE keeps norms, so that repeats of a token tie in the first layer, and float noise
    would choose between them.

    Devoto et al. 2024, "A Simple and Effective L2 Norm-Based Strategy for KV Cache Compression" (arXiv 2406.11430).
    """

    memory = True

    def first(self, keys: mx.array, values: mx.array) -> mx.array:
        return -mx.linalg.norm(keys.astype(mx.float32), axis=-1).astype(mx.float16).astype(mx.float32)

    def score(self, held: Held, state: State) -> mx.array:
        assert held.memory is not None
        return held.memory
