"""The cold pool for heads that hold differently much: pages that go to the head that needs one."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import mlx.core as mx
import numpy as np

from mlx_kvprune.numerics import device
from mlx_kvprune.quantize import PAGE
from mlx_kvprune.slots import moves
from mlx_kvprune.slots.choose import NOTHING, grouped, order_key
from mlx_kvprune.slots.format import Format, RowDict, Rows
from mlx_kvprune.slots.moves import NOBODY, Moves
from mlx_kvprune.slots.parts import Layout, PagedPart
from mlx_kvprune.slots.pool import with_frame
from mlx_kvprune.slots.ring import Tokens


@dataclass(frozen=True)
class Candidates:
    """What competes for a pool's pages, on the host, in units of what is written together.

    Attributes:
        slots: order keys ``(P, units)`` int64.
        live: which of them hold something ``(P, units)`` bool.
        new: order keys of the tokens that come ``(heads, n)`` int64.
        owner: head of each page ``(P,)``.
        sifted: whether what scores minus infinity is dropped, whatever room there is.
    """

    slots: np.ndarray
    live: np.ndarray
    new: np.ndarray
    owner: np.ndarray
    sifted: bool = False

    @cached_property
    def passing(self) -> tuple[np.ndarray, np.ndarray]:
        """Which slots ``(P, units)`` and which of the tokens that come ``(heads, n)`` may be kept at all."""
        if not self.sifted:
            return self.live, np.ones(self.new.shape, bool)
        return self.live & (self.slots >> 32 > NOTHING), self.new >> 32 > NOTHING

    @cached_property
    def ranked(self) -> list[np.ndarray]:
        """Order keys of everything that each head could keep, best first."""
        slots, new = self.passing
        of_head = lambda mine, head: np.concatenate([self.slots[mine][slots[mine]], self.new[head][new[head]]])
        return [np.sort(of_head(self.owner == head, head))[::-1] for head in range(len(self.new))]


@dataclass(frozen=True)
class PageWrites:
    """Moves, and the rows that they write, by the name of the pool's array; ``lost``: whether a token is lost by them."""

    moves: Moves
    positions: np.ndarray
    at: mx.array
    rows: RowDict
    contested: bool = False
    lost: bool = False

    def arrays(self) -> list[mx.array]:
        """What must be evaluated before the pool is written in place."""
        return [self.at, *self.rows.values()]


class PagedPool:
    """Slots of one layer in pages of ``PAGE``, each owned by one KV head of one sequence.

    Pages are allocated up to ``limit`` while the text is short. After that they only change hands: a page goes to the
    head that needs one, and what its old owner still keeps in it moves into slots that the owner frees elsewhere.

    Args:
        limit: the most pages, while nobody says otherwise.
        like: tokens of the kind that will be held.
        format: how they are stored.
        sifted: whether tokens that score minus infinity are dropped, whatever room there is: heads compete from the
            first token on, and the pool grows with what passes.

    Attributes:
        owner: head ``b * H_kv + h`` of each page in use ``(P,)``.
        positions: ``(P, PAGE)`` int32; negative where a slot is empty.
        rows: packed keys and values ``(capacity * units, row)``, ``units = PAGE / granule``.
        memory: what the scorer remembers ``(capacity, PAGE)`` float32, or None.
        contested: whether heads have competed for pages yet.
        layout: the same as ``owner``, for attention.
    """

    ragged = True
    holes = 0

    def __init__(self, limit: int, like: Tokens, format: Format, sifted: bool = False):
        self.limit, self.format, self.sifted, self.contested = limit, format, sifted, sifted
        self.batch, self.heads = like.keys.shape[0], like.keys.shape[0] * like.keys.shape[1]
        self.owner = np.zeros(0, np.int32)
        self.positions = np.zeros((0, PAGE), np.int32)
        self.rows: RowDict = format.no_rows(like.keys[0, 0], like.values[0, 0])
        self.memory = None if like.memory is None else mx.zeros((0, PAGE))
        self._lay_out()

    # -- how much --------------------------------------------------------------------------------------------------

    @property
    def kv_heads(self) -> int:
        """KV heads of one sequence."""
        return self.heads // self.batch

    @property
    def units(self) -> int:
        """What a page holds, counted in what is written together."""
        return PAGE // self.format.granule

    @property
    def used(self) -> int:
        """Pages in use."""
        return len(self.owner)

    @property
    def capacity(self) -> int:
        """Pages allocated."""
        return next(iter(self.rows.values())).shape[0] // self.units

    @property
    def count(self) -> int:
        """Slots of the head that holds most."""
        return int(self.live_counts().max())

    @property
    def held(self) -> int:
        """Slots in use over all heads."""
        return int(self._counts.sum())

    @property
    def free(self) -> int:
        """Slots that every KV head may still fill without evicting."""
        if self.contested:  # whatever is free from now on is given out by scores
            return 0
        empty = np.bincount(self.owner, (~self._live()).sum(axis=1), self.heads)
        most = int(empty.min()) * self.format.granule
        return (self.limit - self.used) // self.heads * PAGE + most

    @property
    def nbytes(self) -> int:
        arrays = (*self.rows.values(), self.positions, self.owner, self.memory, self.layout, self.mask)
        return sum(x.nbytes for x in arrays if x is not None) + self.format.frame_nbytes

    def live_counts(self) -> np.ndarray:
        """Slots in use of each head ``(B * H_kv,)``."""
        return self._counts

    # -- what is held, as a scorer sees it -----------------------------------------------------------------------

    def heads_positions(self) -> mx.array:
        """``(B, H_kv, S)`` int32, negative where a slot is empty or a head has no more pages."""
        return self._by_head(device(self.positions), -1)

    def heads_memory(self) -> mx.array | None:
        """``(B, H_kv, S)``."""
        return None if self.memory is None else self._by_head(self.memory[: self.used], 0.0)

    def heads_rows(self, name: str) -> mx.array:
        """Decoded ``keys`` or ``values`` ``(B, H_kv, S, D)``."""
        rows = self._rows_of(name)
        if not self.used:
            return mx.zeros((self.batch, self.kv_heads, 0, rows.codec.width), self.format.dtype)
        return self._by_head(rows.decoded(self.format.dtype), 0.0)

    def laid_out(self, x: mx.array) -> mx.array:
        """Something of each slot ``(B, H_kv, S)``, as ``part`` has it: ``(P, PAGE)``."""
        return x.reshape(self.layout.table.size, PAGE)[self.layout.back]

    def set_memory(self, memory: mx.array) -> None:
        """Set what is remembered ``(B, H_kv, S)``."""
        assert self.memory is not None
        used = self.laid_out(memory)
        unused = self.memory[self.used :]
        self.memory = mx.concatenate([used, unused]) if unused.shape[0] else used

    def part(self) -> PagedPart:
        """What attention works on."""
        return PagedPart(
            self._rows_of("keys"), self._rows_of("values"), self.layout, self.mask, frame=self.format.frame
        )

    # -- changes -----------------------------------------------------------------------------------------------------

    def fill(self, tokens: Tokens) -> None:
        """Put tokens into empty slots; all of them must fit."""
        n, live = tokens.n // self.format.granule, self._live()
        need = np.bincount(self.owner, live.sum(axis=1), self.heads).astype(int) + n
        targets = np.maximum(-(-need // self.units), np.bincount(self.owner, minlength=self.heads))
        change = moves.plan(self.owner, live, np.ones((self.heads, n), bool), targets)
        self._reserve(len(change.owner), min(self.limit, 2 * self.capacity))
        self.write(self._rows(tokens, change))

    def candidates(self, tokens: Tokens, slot_scores: mx.array, scores: mx.array) -> Candidates:
        """What competes, from retention scores of what is held ``(B, H_kv, S)`` and of tokens ``(B, H_kv, n)``.

        One host synchronisation.
        """
        granule, positions = self.format.granule, self.heads_positions()
        slot_scores = mx.where(positions < 0, -mx.inf, slot_scores)
        by_page = (self.layout.table.size, self.units)
        slots = order_key(*grouped(slot_scores, positions, granule)).reshape(by_page)[self.layout.back]
        new = order_key(*grouped(scores, tokens.positions, granule)).reshape(self.heads, -1)
        return Candidates(np.array(slots), self._live(), np.array(new), self.owner, self.sifted)

    def choose(self, tokens: Tokens, candidates: Candidates, targets: np.ndarray) -> PageWrites:
        """What is to be written so that each head keeps its best in ``targets`` pages ``(B * H_kv,)``.

        Nothing is written yet.
        """
        rooms = [int(target) * self.units for target in targets]
        worst = np.array([moves.worst_kept(x, room) for x, room in zip(candidates.ranked, rooms, strict=True)])
        may_stay, may_come = candidates.passing
        kept = may_stay & (candidates.slots >= worst[self.owner, None])
        new = may_come & (candidates.new >= worst[:, None])
        lost = bool((candidates.live & ~kept).any() or not new.all())
        return replace(self._rows(tokens, moves.plan(self.owner, kept, new, targets)), contested=True, lost=lost)

    def write(self, writes: PageWrites) -> None:
        """Write what was chosen: in place where ``writes`` is evaluated and nobody else reads the pool."""
        self._reserve(len(writes.moves.owner))
        self.contested = self.contested or writes.contested
        if writes.at.size:
            for name, rows in writes.rows.items():
                self._put(name, writes.at, rows)
        self.owner, self.positions = writes.moves.owner, writes.positions
        if (self.owner == NOBODY).any() or (self.contested and self.capacity > self.used):
            self._close_ranks()
        self._lay_out()

    def truncate(self, n: int) -> None:
        """Empty the newest ``n`` slots of every head, the same for all; nothing was overwritten yet."""
        newest = np.sort(self.positions[self.positions >= 0])[::-1]
        self.vacate(int(newest[n * self.heads - 1]), int(newest[0]) + 1)

    def vacate(self, start: int, stop: int, shift: int = 0) -> None:
        """Empty the slots of the positions ``start .. stop - 1``; later positions move back by ``shift``."""
        gone = (self.positions >= start) & (self.positions < stop)
        later = np.where(self.positions >= stop, self.positions - shift, self.positions)
        self.positions = np.where(gone, -1, later).astype(np.int32)
        if self.memory is not None and gone.any():
            unused = ((0, self.capacity - self.used), (0, 0))
            self.memory = mx.where(device(np.pad(gone, unused)), 0.0, self.memory)
        self.owner = np.where((self.positions >= 0).any(axis=1), self.owner, NOBODY).astype(np.int32)
        if (self.owner == NOBODY).any():
            self._close_ranks()  # of pages that hold nothing any more
        self._lay_out()

    def count_holes(self) -> None:
        """Nothing: each page knows its empty slots."""

    def replace_keys(self, keys: mx.array) -> None:
        """Set the keys of everything held ``(B, H_kv, S, D)``; only where they are stored as they are."""
        assert self.format.keys.bits is None
        pages = keys.reshape(self.layout.table.size, PAGE, keys.shape[-1])[self.layout.back].reshape(-1, keys.shape[-1])
        self.rows["keys.0"] = mx.concatenate([pages, self.rows["keys.0"][self.used * self.units :]])

    # -- state -------------------------------------------------------------------------------------------------------

    def arrays(self) -> dict[str, mx.array]:
        """All arrays, by name."""
        named = {**self.rows, "positions": device(self.positions), "owner": device(self.owner)}
        if self.memory is not None:
            named["memory"] = self.memory
        frame = self.format.frame
        return named if frame is None else {**named, "offset": frame.offset, "scale": frame.scale}

    def numbers(self) -> dict[str, int]:
        """What else ``restore`` needs."""
        return {"limit": self.limit, "contested": self.contested}

    def restore(self, arrays: dict[str, mx.array], numbers: dict[str, int]) -> None:
        """Take over another pool's ``arrays`` and ``numbers``."""
        self.format, self.limit = with_frame(self.format, arrays), numbers["limit"]
        self.contested = bool(numbers["contested"])
        self.positions, self.owner = np.array(arrays["positions"]), np.array(arrays["owner"])
        self.memory = arrays.get("memory")
        self.rows = {name: arrays[name] for name in self.rows}
        self._lay_out()

    # -- inside ------------------------------------------------------------------------------------------------------

    def _rows_of(self, name: str) -> Rows:
        """Keys or values of the pages in use, rows with leading axis ``(P,)``."""
        stop = self.used * self.units
        used = {n: x[:stop].reshape(self.used, self.units, x.shape[-1]) for n, x in self.rows.items()}
        return self.format.rows_of(used, name, self.layout.owner)

    def _live(self) -> np.ndarray:
        """Units that hold something ``(P, units)`` bool."""
        units = (self.positions >= 0).reshape(self.used, self.units, self.format.granule)
        return np.logical_or.reduce(units, axis=-1)

    def _by_head(self, x: mx.array, fill: float) -> mx.array:
        """``(P, PAGE, ...)`` -> ``(B, H_kv, S, ...)``."""
        slots = self.layout.table.shape[1] * PAGE
        return self.layout.heads(self.layout.gather(x, fill).reshape(self.heads, slots, *x.shape[2:]))

    def _rows(self, tokens: Tokens, change: Moves) -> PageWrites:
        """The rows that the moves write: new ones and ones that change their page."""
        granule, at = self.format.granule, np.concatenate([change.new, change.old])
        positions = np.full((len(change.owner), PAGE), -1, np.int32)
        held = np.repeat(change.kept, granule, axis=1)
        positions[: self.used][held[: self.used]] = self.positions[held[: self.used]]
        flat, new = positions.reshape(-1, granule), np.array(tokens.positions).reshape(-1, granule)
        flat[change.new] = new[change.new_from]
        flat[change.old] = self.positions.reshape(-1, granule)[change.old_from]
        encoded = self.format.encode(tokens.keys, tokens.values)
        if self.memory is not None and tokens.memory is not None:
            encoded["memory"] = tokens.memory.reshape(*tokens.memory.shape[:2], -1, granule)
        rows = {}
        for name, x in encoded.items():
            rows[name] = x.reshape(-1, x.shape[-1])[device(change.new_from)]
            if len(change.old):
                rows[name] = mx.concatenate([rows[name], self._flat(name)[device(change.old_from)]])
        return PageWrites(change, positions, device(at), rows)

    def _flat(self, name: str) -> mx.array:
        """An array in units ``(capacity * units, row)``."""
        if name != "memory":
            return self.rows[name]
        assert self.memory is not None
        return self.memory.reshape(-1, self.format.granule)

    def _put(self, name: str, at: mx.array, rows: mx.array) -> None:
        """Write units in place."""
        x = self._flat(name)
        if name == "memory":
            self.memory = None
            x[at] = rows
            self.memory = x.reshape(-1, PAGE)
        else:
            x[at] = rows
            self.rows[name] = x

    def _reserve(self, pages: int, ahead: int = 0) -> None:
        """Allocate what is needed; while the pool fills up, ``ahead`` of it."""
        if pages <= self.capacity:
            return
        extra = max(pages, ahead) - self.capacity
        for name, x in self.rows.items():
            more = mx.zeros((extra * self.units, x.shape[-1]), x.dtype)
            self.rows[name] = mx.concatenate([x, more])
        if self.memory is not None:
            self.memory = mx.concatenate([self.memory, mx.zeros((extra, PAGE))])

    def _close_ranks(self) -> None:
        """Give back the pages that nobody needs (they went to another layer)."""
        pages = np.flatnonzero(self.owner != NOBODY)
        units = mx.array((pages[:, None] * self.units + np.arange(self.units)).reshape(-1))
        self.rows = {name: x[units] for name, x in self.rows.items()}
        self.memory = None if self.memory is None else self.memory[device(pages)]
        self.owner, self.positions = self.owner[pages], self.positions[pages]

    def _lay_out(self) -> None:
        """What attention needs to know of ``owner`` and ``positions``."""
        lists = [np.flatnonzero(self.owner == head) for head in range(self.heads)]
        table = np.full((self.heads, max(len(x) for x in lists)), self.used, np.int32)
        back = np.zeros(self.used, np.int32)
        for head, pages in enumerate(lists):
            table[head, : len(pages)] = pages
            back[pages] = head * table.shape[1] + np.arange(len(pages))
        hot = self.owner[None] == np.arange(self.heads)[:, None]
        owner, hot = self.owner.astype(np.uint32), hot.astype(np.float32)
        counts = tuple(len(x) for x in lists)
        self.layout = Layout(device(owner), device(table), device(back), device(hot), self.batch, counts)
        held = self.positions >= 0
        self._counts = np.bincount(self.owner, held.sum(axis=1), self.heads).astype(int)
        self.mask = None if held.all() else device(held[:, None])
