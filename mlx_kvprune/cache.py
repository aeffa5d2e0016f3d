"""``PrunedKVCache``: one layer's bounded cache, in mlx-lm's contract."""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_kvprune.allocators import floor_pages, share_pages
from mlx_kvprune.attend import Attended, Mask, View, among_new, attend, backend
from mlx_kvprune.batch import BatchPrunedKVCache
from mlx_kvprune.policy import policy_for
from mlx_kvprune.rope import Rope, Shared, Turning, position_scale, unrotate
from mlx_kvprune.scorers import Held, Probe, Scorer, Seen
from mlx_kvprune.scorers.base import HEARD, State, recent_without
from mlx_kvprune.settings import PAGE, CacheSettings
from mlx_kvprune.slots import Contest, LayerSlots, PagedPool, Part, plain
from mlx_kvprune.storage import pool_specs

MOST_HEADS = 64  # a head may hold this many times the mean, unless ``attach`` knows the model
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
        start: position of the first new token in the model's eyes.
        gates: what the layer's gate said of the new tokens ``(B, H_kv, L)``, if the scorer asks one.
        blocks: which of the new tokens attended to what, once they did.
    """

    cache: PrunedKVCache
    keys: mx.array
    values: mx.array
    shape: tuple[int, ...]
    dtype: mx.Dtype
    start: int = 0
    gates: mx.array | None = None
    blocks: list[tuple[slice, View]] = field(default_factory=list)

    @property
    def ndim(self) -> int:
        return 4


Gate = Callable[[mx.array], mx.array]


def question_of(scorer: Scorer) -> Probe:
    """How a scorer that knows the question listens."""
    assert scorer.probe is not None
    return scorer.probe


class PrunedKVCache:
    """A KV cache of fixed size: a ring of the newest tokens, a pool of the older ones that score best.

    A token is written to the ring. When the ring is full, its oldest ``block`` tokens and the pool's slots compete for
    the pool's ``slots - ring`` places. This happens at fixed positions of the text, so that the result does not depend on
    how a prompt was cut into calls.

    ``update_and_fetch`` returns a ``Handle`` that only the attention put in by ``attach`` understands; with
    ``dense=True`` it returns arrays for models that do their own attention.

    Args:
        settings: what the user asked for.
        slots: the most slots per KV head, everything counted, on average where heads differ; None for no bound.
        layer: index of the layer.
        dense: return arrays.
    """

    def __init__(self, settings: CacheSettings, slots: int | None = None, layer: int = 0, dense: bool = False):
        policy, self.settings = policy_for(settings)
        assert policy.scorer is not None, "full is mlx-lm's own cache"
        if self.settings.positions == "auto":  # who makes caches without knowing the length of the text gets these
            self.settings = self.settings.but(positions="text")
        self.local = layer in self.settings.local  # whether it holds sinks and ring alone
        if slots is not None and self.settings.allocator != "pyramid" and not self.local:
            self.settings.check_tokens(slots)
        self.scorer: Scorer = policy.scorer
        self.slots = slots
        self.layer = layer
        self.dense = dense
        self.tokens_seen = 0
        self.offset = 0  # position of the next token in the model's eyes: what its rotary embedding reads; where
        # positions are those in the cache, it grows to ``frame`` and stays there: only distances matter
        self.frame = 0 if slots is None else slots * (MOST_HEADS if self.settings.ragged else 1)
        block, ranked = self.settings.block or 0, self.settings.positions == "cache"
        specs = () if self.local else pool_specs(self.settings, slots, self.scorer.least is not None)
        n_sink = self.settings.n_sink
        self.held = LayerSlots(self.settings.ring_size, block, n_sink, specs, self.scorer.memory, ranked)
        self.signals: State = {}
        self.scale = 1.0
        self.n_heads: int | None = None  # query heads, once they were seen
        self.planned: Contest | None = None  # what the next upkeep does, if it was chosen ahead
        self.turns: tuple[int, ...] = ()  # positions at which finished turns of a conversation end
        self.broken = False  # whether a forward pass was broken off, so that layers may hold different tokens
        self.probing = False
        self.heard: mx.array | None = None  # the question's attention to what is held, after a probe
        self.fetched: tuple[Any, Any] | None = None  # what update_and_fetch returned, while the forward pass runs
        self.nbytes_peak = 0
        self.nbytes_peak_all = 0  # of all layers together, noted in the first one's cache where layers compete
        self.lends = True  # whether later layers ask for ``keys_and_values``; ``attach`` knows
        self.asked = False  # whether one did
        self.alone = ""  # why the model cannot be batched, if it cannot
        self.longest: int | None = None  # positions that the model was trained for, where those in the cache are meant
        self.model_id = ""  # says whose keys these are
        self.gates_id = ""  # and which gates said what its tokens are worth
        self.model: weakref.ref[Any] | None = None  # whose they are, once that is known
        self._rope: Shared | None = None
        self._gate: Shared | None = None
        self.staged: mx.array | None = None  # what the gate said of the tokens whose keys come next

    @property
    def evicted(self) -> bool:
        """Whether anything was evicted."""
        return self.held.evicted

    @property
    def rope(self) -> Rope:
        """The layer's rotary module, or None."""
        return None if self._rope is None else self._rope.module

    @rope.setter
    def rope(self, module: Rope) -> None:
        self._rope = Shared(module)  # of None, too: then the layer has no positions

    @property
    def knows_rope(self) -> bool:
        """Whether the layer's rotary module was ever told: a cache that mlx-lm loaded does not know it at first."""
        return self._rope is not None

    @property
    def gate(self) -> Gate | None:
        """The layer's learned gate: attention inputs ``(B, L, width)`` -> ``(B, H_kv, L)``; None if there is none."""
        return None if self._gate is None else self._gate.module

    @gate.setter
    def gate(self, gate: Gate | None) -> None:
        self._gate = Shared(gate)

    @property
    def needs_gate(self) -> bool:
        """Whether the scorer asks a learned gate; where nothing competes, it need not."""
        return "hidden" in self.scorer.needs and not self.local

    def stage(self, x: mx.array) -> None:
        """Take the attention's input ``(B, L, width)`` before it computes keys and values: the gate reads it."""
        if not self.needs_gate or self.probing:
            return
        if self.gate is None:
            raise ValueError(
                f"[gates] policy {self.settings.policy!r} needs the model's gates, which this cache was not told; got a "
                "cache made without attach; try kvp.make_cache(model, ...)"
            )
        self.staged = self.gate(x)

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
        self.asked = True
        return self.fetched

    def _hand_out(self, keys: mx.array, values: mx.array) -> tuple[Any, Any]:
        shape = (*keys.shape[:2], self.offset + keys.shape[2], keys.shape[3])
        handle = Handle(self, keys, values, shape, keys.dtype, self.offset, self._take_staged())
        if not self.probing:
            self._count(keys.shape[2])
        return handle, handle

    def _take_staged(self) -> mx.array | None:
        staged, self.staged = self.staged, None
        if staged is None and self.needs_gate and not self.probing:
            raise ValueError(
                f"[gates] policy {self.settings.policy!r} never saw the attention's input; got keys without it; "
                "try another policy with this model"
            )
        return staged

    def _count(self, n: int) -> None:
        """Note ``n`` new tokens."""
        self.tokens_seen += n
        self._set_offset(self.offset + n)

    def _set_offset(self, offset: int) -> None:
        """Positions in the cache do not grow beyond the frame."""
        framed = self.settings.positions == "cache" and self.frame
        self.offset = min(offset, self.frame) if framed else offset

    def _update_dense(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        self.room()
        start = self.offset
        self._write(keys, values, start, self._take_staged())
        held, heads = self.everything(start + keys.shape[2] - 1), keys.shape[:2]
        self._count(keys.shape[2])
        self._spill()
        assert held.keys.shape[:2] == heads
        return held.keys, held.values

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
        return batch * heads * row * self.tokens_seen

    def is_trimmable(self) -> bool:
        """Whether the newest tokens can be taken back exactly: nothing was evicted, no signal saw their queries."""
        return self.held.whole and not self.scorer.hears

    def can_rewind(self, n: int) -> bool:
        """Whether the newest ``n`` tokens can be taken back exactly: since then nothing was evicted or requantized."""
        return n <= self.tokens_seen and not self.scorer.hears and (self.empty() or self.held.can_forget(n))

    def check_rewind(self, n: int, where: str) -> None:
        """Raise ``ValueError`` unless ``can_rewind(n)``."""
        if not self.can_rewind(n):
            raise ValueError(
                f"[{where}] the newest tokens cannot be taken back exactly with policy {self.settings.policy!r} once it "
                f"has evicted, quantized or scored; got {n}; try a fresh cache, or one that was forked before"
            )

    def trim(self, n: int) -> int:
        """Forget the newest ``n`` tokens; returns how many were forgotten.

        Raises:
            ValueError: it would not be exact.
        """
        n = min(n, self.tokens_seen)
        self.check_rewind(n, "trim")
        if n:
            self.held.forget(n)
            self.tokens_seen, self.planned = self.tokens_seen - n, None
            self._set_offset(self.held.written)
            self.turns = tuple(x for x in self.turns if x <= self.held.written)
            self._note_peak()  # slots that went back to the ring leave their place in the pool allocated
            mx.eval(self.pending)
        return n

    def drop(self, start: int, stop: int, close: bool) -> None:
        """Forget the positions ``start .. stop - 1`` of the text.

        Args:
            start: first of them.
            stop: one past the last.
            close: later tokens move up, as if the span had never been read; else their positions stay.

        Raises:
            ValueError: keys would have to be turned that are quantized.
        """
        self.check_drop(close)
        if self.empty():
            return
        shift = stop - start if close else 0
        turn = self._turn_back if shift and self.settings.positions == "text" and self.rope is not None else None
        if (queries := self.signals.pop("queries", None)) is not None:
            self.signals |= recent_without(queries, self.held.written, start, stop, shift, turn)
        self.held.drop(start, stop, shift, turn)
        self.planned = None
        turns = (x if x <= start else max(start, x - shift) for x in self.turns)
        self.turns = tuple(dict.fromkeys(x for x in turns if x))  # a turn that is gone whole needs no floor
        self._set_offset(self.held.written)
        self._note_peak()
        mx.eval(self.pending)

    def check_drop(self, close: bool) -> None:
        """Raise ``ValueError`` where closing a gap would turn quantized keys, or empty slots would be attended to."""
        if self.dense and any(pool.count for pool in self.held.pools):
            raise ValueError(
                "[drop] this model attends by itself, and would see the emptied slots; got tokens that left the window; try "
                "it before they do, or a model that `attach` calls ragged"
            )
        if close and self.settings.positions == "text" and not all(spec.exact for spec in self.held.specs):
            raise ValueError(
                "[drop] closing a gap turns keys, which would add up errors of quantized ones; "
                f"got {self.settings.key_bits} bits; try close=False, or positions='cache'"
            )
        if close and self.settings.positions == "text" and not self.knows_rope and not self.empty():
            raise ValueError(
                "[drop] closing a gap turns keys, by a rotary module that this cache was not told yet; got a cache that "
                "mlx-lm loaded; try load_cache, or let the model read a token first"
            )

    def _turn_back(self, keys: mx.array, shift: int) -> mx.array:
        """Move rotated keys ``(B, H_kv, S, D)`` back by ``shift`` positions."""
        rope = self.rope
        assert rope is not None
        rows = keys.reshape(-1, 1, 1, keys.shape[-1])  # each on its own: all turn by the same angle
        turned = rope(mx.array(rows), offset=-shift).reshape(keys.shape)
        return turned / position_scale(rope, keys.shape[-1]).astype(keys.dtype)

    def end_turn(self) -> None:
        """Note that a turn of a conversation ends here: what is held of it keeps a floor from now on."""
        if (self.turns or (0,))[-1] < self.held.written:
            self.turns = (*self.turns, self.held.written)

    @property
    def arrays(self) -> dict[str, mx.array]:
        """All that is held, by name: what of ``state`` there is to evaluate."""
        return {**self.held.arrays(), **{f"signal.{name}": x for name, x in self.signals.items()}}

    @property
    def pending(self) -> list[mx.array]:
        """All that there may be to evaluate: without it another thread could not go on."""
        return [*self.arrays.values(), *self.held.ranks]

    @property
    def state(self) -> tuple[Any, ...]:
        """Leaves that mlx-lm can evaluate and save: a line of JSON, then arrays."""
        arrays = self.arrays
        meta = {
            "settings": self.settings.to_json(),
            "slots": self.slots,
            "layer": self.layer,
            "dense": self.dense,
            "numbers": self.held.numbers(),
            "arrays": list(arrays),
            "peak": self.nbytes_peak,
            "peak_all": self.nbytes_peak_all,
            "seen": self.tokens_seen,
            "broken": self.broken,
            "offset": self.offset,
            "frame": self.frame,
            "turns": self.turns,
            "scale": self.scale,
            "heads": self.n_heads,
            "model": self.model_id,
            "gates": self.gates_id,
            "alone": self.alone,
        }
        return (json.dumps(meta), *arrays.values())

    @state.setter
    def state(self, leaves: tuple[Any, ...]) -> None:
        meta = json.loads(leaves[0])
        rope, gate = self.__dict__.get("_rope"), self.__dict__.get("_gate")
        settings = CacheSettings.from_json(meta["settings"])
        PrunedKVCache.__init__(self, settings, meta["slots"], meta["layer"], meta["dense"])
        self.nbytes_peak, self.tokens_seen, self.offset = meta["peak"], meta["seen"], meta["offset"]
        self.frame, self.turns, self.scale = meta["frame"], tuple(meta["turns"]), meta["scale"]
        self.n_heads, self.model_id, self._rope = meta["heads"], meta["model"], rope
        self.gates_id, self.broken = meta.get("gates", ""), meta.get("broken", False)  # files may be older
        self.nbytes_peak_all, self.alone = meta["peak_all"], meta["alone"]
        self._gate = gate
        arrays = dict(zip(meta["arrays"], leaves[1:], strict=True))
        signals = {name: arrays.pop(name) for name in list(arrays) if name.startswith("signal.")}
        self.signals = {name.removeprefix("signal."): x for name, x in signals.items()}
        self.held.restore(arrays, meta["numbers"])

    @classmethod
    def from_state(cls, state: tuple[Any, ...]) -> PrunedKVCache:
        """The cache whose ``state`` this was."""
        cache = cls.__new__(cls)
        cache.state = state
        return cache

    @property
    def merge(self) -> Callable[[list[PrunedKVCache]], BatchPrunedKVCache]:
        """Joins caches of one sequence each to a batch; not there where ``unbatched`` has a reason.

        mlx-lm asks ``hasattr(cache, "merge")``: its server then serves one request after the other.
        """
        if reason := self.unbatched():
            raise AttributeError(f"[batch] {reason}, so that it is not batched; try one request at a time")
        return BatchPrunedKVCache.merge

    def unbatched(self) -> str:
        """Why this cache cannot be batched; empty if it can."""
        if self.dense:
            return "the model does its own attention"
        if self.settings.allocator == "global":
            return "allocator 'global' needs all layers at once"
        needs = " and ".join(sorted(self.scorer.needs & {"logits", "question"}))
        return f"policy {self.settings.policy!r} needs the {needs}" if needs else self.alone

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
        for span, view in self.write_blocks(handle) if first else handle.blocks:
            new, weights = queries[:, :, span], first and self._wants_weights
            among = among_new(mask, span, total)
            seen = attend(new, view, scale=scale, mask=among, sinks=sinks, want_weights=weights)
            outs.append(self._observe(new, seen, handle.start + span.start) if first else seen.out)
        if not self.lends:  # what it saw of the pool, block by block, is not to live until the last layer is done
            self.fetched = None
        return outs[0] if len(outs) == 1 else mx.concatenate(outs, axis=2)

    def backend(self) -> tuple[str, str]:
        """How the next decode step attends, and why."""
        if self.empty() or self.n_heads is None:
            return "fused", "nothing is held yet"
        ring = self.held.ring.keys
        queries = mx.zeros((ring.shape[0], self.n_heads, 1, ring.shape[3]), ring.dtype)
        return backend(queries, self._view(int(self.offset) - 1), None, self._wants_weights)

    @property
    def in_steps(self) -> bool:
        """Whether the whole model must be called anew where slots change hands: no layer can know what it must alone."""
        return self.dense or bool(self.scorer.needs & {"logits", "question"}) or self.settings.allocator == "global"

    def room(self) -> int:
        """Tokens that can be written now without evicting; evicts once if there is no room.

        While the pool has empty slots, more than the ring's share can be written at once: nothing is scored yet.
        """
        if self.held.ahead() <= 0:
            self.upkeep(self.held.block)
        return min(MAX_SEGMENT, self.held.ahead())

    def step_room(self) -> int:
        """Tokens that the next call of the whole model may bring so that none is evicted before all layers saw it.

        Where the scorer must be told something after the call, all of them are still in the ring then.
        """
        told_later = self.scorer.needs & {"logits", "question"}
        return (self.held.spare() if told_later else self.held.ahead()) or self.held.block

    def upkeep(self, n: int) -> None:
        """Move the oldest ``n`` tokens of the ring to the pool; where it is full, the lowest scores are overwritten."""
        if self.held.pools and self.held.pools[0].free >= n:
            self.held.fill(n)
            return
        contest = self.planned or self.contest(n)
        if contest.candidates is not None:
            contest = self.held.decide(contest, self.share(contest))
        self.held.carry_out(contest)
        self.planned = None

    def contest(self, n: int | None = None) -> Contest:
        """What becomes of the oldest ``n`` (a block) of the ring; nothing is changed.

        A pool that is read and written in one graph is copied. Chosen and evaluated ahead, only the write is left.
        """
        n = n or self.held.block
        positions = self.held.competing(n)
        scores = self.scorer.score(self.everything(), self.signals).astype(mx.float32)
        scores = mx.where(positions < 0, -mx.inf, scores)
        wanted = scores if self.scorer.least is None else mx.where(scores < self.scorer.least, -mx.inf, scores)
        if floor := self.turn_slots():
            safe = self.held.best_of_turns(n, scores, positions, (0, *self.turns), floor)
            wanted = mx.where(safe & (positions >= 0), mx.inf, wanted)
        return self.held.contest(n, wanted)

    def turn_slots(self) -> int:
        """Slots per KV head that each finished turn keeps."""
        if not self.turns or self.slots is None:
            return 0
        pool = self.slots - self.settings.ring_size - self.settings.n_sink
        return int(self.settings.turn_floor * pool) // len(self.turns)

    @property
    def protected(self) -> int:
        """The most slots of the pool per KV head that are never evicted: the floors of turns."""
        return self.turn_slots() * len(self.turns)

    @property
    def ragged_pool(self) -> PagedPool:
        """The pool whose heads compete for pages."""
        pool = self.held.last
        assert isinstance(pool, PagedPool)
        return pool

    def share(self, contest: Contest) -> Any:
        """Pages of each head where the heads of this layer alone compete, those of one sequence with each other."""
        assert contest.candidates is not None
        heads, ranked = self.ragged_pool.kv_heads, contest.candidates.ranked
        floor = floor_pages(self.page_limit, heads, self.settings, self.protected)
        rows = [ranked[start : start + heads] for start in range(0, len(ranked), heads)]
        share = lambda row: share_pages(row, self.page_limit, floor, self.ragged_pool.units, self.most_pages)
        return np.concatenate([share(row) for row in rows])

    @property
    def page_limit(self) -> int:
        """Pages of this layer's equal share of a sequence's budget."""
        return self.ragged_pool.limit // self.ragged_pool.batch

    @property
    def pool_slots(self) -> int:
        """Slots of this layer's equal share of a sequence's budget, over all its heads: seldom whole pages."""
        return self.ragged_pool.kv_heads * self.held.specs[-1].limit

    @property
    def most_pages(self) -> int | None:
        """Pages that one head may have, where positions are those in the cache: the model was not trained for more."""
        if self.longest is None:
            return None
        return max(1, (self.longest - self.held.ring_size - self.held.n_sink - self.settings.kv_fine_tokens) // PAGE)

    def evictable(self, newest_too: bool = False) -> mx.array:
        """Which slots are neither sinks nor, unless ``newest_too``, in the window ``(B, H_kv, S)``."""
        positions, settings = self.held.positions(), self.settings
        newest = self.held.written - (0 if newest_too else settings.window or 0)
        return (positions >= self.held.sinks) & (positions < newest)

    def hear(self, heard: mx.array) -> None:
        """Take what a question attended to of each slot ``(B, H_kv, S)``; beside gates it lasts for one choice only."""
        if self.scorer.remembers_heard:
            self.held.remember(heard)
        else:
            self.signals = {**self.signals, HEARD: heard}

    def forget_heard(self) -> None:
        """Slots were chosen."""
        self.signals = {name: x for name, x in self.signals.items() if name != HEARD}

    # -- inside ------------------------------------------------------------------------------------------------------

    @property
    def _wants_weights(self) -> bool:
        return "attention" in self.scorer.needs and "question" not in self.scorer.needs

    def _size_for_next(self) -> int:
        """Slots per KV head that the next new token will find: fewer than now if it makes slots be evicted."""
        if self.probing or not self.held.evicts_next():
            return self.size()
        return self.size() - self.held.block + min(self.held.block, self.held.free_at_all())

    def write_blocks(self, handle: Handle) -> Iterator[tuple[slice, View]]:
        """Write the new tokens in steps that evict nothing; yields which ones, and what they may attend to."""
        start, total = 0, handle.keys.shape[2]
        while start < total:
            span = slice(start, min(total, start + self.room()))
            gates = None if handle.gates is None else handle.gates[:, :, span]
            self._write(handle.keys[:, :, span], handle.values[:, :, span], handle.start + start, gates)
            view = self._view(handle.start + span.stop - 1)
            handle.blocks.append((span, view))
            yield span, view
            self._spill()
            start = span.stop

    def _write(self, keys: mx.array, values: mx.array, start: int, gates: mx.array | None) -> None:
        """Put new tokens, whose first the model sees at position ``start``, into the ring."""
        memory = None
        if self.scorer.memory:
            memory = self.scorer.first(keys, values) if gates is None else self.scorer.gated(gates)
        if self.settings.positions == "cache":
            keys = unrotate(self.rope, keys, start)
        self.held.write(keys, values, memory)

    def _view(self, newest: int) -> View:
        """What may be attended to when the newest token stands at position ``newest`` in the model's eyes."""
        turn = self._turning(newest) if self.settings.positions == "cache" else None
        return View(self.held.parts(turn, newest))

    def _turning(self, newest: int) -> Turning:
        """What rotates rows of keys to positions, none of them beyond ``newest``."""
        return Turning(self.rope, newest + 1)

    def _spill(self) -> None:
        """What the ring cannot hold moves on at once."""
        if over := self.held.overflow():
            self.upkeep(over)
        self._note_peak()

    def _note_peak(self) -> None:
        self.nbytes_peak = max(self.nbytes_peak, self.nbytes)

    def everything(self, newest: int | None = None) -> Held:
        """What is held, as a scorer sees it; the newest token stands at position ``newest`` in the model's eyes."""
        newest = int(self.offset if newest is None else newest + 1) - 1
        keys, cache_positions = self.held.rows("keys"), self.settings.positions == "cache"
        if cache_positions:
            keys = self._turning(newest)(keys, self.held.at(newest))
        return Held(
            keys=keys,
            values=self.held.rows("values"),
            positions=self.held.positions(),
            memory=self.held.memory(),
            now=self.held.written,
            layer=self.layer,
            scale=self.scale,
            rope=self.rope,
            next=newest + 1 if cache_positions else self.held.written,
            turned=not cache_positions,
            ragged=self.settings.ragged,
            sinks=self.held.sinks,
        )

    def _observe(self, queries: mx.array, seen: Attended, at: int) -> mx.array:
        """Tell the scorer; what it remembers is tied to the output, so that it is evaluated with the step."""
        ties: list[mx.array | None] = [self.held.ring.memory]
        if seen.weights is not None:
            ties += self.held.update_memory(self.scorer.attended, seen.weights)
        if "queries" in self.scorer.needs:
            start = self.held.written - queries.shape[2]
            turned = self.settings.positions == "text"
            if not turned:
                queries = unrotate(self.rope, queries, at)
            step = Seen(queries, start, self.rope, turned)
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
            view = self._view(handle.start - 1)
            join = lambda rows, new: plain(mx.concatenate([rows.parts[0], new], axis=2))
            held = view.ring.ready(handle.dtype)
            ring = Part(join(held.keys, handle.keys), join(held.values, handle.values))
            handle.blocks.append((slice(0, queries.shape[2]), replace(view, parts=(*view.parts[:-1], ring))))
        view = handle.blocks[0][1]
        seen = attend(queries, view, scale=scale, mask=mask, sinks=sinks, want_weights=first)
        if seen.weights is not None:
            weights = mx.concatenate(list(seen.weights), axis=-1)
            self.heard = question_of(self.scorer).heard(weights)[..., : -queries.shape[2]]
        return seen.out
