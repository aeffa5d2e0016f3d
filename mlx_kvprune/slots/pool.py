"""The cold pool: tokens that left the ring and were kept, in slots that are overwritten in place."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

from mlx_kvprune.slots.choose import Exchange, exchange, order_key
from mlx_kvprune.slots.ring import Ring

FIRST_CAPACITY = 256


@dataclass(frozen=True)
class Writes:
    """Rows that go into slots ``(B, H_kv, m)``, by the name of the pool's array; they come of ``n`` leaving tokens."""

    n: int
    slots: mx.array
    rows: dict[str, mx.array]


@dataclass
class Pool:
    """Slots of one layer, the same number for every KV head, in no order: each carries its position.

    Slots ``[0, count)`` are in use. Capacity doubles up to ``limit`` while the text is short; once ``limit`` is reached
    nothing is allocated again.

    Attributes:
        limit: the most slots per KV head.
        count: slots in use per KV head.
        keys: ``(B, H_kv, capacity, D)``.
        values: ``(B, H_kv, capacity, D_v)``.
        positions: ``(B, H_kv, capacity)`` int32; negative where a slot is empty.
        memory: what the scorer remembers ``(B, H_kv, capacity)`` float32, or None.
    """

    limit: int
    count: int
    keys: mx.array
    values: mx.array
    positions: mx.array
    memory: mx.array | None

    @classmethod
    def like(cls, ring: Ring, limit: int) -> Pool:
        """An empty pool for the tokens of ``ring``."""
        batch, heads, _, width = ring.keys.shape
        memory = None if ring.memory is None else mx.zeros((batch, heads, 0))
        return cls(
            limit,
            0,
            mx.zeros((batch, heads, 0, width), ring.keys.dtype),
            mx.zeros((batch, heads, 0, ring.values.shape[-1]), ring.values.dtype),
            mx.zeros((batch, heads, 0), mx.int32),
            memory,
        )

    @property
    def capacity(self) -> int:
        return self.positions.shape[2]

    @property
    def free(self) -> int:
        """Slots per KV head that may still be filled without evicting."""
        return self.limit - self.count

    @property
    def nbytes(self) -> int:
        arrays = (self.keys, self.values, self.positions, self.memory)
        return sum(x.nbytes for x in arrays if x is not None)

    def fill(self, leaving: Ring, positions: mx.array) -> None:
        """Put tokens that left the ring into empty slots; all of them must fit.

        Args:
            leaving: ``n`` tokens.
            positions: their positions ``(B, H_kv, n)`` int32.
        """
        stop = self.count + positions.shape[2]
        assert stop <= self.limit
        self._grow(stop)
        span = slice(self.count, stop)
        self.keys[:, :, span] = leaving.keys
        self.values[:, :, span] = leaving.values
        self.positions[:, :, span] = positions
        if self.memory is not None and leaving.memory is not None:
            self.memory[:, :, span] = leaving.memory
        self.count = stop

    def choose(self, leaving: Ring, positions: mx.array, slot_scores: mx.array, scores: mx.array) -> Writes:
        """What is to be written so that the pool keeps the best of its slots and of the tokens that leave the ring.

        Empty slots are filled first, then slots that score worse than a token. Nothing is written yet.

        Args:
            leaving: ``n`` tokens.
            positions: their positions ``(B, H_kv, n)`` int32.
            slot_scores: retention scores of the slots in use ``(B, H_kv, count)``.
            scores: retention scores of the leaving tokens ``(B, H_kv, n)``.
        """
        n = positions.shape[2]
        self._grow(min(self.limit, self.count + n))
        pairs = exchange(self._keys_in_order(slot_scores), order_key(scores, positions))
        new = {"keys": leaving.keys, "values": leaving.values, "positions": positions, "memory": leaving.memory}
        rows = {name: self._rows(name, x, pairs) for name, x in new.items() if x is not None}
        return Writes(n, pairs.slots, rows)

    def write(self, writes: Writes) -> None:
        """Write what was chosen: in place where ``writes`` is evaluated and nobody else reads the pool."""
        for name, rows in writes.rows.items():
            held = getattr(self, name)
            slots = writes.slots[..., None] if held.ndim == 4 else writes.slots
            setattr(self, name, mx.put_along_axis(held, slots, rows, axis=2))
        self.count = min(self.limit, self.count + writes.n)

    def clear(self, span: slice) -> None:
        """Empty the slots ``span``, which must end at ``count``."""
        assert span.stop == self.count
        self.positions[:, :, span] = self._empty(span.start, span.stop)
        self.count = span.start

    def _empty(self, start: int, stop: int) -> mx.array:
        """Positions of empty slots: negative, and rising, so that the first empty slot is the first to be filled."""
        return mx.arange(start, stop, dtype=mx.int32) - self.limit

    def _keys_in_order(self, slot_scores: mx.array) -> mx.array:
        empty = self.capacity - self.count
        if empty:
            slot_scores = mx.concatenate([slot_scores, mx.full((*slot_scores.shape[:2], empty), -mx.inf)], axis=2)
        return order_key(slot_scores, self.positions)

    def _rows(self, name: str, leaving: mx.array, pairs: Exchange) -> mx.array:
        """Of each pair, the token's row where it takes the slot, else the slot's own."""
        held = getattr(self, name)
        wide = (lambda x: x[..., None]) if held.ndim == 4 else (lambda x: x)
        new = mx.take_along_axis(leaving, wide(pairs.leaving), axis=2)
        old = mx.take_along_axis(held, wide(pairs.slots), axis=2)
        return mx.where(wide(pairs.replace), new, old)

    def _grow(self, needed: int) -> None:
        """Make room for ``needed`` slots: double, but never beyond ``limit``."""
        if needed <= self.capacity:
            return
        extra = min(self.limit, max(needed, 2 * self.capacity, FIRST_CAPACITY)) - self.capacity
        for name in ("keys", "values", "memory"):
            held = getattr(self, name)
            if held is not None:
                setattr(self, name, mx.concatenate([held, mx.zeros(_resized(held, extra), held.dtype)], axis=2))
        empty = self._empty(self.capacity, self.capacity + extra)
        empty = mx.broadcast_to(empty, _resized(self.positions, extra))
        self.positions = mx.concatenate([self.positions, empty], axis=2)


def _resized(x: mx.array, length: int) -> tuple[int, ...]:
    shape = list(x.shape)
    shape[2] = length
    return tuple(shape)
