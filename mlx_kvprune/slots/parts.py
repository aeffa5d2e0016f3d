"""What attention works on: keys and values where they lie, and how softmax statistics travel to them and back.

Two layouts. ``Part``: every head holds ``S`` slots. ``PagedPart``: pages of ``PAGE`` slots, each owned by one head; a page
is multiplied with its owner's queries, and only statistics (maxima, sums, outputs) are gathered by head. Keys and
values are never moved.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import mlx.core as mx

from mlx_kvprune.numerics import LOG2_E
from mlx_kvprune.quantize import Frame
from mlx_kvprune.rope import Turning
from mlx_kvprune.settings import PAGE
from mlx_kvprune.slots.format import Rows, plain

FEW_QUERIES = 64  # rows up to which the products of a page's rows are smaller than the page
MOST_PADDING = 2  # beyond it, heads differ so much that gathering the pages by head would be mostly padding


@dataclass(frozen=True)
class Ranks:
    """Keys are kept un-rotated: where each stands in the cache, and what rotates it there.

    Attributes:
        turn: rotates rows to positions.
        ranks: int32, of each slot, as the part lays slots out.
        shift: what is added to them.
    """

    turn: Turning
    ranks: mx.array
    shift: int = 0

    def turned(self, keys: mx.array) -> mx.array:
        """Keys ``(..., S, D)``, each at its place."""
        return self.turn(keys, self.ranks + self.shift)


@dataclass(frozen=True)
class Gate:
    """What learned gates add to the logits of a slot: ``bias + (t - i) * decay``, for a query at t and a slot's token i.

    Attributes:
        bias: ``log u``, float32, of each slot, as the part lays slots out; or None.
        decay: ``log beta``, likewise.
        positions: i, int32, likewise; only ``decay`` and sliding windows need it.
    """

    bias: mx.array | None = None
    decay: mx.array | None = None
    positions: mx.array | None = None


@dataclass(frozen=True)
class Sight:
    """How queries see slots beyond the plain product: all of it acts on logits that are not yet to the base of two.

    Attributes:
        newest: position of the newest query; only ``Gate.decay`` and ``window`` need it, and they need ``Gate.positions``.
        window: of a sliding window: a query sees the newest so many tokens, itself included; None for all.
        softcap: logits become ``softcap * tanh(logits / softcap)`` before gates are added; None for no cap.
    """

    newest: int | None = None
    window: int | None = None
    softcap: float | None = None

    def __post_init__(self) -> None:
        if self.softcap is not None and self.softcap <= 0:
            raise ValueError(f"[sight] a cap of logits must be above zero; got {self.softcap}; try 50.0, or None")

    def check(self, gate: Gate | None) -> None:
        """See that nothing of this would be ignored for want of positions."""
        if self.window is not None or (gate is not None and gate.decay is not None):
            assert gate is not None and gate.positions is not None, "windows and decays need the positions of slots"
            assert self.newest is not None, "windows and decays need the position of the newest query"

    def apply(self, logits: mx.array, gate: Gate | None, n_new: int = 1) -> mx.array:
        """Logits to the base of two ``(..., R, S)`` with all of this; per-slot arrays of ``gate`` are ``(..., S)``.

        Rows are query heads times ``n_new`` tokens, of which the last is the newest.
        """
        self.check(gate)
        if self.softcap is not None:
            cap = self.softcap * LOG2_E
            logits = cap * mx.tanh(logits / cap)
        if gate is None:
            return logits
        if gate.bias is not None:
            logits = logits + gate.bias[..., None, :] * LOG2_E
        if gate.positions is None or self.newest is None:
            return logits
        at = self.newest - (n_new - 1) + mx.arange(logits.shape[-2], dtype=mx.int32) % n_new
        age = at[:, None] - gate.positions[..., None, :]
        if gate.decay is not None:
            logits = logits + age * gate.decay[..., None, :] * LOG2_E
        return logits if self.window is None else mx.where(age < self.window, logits, -mx.inf)


EVERYTHING = Sight()


@dataclass(frozen=True)
class Part:
    """Slots of heads that hold equally many.

    Attributes:
        keys: rows with leading axes ``(B, H_kv)``.
        values: likewise.
        mask: ``(B, H_kv, 1, S)`` bool, False where a slot is empty; None if none is.
        ranks: of keys that are not rotated yet; arrays ``(B, H_kv, S)``.
        gate: of learned gates, arrays ``(B, H_kv, S)``.
    """

    keys: Rows
    values: Rows
    mask: mx.array | None = None
    ranks: Ranks | None = None
    gate: Gate | None = None

    def ready(self, dtype: mx.Dtype) -> Part:
        """The same with keys where they stand."""
        if self.ranks is None:
            return self
        return replace(self, keys=plain(self.ranks.turned(self.keys.decoded(dtype))), ranks=None)

    def logits(self, queries: mx.array, sight: Sight = EVERYTHING, n_new: int = 1) -> mx.array:
        """``(B, H_kv, R, D)`` -> ``(B, H_kv, R, S)`` float32."""
        logits = self.ready(queries.dtype).keys.scores(queries).astype(mx.float32)
        logits = sight.apply(logits, self.gate, n_new)
        return logits if self.mask is None else mx.where(self.mask, logits, -mx.inf)

    def peak(self, logits: mx.array) -> mx.array:
        """Largest logit ``(B, H_kv, R, 1)``."""
        return logits.max(axis=-1, keepdims=True)

    def spread(self, x: mx.array) -> mx.array:
        """A statistic ``(B, H_kv, R, 1)`` to where it can be subtracted from logits."""
        return x

    def total(self, weights: mx.array) -> mx.array:
        """Sum of the weights ``(B, H_kv, R, 1)``."""
        return weights.sum(axis=-1, keepdims=True)

    def mix(self, weights: mx.array) -> mx.array:
        """Weights times values ``(B, H_kv, R, D_v)``."""
        return self.values.mix(weights)

    def by_head(self, weights: mx.array) -> mx.array:
        """Weights ``(B, H_kv, R, S)``."""
        return weights

    def for_rows(self, rows: int, dtype: mx.Dtype) -> Part:
        """The part as it is cheapest for ``rows`` query rows."""
        return self


@dataclass(frozen=True)
class Layout:
    """Which head owns which page.

    Attributes:
        owner: ``(P,)`` uint32, the head ``b * H_kv + h`` of each page.
        table: ``(B * H_kv, most pages of a head)`` int32, the pages of each head; ``P`` where it has no more.
        back: ``(P,)`` int32, where a page stands in the flattened table.
        hot: ``(B * H_kv, P)`` float32, one where the head owns the page.
        batch: ``B``.
        counts: pages of each head, on the host.
    """

    owner: mx.array
    table: mx.array
    back: mx.array
    hot: mx.array
    batch: int
    counts: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in (self.owner, self.table, self.back, self.hot))

    def gather(self, x: mx.array, fill: float) -> mx.array:
        """Per page ``(P, ...)`` -> per head ``(B * H_kv, most pages, ...)``, ``fill`` where there is no page."""
        none = mx.full((1, *x.shape[1:]), fill, x.dtype)
        return mx.concatenate([x, none])[self.table]

    def heads(self, x: mx.array) -> mx.array:
        """``(B * H_kv, ...)`` -> ``(B, H_kv, ...)``."""
        return x.reshape(self.batch, x.shape[0] // self.batch, *x.shape[1:])


@dataclass(frozen=True)
class PagedPart:
    """Pages of heads that hold differently many slots; the same functions as ``Part``, weights are ``(P, R, PAGE)``.

    Attributes:
        keys: rows with leading axis ``(P,)``.
        values: likewise.
        layout: who owns what.
        mask: ``(P, 1, PAGE)`` bool, False where a slot is empty; None if none is.
        ranks: of keys that are not rotated yet; arrays ``(P, PAGE)``.
        gate: of learned gates, arrays ``(P, PAGE)``.
        frame: of the keys, of each head ``(B, H_kv, 1, D)``; that in ``keys`` is gathered by page when operations want it.
    """

    keys: Rows
    values: Rows
    layout: Layout
    mask: mx.array | None = None
    ranks: Ranks | None = None
    gate: Gate | None = None
    frame: Frame | None = None

    def ready(self, dtype: mx.Dtype) -> PagedPart:
        if self.ranks is None:
            return self
        return replace(self, keys=plain(self.ranks.turned(self.keys.decoded(dtype))), ranks=None)

    def logits(self, queries: mx.array, sight: Sight = EVERYTHING, n_new: int = 1) -> mx.array:
        flat = queries.reshape(-1, *queries.shape[2:])
        logits = self.ready(queries.dtype)._scores(flat).astype(mx.float32)
        logits = sight.apply(logits, self.gate, n_new)
        return logits if self.mask is None else mx.where(self.mask, logits, -mx.inf)

    def peak(self, logits: mx.array) -> mx.array:
        per_head = self.layout.gather(logits.max(axis=-1), -mx.inf).max(axis=1)
        return self.layout.heads(per_head)[..., None]

    def spread(self, x: mx.array) -> mx.array:
        return x.reshape(-1, *x.shape[2:])[self.layout.owner]

    def total(self, weights: mx.array) -> mx.array:
        return self.layout.heads(self.layout.hot @ weights.sum(axis=-1))[..., None]

    def mix(self, weights: mx.array) -> mx.array:
        products = self.values.mix(weights).astype(mx.float32)  # (P, R, D_v)
        summed = self.layout.hot @ products.reshape(products.shape[0], -1)
        return self.layout.heads(summed.reshape(-1, *products.shape[1:]))

    def by_head(self, weights: mx.array) -> mx.array:
        gathered = self.layout.gather(weights, 0.0)  # (B * H_kv, pages, R, PAGE)
        gathered = gathered.swapaxes(1, 2)
        return self.layout.heads(gathered.reshape(*gathered.shape[:2], -1))

    def for_rows(self, rows: int, dtype: mx.Dtype) -> Part | PagedPart:
        """The part as it is cheapest for ``rows`` query rows: many of them want the slots of each head side by side.

        Page by page, ``mix`` makes products of ``(P, R, D_v)``: for a block of prefill many times the pool.
        """
        if not self.gathers(rows):
            return self
        pages, width = self.layout.owner.shape[0], self.layout.table.shape[1]
        gather = lambda x, fill: self.layout.heads(self.layout.gather(x, fill).reshape(-1, width * PAGE, *x.shape[2:]))
        used = mx.ones((pages, PAGE), mx.bool_) if self.mask is None else self.mask[:, 0]
        keys, values = (plain(gather(x.decoded(dtype), 0.0)) for x in (self.ready(dtype).keys, self.values))
        by_head = lambda x: None if x is None else gather(x, 0)
        gate = self.gate and Gate(*(by_head(x) for x in (self.gate.bias, self.gate.decay, self.gate.positions)))
        return Part(keys, values, gather(used, False)[:, :, None], gate=gate)

    def gathers(self, rows: int) -> bool:
        """Whether ``for_rows`` puts the slots of each head side by side."""
        return rows > FEW_QUERIES and self.layout.table.size <= MOST_PADDING * self.layout.owner.shape[0]

    def _scores(self, queries: mx.array) -> mx.array:
        """``(B * H_kv, R, D)`` -> ``(P, R, PAGE)``."""
        exact = self.keys.codec.bits is None and queries.dtype == mx.float32  # on the CPU ``gather_mm`` takes no other
        if queries.shape[1] <= FEW_QUERIES or not exact:
            return self.keys.scores(queries[self.layout.owner])
        pages = mx.arange(self.layout.owner.shape[0], dtype=mx.uint32)
        return mx.gather_mm(queries, self.keys.parts[0].swapaxes(-1, -2), self.layout.owner, pages)
