"""``PrunedKVCache``: one layer's bounded cache, in mlx-lm's contract."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx

from mlx_kvprune.attend import Attended, Mask, View, attend, backend
from mlx_kvprune.policy import policy_for
from mlx_kvprune.rope import Rope
from mlx_kvprune.scorers import Held, Scorer, Seen
from mlx_kvprune.scorers.base import State
from mlx_kvprune.settings import CacheSettings
from mlx_kvprune.slots import Pool, Ring, Writes

UNBOUNDED = 1 << 30
MAX_SEGMENT = 512  # most queries that attend at once: bounds the score matrix


@dataclass(eq=False)
class Handle:
    """What ``update_and_fetch`` returns in the place of keys: attention finds the cache through it.

    A model may hand it on to later layers that share its keys; those replay the views of the first.

    Attributes:
        keys: of the new tokens ``(B, H_kv, L, D)``.
        values: of the new tokens ``(B, H_kv, L, D_v)``.
        shape: what an unpruned array of keys would have, ``(B, H_kv, tokens seen, D)``; models read lengths off it.
        dtype: the keys' type.
        blocks: which of the new tokens attended to what, once they did.
    """

    cache: PrunedKVCache
    keys: mx.array
    values: mx.array
    shape: tuple[int, ...]
    dtype: mx.Dtype
    blocks: list[tuple[slice, View]] = field(default_factory=list)

    @property
    def ndim(self) -> int:
        return 4


class PrunedKVCache:
    """A KV cache of fixed size: a ring of the newest tokens, a pool of the older ones that score best.

    A token is written to the ring. When the ring is full, its oldest ``block`` tokens and the pool's slots compete for
    the pool's ``slots - ring`` places. This happens at fixed positions of the text, so that the result does not depend on
    how a prompt was cut into calls.

    ``update_and_fetch`` returns a ``Handle`` that only the attention put in by ``attach`` understands; with
    ``dense=True`` it returns arrays for models that do their own attention.

    Args:
        settings: what the user asked for.
        slots: the most slots per KV head, everything counted; None for no bound.
        layer: index of the layer.
        dense: return arrays.
    """

    def __init__(self, settings: CacheSettings, slots: int | None = None, layer: int = 0, dense: bool = False):
        policy, self.settings = policy_for(settings)
        assert policy.scorer is not None, "full is mlx-lm's own cache"
        if slots is not None:
            self.settings.check_tokens(slots)
        self.scorer: Scorer = policy.scorer
        self.slots = slots
        self.layer = layer
        self.dense = dense
        self.offset = 0  # tokens seen: what the model's rotary embedding reads
        self.written = 0  # of them, those that are in the ring or have been; behind only inside a forward pass
        self._ring: Ring | None = None
        self._pool: Pool | None = None
        self.signals: State = {}
        self.scale = 1.0
        self.n_heads: int | None = None  # query heads, once they were seen
        self.evicted = False
        self.planned: Writes | None = None  # what the next upkeep writes, if it was chosen ahead
        self.probing = False
        self.heard: mx.array | None = None  # the question's attention to what is held, after a probe
        self.fetched: tuple[Any, Any] | None = None  # what update_and_fetch returned, while the forward pass runs
        self.nbytes_peak = 0
        self.rope: Rope = None  # the layer's own, while its forward pass runs

    # -- what mlx-lm calls -------------------------------------------------------------------------------------------

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[Any, Any]:
        """Take the keys and values ``(B, H_kv, L, D)`` of new tokens; return what their queries attend to."""
        self._start(keys, values)
        self.fetched = self._update_dense(keys, values) if self.dense else self._hand_out(keys, values)
        return self.fetched

    def keys_and_values(self) -> tuple[Any, Any]:
        """What this forward pass's ``update_and_fetch`` returned: for layers that share an earlier layer's keys."""
        assert self.fetched is not None
        return self.fetched

    def _hand_out(self, keys: mx.array, values: mx.array) -> tuple[Any, Any]:
        shape = (*keys.shape[:2], self.offset + keys.shape[2], keys.shape[3])
        handle = Handle(self, keys, values, shape, keys.dtype)
        if not self.probing:
            self.offset += keys.shape[2]
        return handle, handle

    def _update_dense(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        self.room()
        view = self._write(keys, values)
        self.offset = self.written
        keys, values = (mx.concatenate(list(x), axis=2) for x in (view.keys, view.values))
        self._spill()
        return keys, values

    def make_mask(self, N: int, return_array: bool = False, window_size: int | None = None) -> Mask:
        """The mask of ``N`` new tokens over what will be held when they come, as mlx-lm's caches make it."""
        if N == 1 and window_size is None:
            return None
        if window_size is not None:
            raise NotImplementedError("a sliding window over a plain KV cache")
        if not return_array:
            return "causal"
        from mlx_lm.models.base import create_causal_mask

        return create_causal_mask(N, self._size_for_next())

    def size(self) -> int:
        """Slots held per KV head."""
        return 0 if self.empty() else self.pool.count + self.ring.count

    def empty(self) -> bool:
        return self._ring is None

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

    @property
    def nbytes(self) -> int:
        """Bytes of everything that stays between forward calls."""
        slots = 0 if self.empty() else self.ring.nbytes + self.pool.nbytes
        return slots + sum(x.nbytes for x in self.signals.values())

    @property
    def nbytes_full(self) -> int:
        """Bytes that an unpruned cache of the same type would hold for the tokens seen."""
        if self.empty():
            return 0
        batch, heads, _, width = self.ring.keys.shape
        row = (width + self.ring.values.shape[-1]) * self.ring.keys.itemsize
        return batch * heads * row * self.offset

    def is_trimmable(self) -> bool:
        """Whether the newest tokens can be taken back exactly: nothing was evicted, no signal saw their queries."""
        return not self.evicted and not self.scorer.needs

    def trim(self, n: int) -> int:
        """Forget the newest ``n`` tokens; returns how many were forgotten.

        Raises:
            ValueError: it would not be exact.
        """
        if not self.is_trimmable():
            raise ValueError(
                f"[trim] the newest tokens cannot be taken back exactly with policy {self.settings.policy!r} once it has "
                f"evicted or scored; got {n}; try a fresh cache"
            )
        n = min(n, self.offset)
        if n:
            self._forget(n)
        self.offset = self.written = self.offset - n
        return n

    @property
    def state(self) -> tuple[Any, ...]:
        """Leaves that mlx-lm can evaluate and save."""
        meta = {
            "settings": self.settings.to_json(),
            "slots": self.slots,
            "layer": self.layer,
            "dense": self.dense,
            "evicted": self.evicted,
            "signals": sorted(self.signals),
            "count": 0 if self.empty() else self.pool.count,
            "peak": self.nbytes_peak,
        }
        return (json.dumps(meta), self.offset, self.scale, *self._slots(), *(self.signals[n] for n in meta["signals"]))

    @state.setter
    def state(self, leaves: tuple[Any, ...]) -> None:
        meta = json.loads(leaves[0])
        leaves = tuple(mx.array(x) if isinstance(x, mx.array) else x for x in leaves)  # own objects: written in place
        settings = CacheSettings.from_json(meta["settings"])
        PrunedKVCache.__init__(self, settings, meta["slots"], meta["layer"], meta["dense"])
        self.offset, self.scale = leaves[1:3]
        self.written = self.offset
        self.evicted, self.nbytes_peak = meta["evicted"], meta["peak"]
        ring, pool, signals = leaves[3:6], leaves[6:10], leaves[10:]
        if ring[0] is not None:
            self._ring = Ring(*ring)
            self._pool = Pool(self._limit(), meta["count"], *pool)
        self.signals = dict(zip(meta["signals"], signals, strict=True))

    @classmethod
    def from_state(cls, state: tuple[Any, ...]) -> PrunedKVCache:
        """The cache whose ``state`` this was."""
        cache = cls.__new__(cls)
        cache.state = state
        return cache

    # -- attention ---------------------------------------------------------------------------------------------------

    def attend(
        self, queries: mx.array, handle: Handle, scale: float, mask: Mask = None, sinks: mx.array | None = None
    ) -> mx.array:
        """Attention of the queries ``(B, H_q, L, D)`` of the tokens that ``handle`` brought, block by block.

        Each block attends to what is held and to itself; then the scorer is told, and slots are exchanged. Layers that
        were handed another layer's handle see the same views and change nothing.
        """
        if self.probing:
            return self._attend_probe(queries, handle, scale, mask, sinks)
        self.scale, self.n_heads = float(scale), queries.shape[1]
        first, total, outs = not handle.blocks, queries.shape[2], []
        for span, view in self._write_blocks(handle) if first else handle.blocks:
            new, weights = queries[:, :, span], first and self._wants_weights
            among = _among_new(mask, span, total)
            seen = attend(new, view, scale=scale, mask=among, sinks=sinks, want_weights=weights)
            outs.append(self._observe(new, seen) if first else seen.out)
        return outs[0] if len(outs) == 1 else mx.concatenate(outs, axis=2)

    def backend(self) -> tuple[str, str]:
        """How the next decode step attends, and why."""
        pool = not self.empty() and self.pool.count > 0
        return backend(2 if pool else 1, self._wants_weights)

    def room(self) -> int:
        """Tokens that can be written now without evicting; evicts once if there is no room.

        While the pool has empty slots, more than the ring's share can be written at once: nothing is scored yet.
        """
        if self.empty():
            return min(MAX_SEGMENT, self.settings.ring_size + self._limit() // self._block * self._block)
        if self.evicts_next():
            self.upkeep(self._block)
        spare = self.settings.ring_size - self.ring.count
        return min(MAX_SEGMENT, spare + self.pool.free // self._block * self._block)

    def step_room(self) -> int:
        """Tokens that the next call of the whole model may bring so that none is evicted before all layers saw it.

        Where the scorer must be told something after the call, all of them are still in the ring then.
        """
        spare = self.settings.ring_size - (0 if self.empty() else self.ring.count)
        free = self._limit() if self.empty() else self.pool.free
        if not self.scorer.needs & {"logits", "question"}:
            spare += free // self._block * self._block
        return spare or self._block

    def full(self) -> bool:
        """Whether the next token makes slots change hands."""
        return not self.empty() and self.ring.count >= self.settings.ring_size

    def upkeep(self, n: int) -> None:
        """Move the oldest ``n`` tokens of the ring to the pool; where it is full, the lowest scores are overwritten."""
        if self.pool.free >= n:
            self.pool.fill(self.ring.oldest(n), self._ring_positions()[:, :, :n])
        else:
            assert self.planned is None or self.planned.n == n
            self.pool.write(self.planned or self._choose(n))
            self.planned, self.evicted = None, True
        self.ring.drop_oldest(n)

    def plan(self) -> list[mx.array]:
        """Choose now what the next token's upkeep will write; returns the arrays that are to be evaluated for it.

        A pool that is read and written in one graph is copied. Evaluated ahead, the choice leaves only the write.
        """
        if self.planned is None and self.evicts_next() and "rope" not in self.scorer.needs:
            self.planned = self._choose(self._block)
        return [] if self.planned is None else [self.planned.slots, *self.planned.rows.values()]

    def _choose(self, n: int) -> Writes:
        held, count = self._held(), self.pool.count
        scores = self.scorer.score(held, self.signals).astype(mx.float32)
        scores = mx.where(held.positions < self.settings.n_sink, mx.inf, scores)
        slots, leaving = slice(0, count), slice(count, count + n)
        positions = held.positions[:, :, leaving]
        return self.pool.choose(self.ring.oldest(n), positions, scores[:, :, slots], scores[:, :, leaving])

    def evicts_next(self) -> bool:
        """Whether the next token makes slots be evicted."""
        return self.full() and self.pool.free < self._block

    def evictable(self) -> mx.array:
        """Which slots are neither sinks nor in the window, as the first row and head hold them ``(B, 1, S)``."""
        positions = self._held().positions[:, :1]
        settings = self.settings
        newest = self.written - (settings.window or 0)
        return (positions >= settings.n_sink) & (positions < newest)

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

    # -- inside ------------------------------------------------------------------------------------------------------

    @property
    def _block(self) -> int:
        assert self.settings.block is not None
        return self.settings.block

    @property
    def _wants_weights(self) -> bool:
        return "attention" in self.scorer.needs and "question" not in self.scorer.needs

    def _limit(self) -> int:
        return UNBOUNDED if self.slots is None else self.slots - self.settings.ring_size

    def _slots(self) -> tuple[mx.array | None, ...]:
        if self.empty():
            return (None,) * 7
        ring, pool = self.ring, self.pool
        return (ring.keys, ring.values, ring.memory, pool.keys, pool.values, pool.positions, pool.memory)

    def _start(self, keys: mx.array, values: mx.array) -> None:
        if self.empty():
            memory = mx.zeros((*keys.shape[:2], 0)) if self.scorer.memory else None
            self._ring = Ring(keys[:, :, :0], values[:, :, :0], memory)
            self._pool = Pool.like(self._ring, self._limit())

    def _size_for_next(self) -> int:
        """Slots per KV head that the next new token will find: fewer than now if it makes slots change hands."""
        if self.probing or not self.evicts_next():
            return self.size()
        return self.size() - self._block + self.pool.free

    def _write_blocks(self, handle: Handle) -> Iterator[tuple[slice, View]]:
        """Write the new tokens in steps that evict nothing; yields which ones, and what they may attend to."""
        start, total = 0, handle.keys.shape[2]
        while start < total:
            span = slice(start, min(total, start + self.room()))
            view = self._write(handle.keys[:, :, span], handle.values[:, :, span])
            handle.blocks.append((span, view))
            yield span, view
            self._spill()
            start = span.stop

    def _write(self, keys: mx.array, values: mx.array) -> View:
        self.ring.append(keys, values, self.scorer.first(keys, values) if self.scorer.memory else None)
        self.written += keys.shape[2]
        return self._view()

    def _spill(self) -> None:
        """What the ring cannot hold moves on at once."""
        over = self.ring.count - self.settings.ring_size
        if over > 0:
            self.upkeep(-(-over // self._block) * self._block)
        self.nbytes_peak = max(self.nbytes_peak, self.nbytes)

    def _view(self) -> View:
        ring, pool = self.ring, self.pool
        if pool.count == 0:
            return View((ring.keys,), (ring.values,))
        used = slice(0, pool.count)
        return View((pool.keys[:, :, used], ring.keys), (pool.values[:, :, used], ring.values))

    def _held(self) -> Held:
        view, pool, ring = self._view(), self.pool, self.ring
        join = lambda old, new: mx.concatenate([old[:, :, : pool.count], new], axis=2)
        return Held(
            keys=mx.concatenate(list(view.keys), axis=2),
            values=mx.concatenate(list(view.values), axis=2),
            positions=join(pool.positions, self._ring_positions()),
            memory=None if ring.memory is None else join(pool.memory, ring.memory),
            now=self.written,
            layer=self.layer,
            scale=self.scale,
            rope=self.rope,
        )

    def _ring_positions(self) -> mx.array:
        batch, heads, count, _ = self.ring.keys.shape
        newest = mx.arange(self.written - count, self.written, dtype=mx.int32)
        return mx.broadcast_to(newest, (batch, heads, count))

    def _observe(self, queries: mx.array, seen: Attended) -> mx.array:
        """Tell the scorer; what it remembers is tied to the output, so that it is evaluated with the step."""
        if seen.weights is not None:
            self._update_memory(seen.weights)
        if "queries" in self.scorer.needs:
            step = Seen(queries, self.written - queries.shape[2], self.rope)
            self.signals = self.scorer.observe(self.signals, step)
        ties = list(self.signals.values())
        if seen.weights is not None:
            ties += [x for x in (self.ring.memory, self.pool.memory) if x is not None]
        return mx.depends([seen.out], ties)[0] if ties else seen.out

    def _update_memory(self, weights: tuple[mx.array, ...]) -> None:
        *older, newest = weights
        assert self.ring.memory is not None and self.pool.memory is not None
        self.ring.memory = self.scorer.attended(self.ring.memory, newest)
        if older:
            self._set_pool_memory(self.scorer.attended(self.pool.memory[:, :, : self.pool.count], older[0]))

    def _set_pool_memory(self, memory: mx.array) -> None:
        assert self.pool.memory is not None
        unused = self.pool.memory[:, :, self.pool.count :]
        self.pool.memory = mx.concatenate([memory, unused], axis=2) if unused.shape[2] else memory

    def _attend_probe(
        self, queries: mx.array, handle: Handle, scale: float, mask: Mask, sinks: mx.array | None
    ) -> mx.array:
        """The question's tokens attend to what is held and to themselves; nothing changes but what was heard."""
        first = not handle.blocks
        if first:
            view, join = self._view(), lambda x, new: (*x[:-1], mx.concatenate([x[-1], new], axis=2))
            view = View(join(view.keys, handle.keys), join(view.values, handle.values))
            handle.blocks.append((slice(0, queries.shape[2]), view))
        view = handle.blocks[0][1]
        seen = attend(queries, view, scale=scale, mask=mask, sinks=sinks, want_weights=first)
        if seen.weights is not None:
            self.heard = self.scorer.heard(mx.concatenate(list(seen.weights), axis=-1))[..., : self.size()]
        return seen.out

    def _forget(self, n: int) -> None:
        """Take back the newest ``n`` tokens while every token is still held, in order."""
        ring, pool, keep = self.ring, self.pool, self.written - n
        self.planned = None
        over = max(0, keep - self.settings.ring_size)
        count = -(-over // self._block) * self._block
        back = slice(count, pool.count)
        for name in ("keys", "values", "memory"):
            held = getattr(ring, name)
            if held is not None:
                held = mx.concatenate([getattr(pool, name)[:, :, back], held], axis=2)
                setattr(ring, name, held[:, :, : keep - count])
        pool.clear(back)


def _among_new(mask: Mask, span: slice, total: int) -> Mask:
    """The part of a mask over ``total`` new tokens that concerns a span of them."""
    if not isinstance(mask, mx.array):
        return mask
    newest = mask[..., -total:]
    return newest[..., span, span] if newest.shape[-2] == total else newest[..., span]
