"""``BatchPrunedKVCache``: one layer's bounded caches of several requests, in mlx-lm's contract for batches.

The model computes projections and feed-forward layers for the whole batch; attention runs row by row, each row through
its own cache. So a request gives what it gives alone, rows may be at any phase of their upkeep, a budget in bytes is each
sequence's own, and nothing of one request can reach another.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import mlx.core as mx

from mlx_kvprune.attend import Mask, among_new


class Single(Protocol):
    """What a batch needs of a cache of one sequence (a ``PrunedKVCache``)."""

    offset: int
    fetched: tuple[Any, Any] | None
    staged: mx.array | None

    @property
    def state(self) -> tuple[Any, ...]: ...
    @property
    def nbytes(self) -> int: ...
    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[Any, Any]: ...
    def attend(self, queries: mx.array, handle: Any, scale: float, mask: Mask, sinks: mx.array | None) -> mx.array: ...
    def size(self) -> int: ...
    def empty(self) -> bool: ...
    def is_trimmable(self) -> bool: ...
    def trim(self, n: int) -> int: ...


@dataclass(eq=False)
class Row:
    """One request: its cache, and which of the columns to come are its own tokens.

    Attributes:
        skip: columns of padding before its next token.
        ahead: its tokens that are still to come before padding; None if every column is its own.
        own: its columns of the last call.
    """

    cache: Single
    skip: int = 0
    ahead: int | None = None
    own: slice = field(default_factory=lambda: slice(0, 0))

    def take(self, keys: mx.array, values: mx.array, gates: mx.array | None) -> None:
        """Hand its own among the new tokens ``(1, H_kv, L, D)``, and what their gates said, to the cache."""
        width = keys.shape[2]
        start = min(self.skip, width)
        stop = width if self.ahead is None else min(width, start + self.ahead)
        self.skip, self.own, self.cache.fetched = self.skip - start, slice(start, stop), None
        if self.ahead is not None:
            self.ahead -= stop - start
        if start < stop:
            self.cache.staged = None if gates is None else gates[:, :, self.own]
            self.cache.update_and_fetch(keys[:, :, self.own], values[:, :, self.own])

    def part(self) -> tuple[slice, Any]:
        """Its columns of the last call, and the handle that its cache gave for them (None if there were none)."""
        return self.own, self.cache.fetched and self.cache.fetched[0]


@dataclass(eq=False)
class BatchHandle:
    """What ``update_and_fetch`` of a batch returns in the place of keys: the handles of the rows.

    Attributes:
        parts: per row its own columns, and the handle of its cache; None if the call brought it padding only.
        shape: what an unpruned array of keys would have: ``(B, H_kv, tokens seen by the longest, D)``.
        dtype: the keys' type.
        width: of the values, ``D_v``.
    """

    cache: BatchPrunedKVCache
    parts: list[tuple[slice, Any]]
    shape: tuple[int, ...]
    dtype: mx.Dtype
    width: int

    @property
    def ndim(self) -> int:
        return 4


class BatchPrunedKVCache:
    """Caches of one sequence each, one per request.

    Args:
        caches: are taken over, not copied.
    """

    def __init__(self, caches: Iterable[Single]):
        self.rows = [Row(cache) for cache in caches]
        self.staged: mx.array | None = None

    @property
    def caches(self) -> list[Any]:
        """The rows' caches, under the name by which the parts of mlx-lm's ``CacheList`` are found."""
        return [row.cache for row in self.rows]

    # -- rows come and go --------------------------------------------------------------------------------------------

    @classmethod
    def merge(cls, caches: Sequence[Any]) -> BatchPrunedKVCache:
        """A batch of copies of ``caches``, which may have read texts of any length.

        Raises:
            ValueError: one of them cannot be batched.
        """
        for cache in caches:
            if type(cache) is not type(caches[0]) or not hasattr(cache, "merge"):
                raise ValueError(
                    f"[batch] these caches cannot be batched; got {_described(cache)} beside {_described(caches[0])}; "
                    "try one request at a time"
                )
        return cls(copy.deepcopy(cache) for cache in caches)

    def extend(self, other: BatchPrunedKVCache) -> None:
        """Take over the rows of another batch, after its own."""
        self.rows += other.rows

    def filter(self, keep: Sequence[int] | mx.array) -> None:
        """Keep the rows of these indices, in this order."""
        indices: Any = keep.tolist() if isinstance(keep, mx.array) else keep
        self.rows = [self.rows[i] for i in indices]

    def extract(self, idx: int) -> Any:
        """A copy of one row's cache; it is evaluated, lest its lazy graph keep the batch alive."""
        cache = copy.deepcopy(self.rows[idx].cache)
        mx.async_eval(cache.state)
        return cache

    # -- a padded prompt ---------------------------------------------------------------------------------------------

    def prepare(
        self,
        *,
        left_padding: Sequence[int] | None = None,
        lengths: Sequence[int] | None = None,
        right_padding: Sequence[int] | None = None,
    ) -> None:
        """Announce a prompt of one width, which may come in several calls.

        Args:
            left_padding: columns before each row's own tokens.
            lengths: each row's own tokens; what comes after them, until ``finalize``, is padding.
            right_padding: columns after them, which the width says as well.
        """
        for row, skip in zip(self.rows, left_padding or (), strict=bool(left_padding)):
            row.skip = skip
        for row, ahead in zip(self.rows, lengths or (), strict=bool(lengths)):
            row.ahead = ahead

    def finalize(self) -> None:
        """The padded prompt is over."""
        for row in self.rows:
            assert not row.skip and not row.ahead, "tokens were announced that did not come"
            row.ahead = None

    # -- the forward pass --------------------------------------------------------------------------------------------

    @property
    def offset(self) -> mx.array:
        """Position of each row's next column ``(B,)``: what the model's rotary embedding reads."""
        return mx.array([row.cache.offset - row.skip for row in self.rows])

    def stage(self, x: mx.array) -> None:
        """Take the attention's input ``(B, L, width)``: one gate, that of the first row's cache, reads it for all."""
        first: Any = self.rows[0].cache
        first.stage(x)
        self.staged, first.staged = first.staged, None

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[BatchHandle, BatchHandle]:
        """Take the keys and values ``(B, H_kv, L, D)`` of new columns; return what finds them again in the attention."""
        assert keys.shape[0] == len(self.rows), "a row per request"
        gates, self.staged = self.staged, None
        for i, row in enumerate(self.rows):
            row.take(keys[i : i + 1], values[i : i + 1], None if gates is None else gates[i : i + 1])
        return self.keys_and_values()

    def keys_and_values(self) -> tuple[BatchHandle, BatchHandle]:
        """What this forward pass's ``update_and_fetch`` returned: for layers that share an earlier layer's keys."""
        parts = [row.part() for row in self.rows]
        some = next(handle for _, handle in parts if handle is not None)
        longest = max(row.cache.offset for row in self.rows)
        shape = (len(parts), some.shape[1], longest, some.shape[3])
        handle = BatchHandle(self, parts, shape, some.dtype, some.values.shape[-1])
        return handle, handle

    def attend(
        self, queries: mx.array, handle: BatchHandle, scale: float, mask: Mask = None, sinks: mx.array | None = None
    ) -> mx.array:
        """Attention of the queries ``(B, H_q, L, D)``, each row's through its own cache; padding gets zeros.

        Args:
            mask: as in ``mlx_kvprune.attend``, or with a leading axis ``B``.

        Returns:
            ``(B, H_q, L, D_v)``.
        """
        _, n_heads, total, _ = queries.shape
        outs = []
        for i, (own, part) in enumerate(handle.parts):
            if part is None:
                outs.append(mx.zeros((1, n_heads, total, handle.width), queries.dtype))
                continue
            new = queries[i : i + 1, :, own]
            out = self.rows[i].cache.attend(new, part, scale, among_new(_of_row(mask, i), own, total), sinks)
            outs.append(_padded(out, own, total))
        return mx.concatenate(outs, axis=0)

    def make_mask(self, N: int, return_array: bool = False, window_size: int | None = None) -> Mask:
        """The mask of ``N`` new columns among themselves: all that a row holds is older, and visible."""
        if window_size is not None:
            raise NotImplementedError("a sliding window over a plain KV cache")
        if N == 1:
            return None
        if not return_array:
            return "causal"
        from mlx_lm.models.base import create_causal_mask

        return create_causal_mask(N)

    # -- what mlx-lm asks --------------------------------------------------------------------------------------------

    @property
    def state(self) -> list[tuple[Any, ...]]:
        """The rows' states, for ``mx.eval``."""
        return [cache.state for cache in self.caches]

    @property
    def nbytes(self) -> int:
        """Bytes of all rows."""
        return sum(cache.nbytes for cache in self.caches)

    def size(self) -> int:
        """Slots per KV head of the row that holds most."""
        return max((cache.size() for cache in self.caches), default=0)

    def empty(self) -> bool:
        return all(cache.empty() for cache in self.caches)

    def is_trimmable(self) -> bool:
        return all(cache.is_trimmable() for cache in self.caches)

    def trim(self, n: int) -> int:
        """Forget the newest ``n`` tokens of every row; returns how many the longest forgot."""
        return max((cache.trim(n) for cache in self.caches), default=0)


def _of_row(mask: Mask, i: int) -> Mask:
    """A row's part of a mask ``(B, 1 or H_q, L, S)``; any other serves all rows."""
    return mask[i : i + 1] if isinstance(mask, mx.array) and mask.ndim == 4 and mask.shape[0] > 1 else mask


def _padded(out: mx.array, own: slice, total: int) -> mx.array:
    """A row's outputs ``(1, H_q, l, D_v)`` at its own among ``total`` columns, zeros in the others."""
    after = total - own.stop
    return mx.pad(out, [(0, 0), (0, 0), (own.start, after), (0, 0)]) if own.start or after else out


def _described(cache: Any) -> str:
    settings = getattr(cache, "settings", None)
    return f"policy {settings.policy!r}" if settings else type(cache).__name__
