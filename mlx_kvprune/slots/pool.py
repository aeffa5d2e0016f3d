"""The cold pool for heads that hold equally much: slots that are overwritten in place."""

from __future__ import annotations

from dataclasses import dataclass, replace

import mlx.core as mx

from mlx_kvprune.quantize import Frame
from mlx_kvprune.slots.choose import Exchange, grouped, order_key
from mlx_kvprune.slots.format import Format, RowDict
from mlx_kvprune.slots.parts import Part
from mlx_kvprune.slots.ring import Tokens

FIRST_CAPACITY = 256


@dataclass(frozen=True)
class Writes:
    """Rows that go into slots, by the name of the pool's array, and the tokens that found no place.

    Attributes:
        n: tokens that came.
        slots: which rows are written ``(B, H_kv, m)``.
        rows: what is written.
        losers: the tokens that the pool did not keep ``(B, H_kv, n - free)``, if they were asked for.
        scores: retention scores of the losers, likewise.
        lost: whether a token is lost to this pool.
    """

    n: int
    slots: mx.array
    rows: RowDict
    losers: Tokens | None = None
    scores: mx.array | None = None
    lost: bool = True

    def arrays(self) -> list[mx.array]:
        """What must be evaluated before the pool is written in place."""
        lost = [] if self.losers is None else self.losers.arrays()
        return [self.slots, *self.rows.values(), *lost]


class Pool:
    """Slots of one layer, the same number for every KV head, in no order: each carries its position.

    Slots ``[0, count)`` are in use. Capacity doubles up to ``limit`` while the text is short; once ``limit`` is reached
    nothing is allocated again.

    Args:
        limit: the most slots per KV head; a multiple of the format's granule.
        like: tokens of the kind that will be held.
        format: how they are stored.

    Attributes:
        count: slots in use per KV head.
        holes: how many slots per KV head may have been emptied in the middle.
        rows: packed keys and values ``(B, H_kv, capacity / granule, row)``.
        positions: ``(B, H_kv, capacity)`` int32; negative where a slot is empty.
        memory: what the scorer remembers ``(B, H_kv, capacity)`` float32, or None.
    """

    ragged = False

    def __init__(self, limit: int, like: Tokens, format: Format):
        self.limit, self.format, self.count, self.holes = limit, format, 0, 0
        self.rows = format.no_rows(like.keys, like.values)
        self.positions = mx.zeros((*like.keys.shape[:2], 0), mx.int32)
        self.memory = None if like.memory is None else mx.zeros(self.positions.shape)

    # -- how much --------------------------------------------------------------------------------------------------

    @property
    def capacity(self) -> int:
        return self.positions.shape[2]

    @property
    def free(self) -> int:
        """Slots per KV head that may still be filled without evicting."""
        return self.limit - self.count

    @property
    def held(self) -> int:
        """Slots in use over all heads."""
        return self.count * self.positions.shape[0] * self.positions.shape[1]

    @property
    def nbytes(self) -> int:
        arrays = (*self.rows.values(), self.positions, self.memory)
        return sum(x.nbytes for x in arrays if x is not None) + self.format.frame_nbytes

    # -- what is held, as a scorer sees it -----------------------------------------------------------------------

    def heads_positions(self) -> mx.array:
        """``(B, H_kv, S)`` int32, negative where a slot is empty."""
        return self.positions[:, :, : self.count]

    def heads_memory(self) -> mx.array | None:
        """``(B, H_kv, S)``."""
        return None if self.memory is None else self.memory[:, :, : self.count]

    def heads_rows(self, name: str) -> mx.array:
        """Decoded ``keys`` or ``values`` ``(B, H_kv, S, D)``."""
        return self.format.rows_of(self._used(), name).decoded(self.format.dtype)

    def laid_out(self, x: mx.array) -> mx.array:
        """Something of each slot ``(B, H_kv, S)``, as ``part`` has it."""
        return x

    def set_memory(self, memory: mx.array) -> None:
        """Set what is remembered ``(B, H_kv, S)``."""
        assert self.memory is not None
        unused = self.memory[:, :, self.count :]
        self.memory = mx.concatenate([memory, unused], axis=2) if unused.shape[2] else memory

    def part(self) -> Part:
        """What attention works on."""
        used = self._used()
        mask = (self.heads_positions() >= 0)[:, :, None] if self.holes else None
        return Part(self.format.rows_of(used, "keys"), self.format.rows_of(used, "values"), mask)

    # -- changes -----------------------------------------------------------------------------------------------------

    def fill(self, tokens: Tokens) -> None:
        """Put tokens into empty slots; all of them must fit."""
        stop = self.count + tokens.n
        assert stop <= self.limit
        self._grow(stop)
        span = slice(self.count, stop)
        wide = slice(self.count // self.format.granule, stop // self.format.granule)
        for name, new in self.format.encode(tokens.keys, tokens.values).items():
            self.rows[name][:, :, wide] = new
        self.positions[:, :, span] = tokens.positions
        if self.memory is not None and tokens.memory is not None:
            self.memory[:, :, span] = tokens.memory
        self.count = stop

    def choose(self, tokens: Tokens, slot_scores: mx.array, scores: mx.array, want_losers: bool = False) -> Writes:
        """What is to be written so that the pool keeps the best of its slots and of the tokens that come.

        Empty slots are filled first, then slots that score worse than a token. Nothing is written yet.

        Args:
            tokens: ``n`` tokens.
            slot_scores: retention scores of the slots in use ``(B, H_kv, count)``.
            scores: retention scores of the tokens ``(B, H_kv, n)``.
            want_losers: give back those that were not kept.
        """
        self._grow(min(self.limit, self.count + tokens.n))
        if extra := self.capacity - self.count:
            slot_scores = mx.concatenate([slot_scores, mx.full((*slot_scores.shape[:2], extra), -mx.inf)], axis=2)
        slot_scores = mx.where(self.positions < 0, -mx.inf, slot_scores)
        granule = self.format.granule
        pairs = self.format.tools.exchange(
            *grouped(slot_scores, self.positions, granule), *grouped(scores, tokens.positions, granule)
        )
        new = self._named(self.format.encode(tokens.keys, tokens.values), tokens.positions, tokens.memory)
        held = self._named(self.rows, self.positions, self.memory)
        rows = {name: _of_pairs(held[name], x, pairs, pairs.replace) for name, x in new.items()}
        if not want_losers:
            return Writes(tokens.n, pairs.slots, rows)
        return Writes(tokens.n, pairs.slots, rows, *self._losers(pairs, tokens, slot_scores, scores))

    def write(self, writes: Writes) -> None:
        """Write what was chosen: in place where ``writes`` is evaluated and nobody else reads the pool."""
        for name, rows in writes.rows.items():
            flat = self._get(name)
            self._set(name, mx.put_along_axis(flat, writes.slots[..., None], rows, axis=2))
        self.count = min(self.limit, self.count + writes.n)

    def truncate(self, n: int) -> None:
        """Empty the ``n`` slots that were filled last; nothing was overwritten yet."""
        self.positions[:, :, self.count - n : self.count] = self._empty(self.count - n, self.count)
        self.count -= n

    def vacate(self, start: int, stop: int, shift: int = 0) -> None:
        """Empty the slots of the positions ``start .. stop - 1``; later positions move back by ``shift``."""
        gone = (self.positions >= start) & (self.positions < stop)
        later = mx.where(self.positions >= stop, self.positions - shift, self.positions)
        self.positions = mx.where(gone, self._empty(0, self.capacity), later)
        self.memory = None if self.memory is None else mx.where(gone, 0.0, self.memory)
        self.holes = min(self.count, self.holes + stop - start)

    def count_holes(self) -> None:
        """See how many slots in use are still empty: one host synchronisation, while there are any."""
        self.holes = int((self.heads_positions() < 0).sum(axis=-1).max()) if self.count else 0

    def replace_keys(self, keys: mx.array) -> None:
        """Set the keys of the slots in use ``(B, H_kv, S, D)``; only where they are stored as they are."""
        assert self.format.keys.bits is None
        self.rows["keys.0"] = mx.concatenate([keys, self.rows["keys.0"][:, :, self.count :]], axis=2)

    # -- state -------------------------------------------------------------------------------------------------------

    def arrays(self) -> dict[str, mx.array]:
        """All arrays, by name."""
        named = {**self.rows, "positions": self.positions}
        if self.memory is not None:
            named["memory"] = self.memory
        frame = self.format.frame
        return named if frame is None else {**named, "offset": frame.offset, "scale": frame.scale}

    def numbers(self) -> dict[str, int]:
        """What else ``restore`` needs."""
        return {"count": self.count, "holes": self.holes}

    def restore(self, arrays: dict[str, mx.array], numbers: dict[str, int]) -> None:
        """Take over another pool's ``arrays`` and ``numbers``."""
        self.format = with_frame(self.format, arrays)
        self.positions, self.memory = arrays["positions"], arrays.get("memory")
        self.rows = {name: arrays[name] for name in self.rows}
        self.count, self.holes = numbers["count"], numbers["holes"]

    # -- inside ------------------------------------------------------------------------------------------------------

    def _used(self) -> RowDict:
        stop = self.count // self.format.granule
        return {name: x[:, :, :stop] for name, x in self.rows.items()}

    def _named(self, rows: RowDict, positions: mx.array, memory: mx.array | None) -> RowDict:
        """Rows, positions and memory in rows of ``granule`` tokens."""
        wide = lambda x: x.reshape(*x.shape[:2], x.shape[2] // self.format.granule, self.format.granule)
        named = {**rows, "positions": wide(positions)}
        return named if memory is None else {**named, "memory": wide(memory)}

    def _get(self, name: str) -> mx.array:
        return self._named(self.rows, self.positions, self.memory)[name]

    def _set(self, name: str, x: mx.array) -> None:
        if name in self.rows:
            self.rows[name] = x
        else:
            setattr(self, name, x.reshape(*x.shape[:2], -1))

    def _losers(
        self, pairs: Exchange, tokens: Tokens, slot_scores: mx.array, scores: mx.array
    ) -> tuple[Tokens, mx.array]:
        """Of each pair the one that lost, then the tokens that met no slot; with their scores.

        Slots that were never filled lose to every token, and are not handed on.
        """
        assert self.format.granule == 1, "pages are not handed on"
        keys, values = (self.format.rows_of(self.rows, name).decoded(self.format.dtype) for name in ("keys", "values"))

        def lost(slots: mx.array, new: mx.array) -> mx.array:
            flat = slots.ndim == 3
            slots, new = (x[..., None] if flat else x for x in (slots, new))
            of_pairs = _of_pairs(slots, new, pairs, ~pairs.replace)
            beaten = mx.take_along_axis(new, pairs.beaten[..., None], axis=2)
            out = mx.concatenate([of_pairs, beaten], axis=2)
            return out[..., 0] if flat else out

        memory = None
        if self.memory is not None and tokens.memory is not None:
            memory = lost(self.memory, tokens.memory)
        losers = Tokens(
            lost(keys, tokens.keys), lost(values, tokens.values), memory, lost(self.positions, tokens.positions)
        )
        return _without_worst(losers, lost(slot_scores, scores), self.free)

    def _empty(self, start: int, stop: int) -> mx.array:
        """Positions of empty slots: negative, and rising, so that the first empty slot is the first to be filled."""
        return mx.arange(start, stop, dtype=mx.int32) - self.limit

    def _grow(self, needed: int) -> None:
        """Make room for ``needed`` slots: double, but never beyond ``limit``."""
        if needed <= self.capacity:
            return
        granule = self.format.granule
        extra = min(self.limit, max(needed, 2 * self.capacity, FIRST_CAPACITY)) - self.capacity
        for name, rows in self.rows.items():
            self.rows[name] = _longer(rows, extra // granule)
        if self.memory is not None:
            self.memory = _longer(self.memory, extra)
        empty = self._empty(self.capacity, self.capacity + extra)
        empty = mx.broadcast_to(empty, (*self.positions.shape[:2], extra))
        self.positions = mx.concatenate([self.positions, empty], axis=2)


def with_frame(format: Format, arrays: dict[str, mx.array]) -> Format:
    """The format with the frame that saved arrays bring, if they do."""
    return replace(format, frame=Frame(arrays["offset"], arrays["scale"])) if "offset" in arrays else format


def _of_pairs(held: mx.array, new: mx.array, pairs: Exchange, take_new: mx.array) -> mx.array:
    """Of each pair, the token's row where ``take_new``, else the slot's own ``(B, H_kv, m, row)``."""
    old = mx.take_along_axis(held, pairs.slots[..., None], axis=2)
    return mx.where(take_new[..., None], mx.take_along_axis(new, pairs.leaving[..., None], axis=2), old)


def _without_worst(tokens: Tokens, scores: mx.array, n: int) -> tuple[Tokens, mx.array]:
    """Without the ``n`` of lowest score and position; with the scores of the others."""
    if not n:
        return tokens, scores
    rest = mx.argsort(order_key(scores, tokens.positions), axis=-1)[..., n:]
    of = lambda x: mx.take_along_axis(x, rest if x.ndim == 3 else rest[..., None], axis=2)
    memory = None if tokens.memory is None else of(tokens.memory)
    return Tokens(of(tokens.keys), of(tokens.values), memory, of(tokens.positions)), of(scores)


def _longer(x: mx.array, extra: int) -> mx.array:
    """``x`` with ``extra`` zeros along the third axis."""
    return mx.concatenate([x, mx.zeros((*x.shape[:2], extra, *x.shape[3:]), x.dtype)], axis=2)
