"""What rows are packed and slots are chosen with: plain MLX operations, unless somebody has better."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx

from mlx_kvprune.quantize import Codec, Frame, Parts
from mlx_kvprune.slots.choose import Exchange, exchange_by_scores


@dataclass(frozen=True)
class Tools:
    """Functions that a pool calls.

    Attributes:
        pack: like ``Codec.encode``.
        exchange: like ``exchange_by_scores``.
    """

    pack: Callable[[Codec, mx.array, Frame | None], Parts] = Codec.encode
    exchange: Callable[[mx.array, mx.array, mx.array, mx.array], Exchange] = exchange_by_scores


PLAIN = Tools()
