"""Scores to budgets: how much each layer and head keeps. ``uniform`` alone, until heads may differ."""

from __future__ import annotations

from dataclasses import dataclass

from mlx_kvprune.settings import CacheSettings


@dataclass(frozen=True)
class LayerShape:
    """What one bounded layer stores.

    Attributes:
        n_heads: query heads.
        n_kv_heads: KV heads.
        key_dim: width of a key.
        value_dim: width of a value.
        itemsize: bytes of one element.
    """

    n_heads: int
    n_kv_heads: int
    key_dim: int
    value_dim: int
    itemsize: int

    @property
    def row_nbytes(self) -> int:
        """Bytes of one slot's key and value."""
        return (self.key_dim + self.value_dim) * self.itemsize


def layer_nbytes(shape: LayerShape, settings: CacheSettings, tokens: int, memory: bool, state: int) -> int:
    """Bytes that one layer holds at most with ``tokens`` slots per KV head: ring, pool, positions, memory, state."""
    ring = settings.ring_size
    pool = max(0, tokens - ring)
    per_pool_slot = shape.row_nbytes + 4 + (4 if memory else 0)
    per_ring_slot = shape.row_nbytes + (4 if memory else 0)
    return shape.n_kv_heads * (ring * per_ring_slot + pool * per_pool_slot) + state


def uniform(shapes: list[LayerShape], settings: CacheSettings, memory: bool, states: list[int]) -> int | None:
    """Slots per KV head, the same for all layers and heads; None if the budget is unbounded.

    Raises:
        ValueError: the budget has no room for sinks, window and ring.
    """
    budget = settings.budget
    if budget.nbytes is None:
        return None if budget.tokens is None else settings.check_tokens(budget.tokens)
    total = lambda tokens: sum(
        layer_nbytes(s, settings, tokens, memory, n) for s, n in zip(shapes, states, strict=True)
    )
    per_token = total(settings.ring_size + 1) - total(settings.ring_size)
    tokens = settings.ring_size + (budget.nbytes - total(settings.ring_size)) // max(1, per_token)
    if tokens < settings.smallest_budget:
        least = total(settings.smallest_budget)
        raise ValueError(
            f"[budget] too small for {len(shapes)} layers of {settings.n_sink} sinks + a ring of {settings.ring_size}; "
            f"got {budget.nbytes} bytes; try {least / 1e6:.1f}MB or more, or a smaller --window"
        )
    return tokens
