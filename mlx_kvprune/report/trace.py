"""Follow a list of caches while a text is read: when each token was evicted, how much was held, and the scores."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_kvprune.allocators import floor_pages
from mlx_kvprune.cache import PrunedKVCache
from mlx_kvprune.forward import leaves, pages_of_all, pruned
from mlx_kvprune.report import CacheReport, report
from mlx_kvprune.settings import CacheSettings, layers_text
from mlx_kvprune.slots import PagedPool

UNRANKED = 255  # a token that never competed: a sink, or one that is still in the ring
LONGEST_CALL = 512  # tokens of one forward call at most, while nothing is evicted yet

Progress = Callable[[int, int], None]  # (tokens read, tokens in all)


@dataclass(frozen=True)
class Trace:
    """What became of each token of a text in one list of bounded caches.

    A *row* is one KV head of one layer; all layers' heads stand in ``rows``, in order. A *step* is one forward call.

    Attributes:
        settings: of the caches.
        rows: layer and head of each row ``(R, 2)`` uint16; layers count all of the model's, also those left alone.
        caps: the most slots of each row ``(R,)`` uint32, on average where heads differ; 0 for no bound.
        starts: tokens that were read before each step ``(steps,)`` uint32.
        n_tokens: length of the text.
        gone: the step before whose first token each token was evicted ``(R, T)`` uint16 or uint32; ``len(starts)`` where
            it is held to the end. In steps that evict several times it is the step in which it was evicted.
        held: slots held after each step ``(steps, R)`` uint32.
        nbytes: bytes held after each step, everything counted ``(steps,)`` int64.
        nbytes_full: what an unpruned cache would hold then ``(steps,)`` int64.
        scores: retention score of each token when it last competed for a slot ``(R, T)`` float32; NaN if it never did.
        ranks: share of those that competed then which scored lower, in 254ths ``(R, T)`` uint8; ``UNRANKED`` likewise.
        report: of the caches at the end.
        gates: what the gates said of each token, as the scorer remembers it (``log beta`` for ``retention``) ``(R, T)``
            float32; NaN in local layers. None where the policy has no gates.
        at_floor: which rows hold their floor alone at the end ``(R,)`` bool: where heads compete, they win nothing more.
    """

    settings: CacheSettings
    rows: np.ndarray
    caps: np.ndarray
    starts: np.ndarray
    n_tokens: int
    gone: np.ndarray
    held: np.ndarray
    nbytes: np.ndarray
    nbytes_full: np.ndarray
    scores: np.ndarray
    ranks: np.ndarray
    report: CacheReport
    gates: np.ndarray | None = None
    at_floor: np.ndarray | None = None

    @property
    def could_be_local(self) -> str:
        """Bounded layers whose every head holds its floor alone, as ``local_layers`` has them; never all of them."""
        if self.at_floor is None:
            return ""
        layers = np.unique(self.rows[:, 0])
        found = [i for i, layer in enumerate(layers) if self.at_floor[self.rows[:, 0] == layer].all()]
        return layers_text(found) if len(found) < len(layers) else ""

    @property
    def ends(self) -> np.ndarray:
        """Tokens that had been read when each token was evicted ``(R, T)`` int64; the text's length where it is held."""
        return np.append(self.starts.astype(np.int64), self.n_tokens)[self.gone]

    def is_held(self) -> np.ndarray:
        """Which tokens each row holds at the end ``(R, T)`` bool."""
        return self.gone == len(self.starts)


@dataclass
class Recorder:
    """Notes after each forward call what the caches hold; it reads them, and changes nothing.

    Use it as ``with recorder.listening():`` around the calls, and call ``note`` after each of them.

    Args:
        caches: the model's list of caches, bounded, of one sequence, empty.
        n_tokens: length of the text that will be read.
    """

    caches: list[Any]
    n_tokens: int
    starts: list[int] = field(default_factory=list)
    _held: list[np.ndarray] = field(default_factory=list)
    _nbytes: list[tuple[int, int]] = field(default_factory=list)
    _layers: dict[int, _Layer] = field(default_factory=dict)
    _seen: int = 0

    def __post_init__(self) -> None:
        self.bounded = pruned(self.caches)
        if not self.bounded:
            raise ValueError("[trace] no bounded cache; got mlx-lm's own; try another policy than full")
        if any(cache.tokens_seen for cache in self.bounded):
            raise ValueError(
                f"[trace] follows a text from its first token; got caches that have seen {self.bounded[0].tokens_seen}; "
                "try fresh ones"
            )

    @contextmanager
    def listening(self) -> Iterator[Recorder]:
        """Overhear the scores whenever slots are chosen, until the end of the ``with`` statement."""
        heard = [_overhear(cache, self._hear(i)) for i, cache in enumerate(self.bounded) if not cache.local]
        heard += [_overhear_gate(cache, self._gated(i)) for i, cache in enumerate(self.bounded) if cache.needs_gate]
        try:
            yield self
        finally:
            for stop in heard:
                stop()

    def note(self) -> None:
        """Look at what is held now; call it after each forward call."""
        seen = self.bounded[0].tokens_seen
        if seen > self.n_tokens:
            raise ValueError(f"[trace] more tokens than were announced; got {seen}; try n_tokens={seen}")
        mx.eval([c.state for c in leaves(self.caches)])
        step = len(self.starts)
        counts = [layer.note(self._seen, seen, step) for layer in self._tables()]
        self.starts.append(self._seen)
        self._held.append(np.concatenate(counts).astype(np.uint32))
        self._nbytes.append((sum(c.nbytes for c in self.bounded), sum(c.nbytes_full for c in self.bounded)))
        self._seen = seen

    def trace(self) -> Trace:
        """Everything that was noted."""
        layers, steps = self._tables(), len(self.starts)
        join = lambda name: np.concatenate([getattr(layer, name) for layer in layers])[:, : self._seen]
        gone, dtype = join("gone"), np.uint16 if steps < 2**16 else np.uint32
        places = _places(self.caches)
        rows = [(places[i], head) for i, layer in enumerate(layers) for head in range(layer.heads)]
        caps = [cache.slots or 0 for cache, layer in zip(self.bounded, layers, strict=True) for _ in range(layer.heads)]
        nbytes = np.array(self._nbytes, np.int64)
        return Trace(
            settings=self.bounded[0].settings,
            rows=np.array(rows, np.uint16),
            caps=np.array(caps, np.uint32),
            starts=np.array(self.starts, np.uint32),
            n_tokens=self._seen,
            gone=np.where(gone == NEVER, steps, gone).astype(dtype),
            held=np.stack(self._held),
            nbytes=nbytes[:, 0],
            nbytes_full=nbytes[:, 1],
            scores=join("scores"),
            ranks=join("ranks"),
            report=report(self.caches),
            gates=join("gates") if any(cache.needs_gate for cache in self.bounded) else None,
            at_floor=_at_floor(self.bounded),
        )

    def _tables(self) -> list[_Layer]:
        return [self._table(i) for i in range(len(self.bounded))]

    def _table(self, i: int) -> _Layer:
        """The tables of a layer that has read something: within the first call, later layers have not yet."""
        if i not in self._layers:
            self._layers[i] = _Layer(self.bounded[i], self.n_tokens)
        return self._layers[i]

    def _hear(self, i: int) -> Callable[[np.ndarray, np.ndarray], None]:
        return lambda positions, scores: self._table(i).hear(positions, scores)

    def _gated(self, i: int) -> Callable[[int, np.ndarray], None]:
        return lambda start, said: self._table(i).hear_gate(start, said)


NEVER = np.iinfo(np.uint32).max


class _Layer:
    """Tables of one layer, a line per KV head."""

    def __init__(self, cache: PrunedKVCache, n_tokens: int):
        batch, self.heads = cache.held.ring.keys.shape[:2]
        if batch != 1:
            raise ValueError(f"[trace] follows one sequence; got a batch of {batch}; try one text at a time")
        self.cache, self.n_tokens = cache, n_tokens
        self.gone = np.full((self.heads, n_tokens), NEVER, np.uint32)
        self.scores = np.full((self.heads, n_tokens), np.nan, np.float32)
        self.ranks = np.full((self.heads, n_tokens), UNRANKED, np.uint8)
        self.gates = np.full((self.heads, n_tokens), np.nan, np.float32)
        self._before = np.zeros((self.heads, 0), np.int64)
        self._now = np.zeros((self.heads, n_tokens + 1), bool)  # the last one is for empty slots
        self._lines = np.arange(self.heads)[:, None]

    def note(self, start: int, stop: int, step: int) -> np.ndarray:
        """Find what was held before, or came with the positions ``start .. stop - 1``, and is gone; slots per head."""
        positions = np.array(self.cache.held.positions())[0].astype(np.int64)
        index = np.where(positions < 0, self.n_tokens, positions)
        new = np.broadcast_to(np.arange(start, stop), (self.heads, stop - start))
        known = np.concatenate([self._before, new], axis=1)
        self._now[self._lines, index] = True
        line, place = np.nonzero(~self._now[self._lines, known] & (known < self.n_tokens))
        self.gone[line, known[line, place]] = step
        self._now[self._lines, index] = False
        self._before = index
        return (positions >= 0).sum(axis=1)

    def hear_gate(self, start: int, said: np.ndarray) -> None:
        """Keep what the gate said of the tokens from position ``start`` on ``(H, L)``."""
        self.gates[:, start : start + said.shape[1]] = said

    def hear(self, positions: np.ndarray, scores: np.ndarray) -> None:
        """Keep the scores ``(H, S)`` of what competes at ``positions``, negative where nothing does."""
        order = np.argsort(np.argsort(np.where(positions < 0, np.inf, scores), axis=1, kind="stable"), axis=1)
        most = np.maximum(1, (positions >= 0).sum(axis=1, keepdims=True) - 1)
        line, place = np.nonzero(positions >= 0)
        at = positions[line, place]
        self.scores[line, at] = scores[line, place]
        self.ranks[line, at] = (order * 254 // most)[line, place]


def _overhear(cache: PrunedKVCache, tell: Callable[[np.ndarray, np.ndarray], None]) -> Callable[[], None]:
    """Have ``tell(positions, scores)`` called where a layer's slots are chosen; returns what ends it.

    What was overheard is evaluated at once: arrays that live on would make the pool be copied when it is written.
    """
    held, contest = cache.held, cache.held.contest

    def overheard(n: int, scores: mx.array) -> Any:
        positions = held.competing(n)
        mx.eval(positions, scores)
        tell(np.array(positions)[0].astype(np.int64), np.array(scores)[0])
        return contest(n, scores)

    held.contest = overheard  # type: ignore[method-assign]  # on this instance only
    return lambda: held.__dict__.pop("contest", None)


def _overhear_gate(cache: PrunedKVCache, tell: Callable[[int, np.ndarray], None]) -> Callable[[], None]:
    """Have ``tell(start, said)`` called where new tokens are written, with what their gate said; returns what ends it."""
    held, write = cache.held, cache.held.write

    def overheard(keys: mx.array, values: mx.array, memory: mx.array | None) -> None:
        start = held.written
        write(keys, values, memory)
        assert memory is not None
        tell(start, np.array(memory)[0])

    held.write = overheard  # type: ignore[method-assign]  # on this instance only
    return lambda: held.__dict__.pop("write", None)


def _at_floor(bounded: Sequence[PrunedKVCache]) -> np.ndarray | None:
    """Which KV heads own no more pages than their floor, layer by layer ``(R,)``; None where heads do not compete."""
    if not bounded[0].settings.ragged or not any(_pages(cache) for cache in bounded):
        return None
    pools = {i: pool for i, cache in enumerate(bounded) if (pool := _pages(cache))}
    everywhere = bounded[0].settings.allocator == "global"
    in_all = pages_of_all(bounded[i] for i in pools), sum(pool.heads for pool in pools.values())
    found = []
    for i, cache in enumerate(bounded):
        heads = cache.held.ring.keys.shape[1]
        if i not in pools:
            found.append(np.zeros(heads, bool))
            continue
        pages, among = in_all if everywhere else (cache.page_limit, heads)
        floor = floor_pages(pages, among, cache.settings, cache.protected)
        found.append(np.bincount(pools[i].owner, minlength=heads) <= floor)
    return np.concatenate(found)


def _pages(cache: PrunedKVCache) -> PagedPool | None:
    """The pool of a layer whose heads have competed; None where they have not."""
    pool = cache.held.pools[-1] if cache.held.pools else None
    return pool if isinstance(pool, PagedPool) and pool.contested else None


def _places(caches: list[Any]) -> list[int]:
    """Of each bounded cache, its layer's place among all layers of the model."""
    return [i for i, cache in enumerate(caches) for _ in pruned([cache])]


def follow(
    model: nn.Module,
    tokens: Sequence[int],
    caches: list[Any],
    *,
    step: int | None = None,
    progress: Progress | None = None,
) -> Trace:
    """Read a text into caches and say what became of each token.

    Args:
        model: attached.
        tokens: ids.
        caches: fresh ones, of one sequence.
        step: tokens of a forward call. None: up to where slots change hands next, so that evictions are dated exactly.
        progress: called after each forward call.

    Raises:
        ValueError: the caches are not bounded, not fresh, or of a batch.
    """
    recorder, start = Recorder(caches, len(tokens)), 0
    with recorder.listening():
        while start < len(tokens):
            room = step or min(LONGEST_CALL, *(c.step_room() for c in recorder.bounded))
            stop = min(len(tokens), start + room)
            model(mx.array([list(tokens[start:stop])]), cache=caches)
            recorder.note()
            mx.clear_cache()
            if progress:
                progress(stop, len(tokens))
            start = stop
    return recorder.trace()
