"""Ring and pools of one layer together: what is where, and when tokens move from the one to the other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_kvprune.numerics import device
from mlx_kvprune.quantize import PAGE, Codec
from mlx_kvprune.rope import Turning
from mlx_kvprune.slots.choose import best_of_spans, grouped, order_key
from mlx_kvprune.slots.format import Format, plain
from mlx_kvprune.slots.pages import Candidates, PagedPool, PageWrites
from mlx_kvprune.slots.parts import PagedPart, Part, Ranks
from mlx_kvprune.slots.pool import Pool, Writes
from mlx_kvprune.slots.ring import Ring, Tokens
from mlx_kvprune.slots.tools import PLAIN, Tools

AnyPool = Pool | PagedPool
AnyPart = Part | PagedPart


@dataclass(frozen=True)
class PoolSpec:
    """A pool before the first token has shown what a row looks like.

    Attributes:
        limit: the most slots per KV head, on average where heads differ.
        keys: arguments of the keys' ``Codec`` beside its width.
        values: of the values'.
        ragged: whether heads may hold differently many.
        tools: what packs rows and chooses slots.
        sifted: whether tokens that score minus infinity are dropped, whatever room there is (only where it is ragged).
    """

    limit: int
    keys: dict[str, Any] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)
    ragged: bool = False
    tools: Tools = PLAIN
    sifted: bool = False

    @property
    def slots(self) -> int:
        """Slots per KV head that are filled before anything competes: whole pages, one at least, where it is ragged."""
        return max(1, self.limit // PAGE) * PAGE if self.ragged else self.limit

    @property
    def exact(self) -> bool:
        """Whether what is stored can be had back as it was."""
        return not (self.keys or self.values)

    def make(self, like: Tokens) -> AnyPool:
        """An empty pool for tokens like these."""
        keys, values = Codec(like.keys.shape[-1], **self.keys), Codec(like.values.shape[-1], **self.values)
        form = Format(keys, values, like.keys.dtype, tools=self.tools)
        if self.ragged:
            rows, heads = like.keys.shape[:2]
            return PagedPool(rows * max(heads, heads * self.limit // PAGE), like, form, self.sifted)
        return Pool(self.limit // form.granule * form.granule, like, form)


@dataclass(frozen=True)
class Step:
    """What happens to one pool when tokens come to it: they are filled in, or written over others."""

    pool: int
    fill: Tokens | None = None
    writes: Writes | PageWrites | None = None

    def arrays(self) -> list[mx.array]:
        what = self.fill or self.writes
        assert what is not None
        return what.arrays()


@dataclass(frozen=True)
class Contest:
    """Tokens that leave the ring, as far as it is settled what becomes of them.

    Attributes:
        n: how many.
        steps: what is settled.
        tokens: what arrives at the last pool, if that one is ragged and must evict; None if all is settled.
        candidates: what competes there.
    """

    n: int
    steps: tuple[Step, ...]
    tokens: Tokens | None = None
    candidates: Candidates | None = None

    def arrays(self) -> list[mx.array]:
        """What must be evaluated so that pools are written in place."""
        return [x for step in self.steps for x in step.arrays()]


class LayerSlots:
    """Everything that one layer holds. Tokens are written to the ring and move on ``block`` at a time.

    Sinks never leave the ring: they are few, and their keys and values are the ones that bear rounding least.
    Pools stand in a row: what the first does not keep competes for the second, and so on; only the last may be ragged.

    Args:
        ring_size: tokens that the ring holds when full.
        block: tokens that leave it at a time.
        n_sink: first tokens of the text, which stay in the ring beside those.
        pools: one, or two of different precision; none in a local layer, where what leaves the ring is gone.
        memory: whether a number is remembered with each slot.
        ranked: whether the rank of each slot by position is kept (for positions in the cache).
    """

    def __init__(
        self,
        ring_size: int,
        block: int,
        n_sink: int,
        pools: tuple[PoolSpec, ...],
        memory: bool,
        ranked: bool = False,
    ):
        self.ring_size, self.block, self.n_sink, self.specs = ring_size, block, n_sink, pools
        self.with_memory, self.ranked = memory, ranked
        self.written = 0  # position of the next token
        self.whole = True  # nothing was evicted, quantized or dropped: tokens may go back from the pools to the ring
        self.final = 0  # what was written before this cannot be taken back
        self.evicted = False
        self.sinks = n_sink  # the first positions, which stay in the ring; fewer where some were dropped
        self.pools: list[AnyPool] = []
        self.ranks: list[
            mx.array
        ] = []  # of each pool's slots among those of all pools, int32, as the pool lays them out
        self._ring: Ring | None = None

    # -- how much --------------------------------------------------------------------------------------------------

    @property
    def ring(self) -> Ring:
        """The newest tokens."""
        assert self._ring is not None, "nothing was written yet"
        return self._ring

    @property
    def last(self) -> AnyPool:
        """The pool out of which slots are evicted."""
        return self.pools[-1]

    def empty(self) -> bool:
        """Whether nothing was ever written."""
        return self._ring is None

    def pool_count(self) -> int:
        """Slots of the pools of the head that holds most."""
        return sum(pool.count for pool in self.pools)

    def size(self) -> int:
        """Slots held by the KV head that holds most."""
        return 0 if self.empty() else self.pool_count() + self.ring.count

    def held(self) -> int:
        """Slots held over all heads."""
        if self.empty():
            return 0
        batch, heads = self.ring.keys.shape[:2]
        return batch * heads * self.ring.count + sum(pool.held for pool in self.pools)

    @property
    def nbytes(self) -> int:
        """Bytes of ring and pools, everything counted."""
        return 0 if self.empty() else sum(x.nbytes for x in (self.ring, *self.pools, *self.ranks))

    def pinned(self) -> int:
        """Sinks that the ring holds, before all others."""
        return int((self.ring.positions < self.sinks).sum())

    def spare(self) -> int:
        """Tokens that the ring takes before it is full."""
        return self.ring_size - (0 if self.empty() else self.ring.count - self.pinned())

    def free(self) -> int:
        """Whole blocks of tokens that the first pool takes before tokens must compete."""
        if not self.specs:
            return 0
        if self.empty():
            return 0 if self.specs[0].sifted else self.specs[0].slots // self.block * self.block
        return self.pools[0].free // self.block * self.block

    @property
    def capacity(self) -> int:
        """Tokens that it takes before one must go, where heads hold alike: sinks, ring, whole blocks of the pools."""
        return self.n_sink + self.ring_size + sum(spec.slots for spec in self.specs) // self.block * self.block

    def free_at_all(self) -> int:
        """Slots per KV head that are free in any pool."""
        return sum(pool.free for pool in self.pools)

    def ahead(self) -> int:
        """Tokens that may be written at once: none of them competes, and none is quantized earlier in shorter calls."""
        exact = all(spec.exact for spec in self.specs)
        return self.spare() + (self.free() if exact else 0)

    def full(self) -> bool:
        """Whether the next token makes slots change hands."""
        return not self.empty() and self.spare() <= 0

    def evicts_next(self) -> bool:
        """Whether the next token makes tokens compete for slots."""
        return self.full() and self.free() == 0

    # -- writing -----------------------------------------------------------------------------------------------------

    def write(self, keys: mx.array, values: mx.array, memory: mx.array | None) -> None:
        """Put new tokens ``(B, H_kv, L, D)`` into the ring."""
        if self.empty():
            nothing = mx.zeros((*keys.shape[:2], 0)) if self.with_memory else None
            self._ring = Ring(keys[:, :, :0], values[:, :, :0], nothing, np.zeros(0, np.int32))
            self.pools = [spec.make(self.ring.span(0, 0)) for spec in self.specs]
        self.ring.append(keys, values, memory, self.written)
        self.written += keys.shape[2]

    def overflow(self) -> int:
        """Tokens, in whole blocks, that the ring holds beyond its size."""
        return -(min(0, self.spare()) // self.block) * self.block

    def fill(self, n: int) -> None:
        """Move the oldest ``n`` tokens of the ring into empty slots of the first pool, which has them."""
        self._calibrate()
        self.pools[0].fill(self._leaving(n))
        self._left(n)

    def _calibrate(self) -> None:
        """Set what is fixed once per pool, from the first tokens of the text after the sinks."""
        start = self.pinned()
        first = self.ring.keys[:, :, start : start + self.ring_size]
        for pool in self.pools:
            if not self.pool_count():
                pool.format = pool.format.calibrated(first)

    def contest(self, n: int, scores: mx.array) -> Contest:
        """What becomes of the oldest ``n`` tokens, by scores of everything held ``(B, H_kv, S)``.

        Where the last pool is ragged and must evict, ``decide`` has the last word.
        """
        self._calibrate()
        steps, start = [], 0
        tokens, new_scores = self._leaving(n), scores[:, :, self._pool_width() + self.pinned() :][:, :, :n]
        for i, pool in enumerate(self.pools):
            if pool.free >= n:
                return Contest(n, (*steps, Step(i, fill=tokens)))
            width = pool.heads_positions().shape[2]
            slot_scores = scores[:, :, start : start + width]
            start += width
            if isinstance(pool, PagedPool):
                return Contest(n, tuple(steps), tokens, pool.candidates(tokens, slot_scores, new_scores))
            writes = pool.choose(tokens, slot_scores, new_scores, want_losers=pool is not self.last)
            steps.append(Step(i, writes=writes))
            if writes.losers is not None and writes.scores is not None:
                tokens, new_scores = writes.losers, writes.scores
        return Contest(n, tuple(steps))

    def decide(self, contest: Contest, pages: np.ndarray) -> Contest:
        """The contest with the ragged pool's share settled: ``pages`` of each head ``(B * H_kv,)``."""
        assert contest.tokens is not None and contest.candidates is not None
        assert isinstance(self.last, PagedPool)
        writes = self.last.choose(contest.tokens, contest.candidates, pages)
        return Contest(contest.n, (*contest.steps, Step(len(self.pools) - 1, writes=writes)))

    def carry_out(self, contest: Contest) -> None:
        """Do what was chosen."""
        assert contest.candidates is None, "not settled"
        if not self.pools:  # what leaves the ring is gone
            self.evicted = True
            self._settle()
        holes = any(pool.holes for pool in self.pools)
        for step in contest.steps:
            pool: Any = self.pools[step.pool]
            if step.fill is not None:
                pool.fill(step.fill)
            elif step.writes is not None:
                pool.write(step.writes)
                if step.writes.lost:
                    self.evicted = self.evicted or pool is self.last
                    self._settle()
        if holes:
            for pool in self.pools:
                pool.count_holes()
        self._left(contest.n)

    def _leaving(self, n: int) -> Tokens:
        """The ``n`` tokens that leave the ring first."""
        return self.ring.span(self.pinned(), self.pinned() + n)

    def _left(self, n: int) -> None:
        self.ring.remove(self.pinned(), self.pinned() + n)
        if not self.whole or not all(spec.exact for spec in self.specs):
            self._settle()
        self._rank()

    def _settle(self) -> None:
        """Note that what was written until now cannot be taken back."""
        self.whole, self.final = False, self.written

    def _rank(self) -> None:
        """Note where each slot stands among those of its head, if that is wanted."""
        if not self.ranked or not self.pools:
            return
        self.ranks, start, ranks = [], 0, self.pool_ranks()
        for pool in self.pools:
            width = pool.heads_positions().shape[2]
            self.ranks.append(pool.laid_out(ranks[:, :, start : start + width]))
            start += width

    def pool_ranks(self) -> mx.array:
        """Of each slot of the pools, how many of its head are older ``(B, H_kv, S)`` int32; empty ones are the oldest."""
        positions = mx.concatenate([pool.heads_positions() for pool in self.pools], axis=2)
        return mx.argsort(mx.argsort(positions, axis=-1), axis=-1).astype(mx.int32)

    # -- reading -----------------------------------------------------------------------------------------------------

    def parts(self, turn: Turning | None = None, newest: int = 0) -> tuple[AnyPart, ...]:
        """What attention works on: the pools that hold something, and the ring last.

        Args:
            turn: rotates rows to positions, where keys are kept un-rotated.
            newest: the newest token's position in the model's eyes, then.
        """
        ring = self.ring
        if turn is None:
            pools = [pool.part() for pool in self.pools if pool.count]
            return (*pools, Part(plain(ring.keys), plain(ring.values)))
        ranks = Ranks(turn, self.ring_at(newest))
        return (*self._turned(turn, self._first(newest)), Part(plain(ring.keys), plain(ring.values), ranks=ranks))

    def ring_at(self, newest: int) -> mx.array:
        """Positions in the cache of the ring's tokens ``(B, H_kv, count)``: sinks before the pools, the others after."""
        first, shape = self._first(newest), self.ring.keys.shape[:2]
        sinks = mx.arange(first - self.pinned(), first, dtype=mx.int32) - self._pool_lengths()
        others = mx.arange(first, newest + 1, dtype=mx.int32)
        return mx.concatenate([mx.broadcast_to(x, (*shape, x.shape[-1])) for x in (sinks, others)], axis=2)

    def _pool_lengths(self) -> mx.array:
        """Slots in use of the pools, ``(1, 1, 1)`` or of each head ``(B, H_kv, 1)``."""
        if not any(pool.ragged or pool.holes for pool in self.pools):
            return mx.array(self._pool_width()).reshape(1, 1, 1)
        return sum((pool.heads_positions() >= 0).sum(axis=-1, keepdims=True) for pool in self.pools)  # type: ignore

    def at(self, newest: int) -> mx.array:
        """Positions in the cache of everything held ``(B, H_kv, S)`` int32: pools first, then ring."""
        if not self.pools:
            return self.ring_at(newest)
        pools = self._first(newest) - self._pool_width() + self.pool_ranks()
        return mx.concatenate([pools, self.ring_at(newest)], axis=2)

    def _first(self, newest: int) -> int:
        """Position in the cache of the first token after the pools'."""
        return newest + 1 - (self.ring.count - self.pinned())

    def _turned(self, turn: Turning, first: int) -> list[AnyPart]:
        """The pools' parts, keys to be turned to where they stand before the ring, whose oldest stands at ``first``."""
        shift, pools = first - self._pool_width(), zip(self.pools, self.ranks, strict=False)
        return [replace(pool.part(), ranks=Ranks(turn, ranks, shift)) for pool, ranks in pools if pool.count]

    def _pool_width(self) -> int:
        """Slots per head of the pools as scorers see them, padding included."""
        return sum(pool.heads_positions().shape[2] for pool in self.pools)

    def positions(self) -> mx.array:
        """Token index of everything held ``(B, H_kv, S)`` int32, negative where there is none: pools first, then ring."""
        return self._joined([pool.heads_positions() for pool in self.pools], self.ring.heads_positions())

    def competing(self, n: int) -> mx.array:
        """``positions``, negative also for what stays in the ring when the oldest ``n`` leave it."""
        ring = self.ring.heads_positions()
        index = mx.arange(self.ring.count)
        leaves = (index >= self.pinned()) & (index < self.pinned() + n)
        return self._joined([pool.heads_positions() for pool in self.pools], mx.where(leaves, ring, -1))

    def best_of_turns(
        self, n: int, scores: mx.array, positions: mx.array, starts: tuple[int, ...], floor: int
    ) -> mx.array:
        """Which of what competes when ``n`` tokens leave the ring are among the ``floor`` best of their turn ``(B, H_kv, S)``.

        Where slots are written some together, these are chosen together: one that is safe makes all of them so.

        Args:
            scores: of everything held ``(B, H_kv, S)``.
            positions: as ``competing(n)`` gives them.
            starts: first position of each turn, and of what follows the last finished one.
        """
        granule = self.last.format.granule if self.pools else 1
        if granule == 1:
            return best_of_spans(order_key(scores, positions), positions, starts, floor)
        pooled, first = self._pool_width(), self._pool_width() + self.pinned()
        both = lambda x: mx.concatenate([x[:, :, :pooled], x[:, :, first : first + n]], axis=2)
        some, at = grouped(both(scores), both(positions), granule)
        safe = mx.repeat(best_of_spans(order_key(some, at), at, starts, floor // granule), granule, axis=2)
        none = mx.zeros(positions.shape, mx.bool_)
        parts = [safe[:, :, :pooled], none[:, :, pooled:first], safe[:, :, pooled:], none[:, :, first + n :]]
        return mx.concatenate(parts, axis=2)

    def rows(self, name: str) -> mx.array:
        """``keys`` or ``values`` of everything held ``(B, H_kv, S, D)``, in the same order."""
        return self._joined([pool.heads_rows(name) for pool in self.pools], getattr(self.ring, name))

    def memory(self) -> mx.array | None:
        """What is remembered of everything held ``(B, H_kv, S)``, in the same order."""
        if self.ring.memory is None:
            return None
        return self._joined([x for pool in self.pools if (x := pool.heads_memory()) is not None], self.ring.memory)

    @staticmethod
    def _joined(old: list[mx.array], new: mx.array) -> mx.array:
        return mx.concatenate([*old, new], axis=2)

    # -- what the scorer remembers -------------------------------------------------------------------------------

    def remember(self, memory: mx.array) -> None:
        """Set what is remembered of everything held ``(B, H_kv, S)``."""
        start = 0
        for pool in self.pools:
            width = pool.heads_positions().shape[2]
            pool.set_memory(memory[:, :, start : start + width])
            start += width
        self.ring.memory = memory[:, :, start:]

    def remember_newest(self, memory: mx.array) -> None:
        """Set what is remembered of the newest ``L`` tokens ``(B, L)``, all of them in the ring, for every KV head."""
        assert self.ring.memory is not None
        n = memory.shape[1]
        new = mx.broadcast_to(memory[:, None], (*self.ring.memory.shape[:2], n))
        self.ring.memory = mx.concatenate([self.ring.memory[:, :, :-n], new], axis=2)

    def update_memory(
        self, update: Callable[[mx.array, mx.array], mx.array], weights: tuple[mx.array, ...]
    ) -> list[mx.array]:
        """``update(memory, weights)`` for each part; returns the arrays that are new."""
        *older, newest = weights
        assert self.ring.memory is not None
        self.ring.memory = update(self.ring.memory, newest)
        pools = [pool for pool in self.pools if pool.count]
        for pool, of_pool in zip(pools, older, strict=True):
            memory = pool.heads_memory()
            assert memory is not None
            pool.set_memory(update(memory, of_pool))
        return [self.ring.memory, *(pool.memory for pool in pools if pool.memory is not None)]

    # -- taking back -----------------------------------------------------------------------------------------------

    def can_forget(self, n: int) -> bool:
        """Whether the newest ``n`` tokens can be taken back exactly."""
        return n <= self.written - self.final

    def forget(self, n: int) -> None:
        """Take back the newest ``n`` tokens, which can be (``can_forget``)."""
        keep = self.written - n
        if self.whole:
            self._refill_ring(-(-max(0, keep - self.n_sink - self.ring_size) // self.block) * self.block)
        self.ring.keep(slice(0, self.ring.count - (self.written - keep)))
        self.written = keep
        self._rank()

    def _refill_ring(self, count: int) -> None:
        """Take tokens from the pools, newest first, until they hold ``count`` per head: nothing was evicted yet."""
        for pool in reversed(self.pools):
            back = min(pool.count, self.pool_count() - count)
            if back > 0:
                self.ring.insert(self.pinned(), _newest(pool, back))
                pool.truncate(back)

    def drop(self, start: int, stop: int, shift: int, turn: Callable[[mx.array, int], mx.array] | None) -> None:
        """Forget the positions ``start .. stop - 1``; what is later moves back by ``shift`` positions.

        Args:
            turn: rotates keys ``(B, H_kv, S, D)`` back by a shift; None where keys need not be turned.
        """
        for pool in self.pools:
            if shift and turn and pool.count:
                later = (pool.heads_positions() >= stop)[..., None]
                keys = pool.heads_rows("keys")
                pool.replace_keys(mx.where(later, turn(keys, shift), keys))
            pool.vacate(start, stop, shift)
        ring, pinned = self.ring, self.ring.positions[: self.pinned()]
        if shift and turn and ring.count:
            later = device(ring.positions >= stop)[None, None, :, None]
            ring.keys = mx.where(later, turn(ring.keys, shift), ring.keys)
        ring.keep(np.flatnonzero((ring.positions < start) | (ring.positions >= stop)))
        ring.positions = np.where(ring.positions >= stop, ring.positions - shift, ring.positions).astype(np.int32)
        self.written -= shift
        if shift and self._any_pooled():  # what moved up to the first positions has older tokens in the pools before it
            left = np.flatnonzero((pinned < start) | (pinned >= stop))
            self.sinks = min(self.sinks, int(ring.positions[len(left) - 1]) + 1 if len(left) else 0)
        elif shift:  # else the ring begins with them, as ever
            self.sinks = self.n_sink
        self._settle()
        self._rank()

    def _any_pooled(self) -> bool:
        """Whether the pools hold a token: one host synchronisation."""
        return any(bool((pool.heads_positions() >= 0).any()) for pool in self.pools if pool.count)

    # -- state -------------------------------------------------------------------------------------------------------

    def arrays(self) -> dict[str, mx.array]:
        """The arrays of ring and pools by name, for ``restore``."""
        if self.empty():
            return {}
        ring = self.ring
        named = {"ring.keys": ring.keys, "ring.values": ring.values, "ring.memory": ring.memory}
        named["ring.positions"] = mx.array(ring.positions)
        for i, pool in enumerate(self.pools):
            named |= {f"pool{i}.{name}": x for name, x in pool.arrays().items()}
        return {name: x for name, x in named.items() if x is not None}

    def numbers(self) -> dict[str, Any]:
        """What else ``restore`` needs."""
        pools = [pool.numbers() for pool in self.pools]
        state = {"written": self.written, "final": self.final, "evicted": self.evicted, "whole": self.whole}
        return {**state, "sinks": self.sinks, "pools": pools}

    def restore(self, arrays: dict[str, mx.array], numbers: dict[str, Any]) -> None:
        """Take over ``arrays`` and ``numbers`` of another; in objects of its own, for slots are written in place."""
        self.written, self.final, self.evicted = (numbers[name] for name in ("written", "final", "evicted"))
        self.whole = numbers.get("whole", not self.final)  # files from before it was told apart
        self.sinks = numbers.get("sinks", self.n_sink)
        if not arrays:
            return
        own = {name: mx.array(x) for name, x in arrays.items()}
        positions = np.array(own["ring.positions"])
        self._ring = Ring(own["ring.keys"], own["ring.values"], own.get("ring.memory"), positions)
        self.pools = [spec.make(self.ring.span(0, 0)) for spec in self.specs]
        for i, (pool, more) in enumerate(zip(self.pools, numbers["pools"], strict=True)):
            prefix = f"pool{i}."
            pool.restore({k.removeprefix(prefix): x for k, x in own.items() if k.startswith(prefix)}, more)
        self._rank()


def _newest(pool: AnyPool, n: int) -> Tokens:
    """The newest ``n`` tokens of a pool, the same for every head, oldest first."""
    order = mx.argsort(pool.heads_positions(), axis=-1)[..., -n:]
    take = lambda x: mx.take_along_axis(x, order[..., None] if x.ndim == 4 else order, axis=2)
    memory = pool.heads_memory()
    keys, values = take(pool.heads_rows("keys")), take(pool.heads_rows("values"))
    return Tokens(keys, values, None if memory is None else take(memory), take(pool.heads_positions()))
