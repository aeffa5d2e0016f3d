"""Ring and pool of one layer together: what is where, and when tokens move from the one to the other."""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx

from mlx_kvprune.slots.pool import Pool, Writes
from mlx_kvprune.slots.ring import Ring

Arrays = tuple[mx.array | None, ...]


class LayerSlots:
    """Everything that one layer holds. Tokens are written to the ring and move on ``block`` at a time.

    Args:
        ring_size: tokens that the ring holds when full.
        block: tokens that leave it at a time.
        limit: the most slots per KV head of the pool.
        memory: whether a number is remembered with each slot.
    """

    def __init__(self, ring_size: int, block: int, limit: int, memory: bool):
        self.ring_size, self.block, self.limit, self.with_memory = ring_size, block, limit, memory
        self.written = 0  # tokens that are in the ring or have been
        self._ring: Ring | None = None
        self._pool: Pool | None = None

    @property
    def ring(self) -> Ring:
        """The newest tokens."""
        assert self._ring is not None, "nothing was written yet"
        return self._ring

    @property
    def pool(self) -> Pool:
        """The older ones that were kept."""
        assert self._pool is not None, "nothing was written yet"
        return self._pool

    def empty(self) -> bool:
        """Whether nothing was ever written."""
        return self._ring is None

    def size(self) -> int:
        """Slots held per KV head."""
        return 0 if self.empty() else self.pool.count + self.ring.count

    @property
    def nbytes(self) -> int:
        """Bytes of ring and pool, everything counted."""
        return 0 if self.empty() else self.ring.nbytes + self.pool.nbytes

    def spare(self) -> int:
        """Tokens that the ring takes before it is full."""
        return self.ring_size - (0 if self.empty() else self.ring.count)

    def free(self) -> int:
        """Whole blocks of tokens that the pool takes before anything is evicted."""
        free = self.limit if self.empty() else self.pool.free
        return free // self.block * self.block

    def full(self) -> bool:
        """Whether the next token makes slots change hands."""
        return not self.empty() and self.spare() <= 0

    def evicts_next(self) -> bool:
        """Whether the next token makes slots be evicted."""
        return self.full() and self.free() == 0

    def write(self, keys: mx.array, values: mx.array, memory: mx.array | None) -> None:
        """Put new tokens ``(B, H_kv, L, D)`` into the ring."""
        if self.empty():
            nothing = mx.zeros((*keys.shape[:2], 0)) if self.with_memory else None
            self._ring = Ring(keys[:, :, :0], values[:, :, :0], nothing)
            self._pool = Pool.like(self._ring, self.limit)
        self.ring.append(keys, values, memory)
        self.written += keys.shape[2]

    def overflow(self) -> int:
        """Tokens, in whole blocks, that the ring holds beyond its size."""
        return -(min(0, self.spare()) // self.block) * self.block

    def move(self, n: int, writes: Writes | None = None) -> None:
        """Move the oldest ``n`` tokens of the ring to the pool: into empty slots, or as ``writes`` says."""
        if writes is None:
            self.pool.fill(self.ring.oldest(n), self.ring_positions()[:, :, :n])
        else:
            assert writes.n == n
            self.pool.write(writes)
        self.ring.drop_oldest(n)

    def choose(self, n: int, scores: mx.array) -> Writes:
        """What ``move(n)`` has to write so that the best stay, by scores of everything held ``(B, H_kv, S)``."""
        count = self.pool.count
        positions, slots, leaving = self.ring_positions()[:, :, :n], slice(0, count), slice(count, count + n)
        return self.pool.choose(self.ring.oldest(n), positions, scores[:, :, slots], scores[:, :, leaving])

    def parts(self) -> tuple[tuple[mx.array, ...], tuple[mx.array, ...]]:
        """Keys and values where they lie: of the pool if it holds any, and of the ring."""
        ring, pool = self.ring, self.pool
        if pool.count == 0:
            return (ring.keys,), (ring.values,)
        used = slice(0, pool.count)
        return (pool.keys[:, :, used], ring.keys), (pool.values[:, :, used], ring.values)

    def positions(self) -> mx.array:
        """Token index of everything held ``(B, H_kv, S)`` int32: the pool's slots first, then the ring."""
        return self._joined(self.pool.positions, self.ring_positions())

    def memory(self) -> mx.array | None:
        """What is remembered of everything held ``(B, H_kv, S)``, in the same order."""
        old, new = self.pool.memory, self.ring.memory
        return None if old is None or new is None else self._joined(old, new)

    def ring_positions(self) -> mx.array:
        """Token index of the ring's tokens ``(B, H_kv, count)`` int32."""
        batch, heads, count, _ = self.ring.keys.shape
        newest = mx.arange(self.written - count, self.written, dtype=mx.int32)
        return mx.broadcast_to(newest, (batch, heads, count))

    def remember(self, memory: mx.array) -> None:
        """Set what is remembered of everything held ``(B, H_kv, S)``."""
        count = self.pool.count
        self.ring.memory = memory[:, :, count:]
        self._set_pool_memory(memory[:, :, :count])

    def remember_newest(self, memory: mx.array) -> None:
        """Set what is remembered of the newest ``L`` tokens ``(B, L)``, all of them in the ring, for every KV head."""
        assert self.ring.memory is not None
        n = memory.shape[1]
        new = mx.broadcast_to(memory[:, None], (*self.ring.memory.shape[:2], n))
        self.ring.memory = mx.concatenate([self.ring.memory[:, :, :-n], new], axis=2)

    def update_memory(self, update: Callable[[mx.array, mx.array], mx.array], weights: tuple[mx.array, ...]) -> Arrays:
        """``update(memory, weights)`` for each part; returns the arrays that are new."""
        *older, newest = weights
        assert self.ring.memory is not None and self.pool.memory is not None
        self.ring.memory = update(self.ring.memory, newest)
        if older:
            self._set_pool_memory(update(self.pool.memory[:, :, : self.pool.count], older[0]))
        return self.ring.memory, self.pool.memory

    def forget(self, n: int) -> None:
        """Take back the newest ``n`` tokens while every token is still held, in order."""
        ring, pool, keep = self.ring, self.pool, self.written - n
        count = -(-max(0, keep - self.ring_size) // self.block) * self.block
        back = slice(count, pool.count)
        for name in ("keys", "values", "memory"):
            held = getattr(ring, name)
            if held is not None:
                held = mx.concatenate([getattr(pool, name)[:, :, back], held], axis=2)
                setattr(ring, name, held[:, :, : keep - count])
        pool.clear(back)
        self.written = keep

    def arrays(self) -> Arrays:
        """The arrays of ring and pool, for ``restore``; None where there is none."""
        if self.empty():
            return (None,) * 7
        ring, pool = self.ring, self.pool
        return (ring.keys, ring.values, ring.memory, pool.keys, pool.values, pool.positions, pool.memory)

    def restore(self, arrays: Arrays, count: int, written: int) -> None:
        """Take over ``arrays()`` of another; in objects of its own, for slots are written in place."""
        self.written = written
        if arrays[0] is not None:
            own = [None if x is None else mx.array(x) for x in arrays]
            self._ring, self._pool = Ring(*own[:3]), Pool(self.limit, count, *own[3:])  # type: ignore[arg-type]

    def _joined(self, old: mx.array, new: mx.array) -> mx.array:
        return mx.concatenate([old[:, :, : self.pool.count], new], axis=2)

    def _set_pool_memory(self, memory: mx.array) -> None:
        assert self.pool.memory is not None
        unused = self.pool.memory[:, :, self.pool.count :]
        self.pool.memory = mx.concatenate([memory, unused], axis=2) if unused.shape[2] else memory
