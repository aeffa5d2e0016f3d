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
from mlx_kvprune.slots import LayerSlots, Writes

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
        block = self.settings.block or 0
        self.held = LayerSlots(self.settings.ring_size, block, self._limit(), self.scorer.memory)
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
        if keys.shape[0] > 1 and self.settings.budget.nbytes is not None:
            raise ValueError(
                f"[budget] a budget in bytes is for one sequence; got a batch of {keys.shape[0]}; try a budget in tokens"
            )
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
        self.offset = self.held.written
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
        return self.held.size()

    def empty(self) -> bool:
        return self.held.empty()

    @property
    def nbytes(self) -> int:
        """Bytes of everything that stays between forward calls."""
        return self.held.nbytes + sum(x.nbytes for x in self.signals.values())

    @property
    def nbytes_full(self) -> int:
        """Bytes that an unpruned cache of the same type would hold for the tokens seen."""
        if self.empty():
            return 0
        ring = self.held.ring
        batch, heads, _, width = ring.keys.shape
        row = (width + ring.values.shape[-1]) * ring.keys.itemsize
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
            self.held.forget(n)
            self.offset, self.planned = self.offset - n, None
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
            "count": 0 if self.empty() else self.held.pool.count,
            "peak": self.nbytes_peak,
        }
        signals = (self.signals[name] for name in meta["signals"])
        return (json.dumps(meta), self.offset, self.scale, *self.held.arrays(), *signals)

    @state.setter
    def state(self, leaves: tuple[Any, ...]) -> None:
        meta = json.loads(leaves[0])
        settings = CacheSettings.from_json(meta["settings"])
        PrunedKVCache.__init__(self, settings, meta["slots"], meta["layer"], meta["dense"])
        self.offset, self.scale = leaves[1:3]
        self.evicted, self.nbytes_peak = meta["evicted"], meta["peak"]
        self.held.restore(leaves[3:10], meta["count"], self.offset)
        self.signals = dict(zip(meta["signals"], leaves[10:], strict=True))

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
        pool = not self.empty() and self.held.pool.count > 0
        return backend(2 if pool else 1, self._wants_weights)

    def room(self) -> int:
        """Tokens that can be written now without evicting; evicts once if there is no room.

        While the pool has empty slots, more than the ring's share can be written at once: nothing is scored yet.
        """
        if self.held.evicts_next():
            self.upkeep(self.held.block)
        return min(MAX_SEGMENT, self.held.spare() + self.held.free())

    def step_room(self) -> int:
        """Tokens that the next call of the whole model may bring so that none is evicted before all layers saw it.

        Where the scorer must be told something after the call, all of them are still in the ring then.
        """
        told_later = self.scorer.needs & {"logits", "question"}
        return self.held.spare() + (0 if told_later else self.held.free()) or self.held.block

    def upkeep(self, n: int) -> None:
        """Move the oldest ``n`` tokens of the ring to the pool; where it is full, the lowest scores are overwritten."""
        if self.held.pool.free >= n:
            self.held.move(n)
            return
        self.held.move(n, self.planned or self._choose(n))
        self.planned, self.evicted = None, True

    def plan(self) -> list[mx.array]:
        """Choose now what the next token's upkeep will write; returns the arrays that are to be evaluated for it.

        A pool that is read and written in one graph is copied. Evaluated ahead, the choice leaves only the write.
        """
        if self.planned is None and self.held.evicts_next() and "rope" not in self.scorer.needs:
            self.planned = self._choose(self.held.block)
        return [] if self.planned is None else [self.planned.slots, *self.planned.rows.values()]

    def evictable(self) -> mx.array:
        """Which slots are neither sinks nor in the window, as the first head holds them ``(B, 1, S)``."""
        positions, settings = self.held.positions()[:, :1], self.settings
        newest = self.held.written - (settings.window or 0)
        return (positions >= settings.n_sink) & (positions < newest)

    # -- inside ------------------------------------------------------------------------------------------------------

    @property
    def _wants_weights(self) -> bool:
        return "attention" in self.scorer.needs and "question" not in self.scorer.needs

    def _limit(self) -> int:
        return UNBOUNDED if self.slots is None else self.slots - self.settings.ring_size

    def _choose(self, n: int) -> Writes:
        held = self.everything()
        scores = self.scorer.score(held, self.signals).astype(mx.float32)
        return self.held.choose(n, mx.where(held.positions < self.settings.n_sink, mx.inf, scores))

    def _size_for_next(self) -> int:
        """Slots per KV head that the next new token will find: fewer than now if it makes slots be evicted."""
        if self.probing or not self.held.evicts_next():
            return self.size()
        return self.size() - self.held.block + self.held.pool.free

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
        self.held.write(keys, values, self.scorer.first(keys, values) if self.scorer.memory else None)
        return View(*self.held.parts())

    def _spill(self) -> None:
        """What the ring cannot hold moves on at once."""
        if over := self.held.overflow():
            self.upkeep(over)
        self.nbytes_peak = max(self.nbytes_peak, self.nbytes)

    def everything(self) -> Held:
        """What is held, as a scorer sees it."""
        keys, values = (mx.concatenate(list(x), axis=2) for x in self.held.parts())
        return Held(
            keys=keys,
            values=values,
            positions=self.held.positions(),
            memory=self.held.memory(),
            now=self.held.written,
            layer=self.layer,
            scale=self.scale,
            rope=self.rope,
        )

    def _observe(self, queries: mx.array, seen: Attended) -> mx.array:
        """Tell the scorer; what it remembers is tied to the output, so that it is evaluated with the step."""
        ties: list[mx.array | None] = []
        if seen.weights is not None:
            ties += self.held.update_memory(self.scorer.attended, seen.weights)
        if "queries" in self.scorer.needs:
            step = Seen(queries, self.held.written - queries.shape[2], self.rope)
            self.signals = self.scorer.observe(self.signals, step)
            ties += self.signals.values()
        tied = [x for x in ties if x is not None]
        return mx.depends([seen.out], tied)[0] if tied else seen.out

    def _attend_probe(
        self, queries: mx.array, handle: Handle, scale: float, mask: Mask, sinks: mx.array | None
    ) -> mx.array:
        """The question's tokens attend to what is held and to themselves; nothing changes but what was heard."""
        first = not handle.blocks
        if first:
            view, join = View(*self.held.parts()), lambda x, new: (*x[:-1], mx.concatenate([x[-1], new], axis=2))
            view = View(join(view.keys, handle.keys), join(view.values, handle.values))
            handle.blocks.append((slice(0, queries.shape[2]), view))
        view = handle.blocks[0][1]
        seen = attend(queries, view, scale=scale, mask=mask, sinks=sinks, want_weights=first)
        if seen.weights is not None:
            self.heard = self.scorer.heard(mx.concatenate(list(seen.weights), axis=-1))[..., : self.size()]
        return seen.out


def _among_new(mask: Mask, span: slice, total: int) -> Mask:
    """The part of a mask over ``total`` new tokens that concerns a span of them."""
    if not isinstance(mask, mx.array):
        return mask
    newest = mask[..., -total:]
    return newest[..., span, span] if newest.shape[-2] == total else newest[..., span]
