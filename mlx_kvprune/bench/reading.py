"""A text is read by all candidates in turn, piece by piece; at each context they decode in turn.

A machine's speed drifts by the minute: a ratio compares times of the same minute. One reading serves all contexts, so the
longest is the price of all.
"""

from __future__ import annotations

import copy
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from mlx_kvprune.bench.candidates import Candidate, held_nbytes
from mlx_kvprune.bench.rows import CONTEXT, Row, Store, ceiling_tps
from mlx_kvprune.bench.variants import stretch
from mlx_kvprune.forward import pruned
from mlx_kvprune.report import report

import mlx.core as mx  # isort: skip

PIECE = 2048  # tokens that a candidate reads before the next one's turn
T = TypeVar("T")
Tick = Callable[[str, int], None]  # what is being done, tokens


@dataclass(frozen=True)
class Plan:
    """How much is measured.

    Attributes:
        contexts: lengths at which candidates decode, ascending.
        reps: readings of the text.
        rounds: turns of decoding at each context.
        decode_tokens: of a turn.
        step: prefill step.
        gbps: of a copy.
        weights: bytes of weights that a decode step reads.
    """

    contexts: tuple[int, ...]
    reps: int
    rounds: int
    decode_tokens: int
    step: int
    gbps: float
    weights: int


class Reader(Protocol):
    """Somebody who reads a text and goes on with it."""

    name: str
    seconds: float

    def read(self, tokens: list[int]) -> None: ...
    def branch(self, last: bool) -> None: ...
    def decode(self, n: int) -> tuple[float, float]: ...
    def back(self) -> None: ...
    def sizes(self) -> Row: ...


class CacheReader:
    """A candidate of MLX: its cache, the seconds it has read for, and the memory that this took.

    Attributes:
        seconds: of prefill so far.
        resident: bytes that MLX holds more than before it had read anything.
        peak: the most that MLX held at any moment of its turns, without the weights and without the others. Of decoding only
            where the cache itself decodes: a copy's first step copies all arrays that it is written to.
    """

    def __init__(self, model: Any, candidate: Candidate, plan: Plan) -> None:
        self.name, self.model, self.plan = candidate.name, model, plan
        self.nbytes, self.full = candidate.nbytes, candidate.full
        self.cache = self.work = candidate.make()
        self.seconds, self.resident, self.peak = 0.0, 0, 0

    def read(self, tokens: list[int]) -> None:
        before = self._watch(self.cache)
        start = time.perf_counter()
        for i in range(0, len(tokens), self.plan.step):
            self.model(mx.array(tokens[i : i + self.plan.step])[None], cache=self.cache)
            mx.eval([c.state for c in self.cache])
            mx.clear_cache()
        self.seconds += time.perf_counter() - start
        self._note(before)

    def branch(self, last: bool) -> None:
        """Make ready to decode: with a copy, unless nothing comes after."""
        if not last:
            self.work = copy.deepcopy(self.cache)
            mx.eval([c.state for c in self.work])

    def decode(self, n: int) -> tuple[float, float]:
        before = self._watch(self.work)
        times = stretch(self.model, self.work, n)
        mx.synchronize()  # the loop has begun one step more
        mx.clear_cache()
        if self.work is self.cache:
            self._note(before)
        return times

    def back(self) -> None:
        """Forget what was decoded, if it was a copy that decoded."""
        self.work = self.cache
        mx.clear_cache()

    def sizes(self) -> Row:
        """Bytes, after the text and before anything was decoded."""
        held, found, seen = held_nbytes(self.cache), report(self.cache), _offset(self.cache)
        most = found.kv_bytes_peak + found.kv_bytes_other if pruned(self.cache) else held
        return {"kv_bytes": held, "kv_bytes_peak": most, "kv_bytes_full": int(self.full(seen)),
                "resident_bytes": self.resident, "peak_bytes": self.peak,
                "ceiling_tps": ceiling_tps(self.plan.gbps, self.plan.weights, self.nbytes(seen))}  # fmt: skip

    def _watch(self, cache: list[Any]) -> tuple[int, int]:
        """MLX's active memory now, and how much of it is this cache's; the peak starts from here."""
        mx.synchronize()
        mx.reset_peak_memory()
        return mx.get_active_memory(), held_nbytes(cache)

    def _note(self, before: tuple[int, int]) -> None:
        active, own = before
        self.peak = max(self.peak, mx.get_peak_memory() - active + own)
        self.resident += mx.get_active_memory() - active


def _offset(cache: list[Any]) -> int:
    return max(getattr(c, "offset", 0) for c in cache)


def warm_up(model: Any, candidate: Candidate, tokens: list[int], plan: Plan) -> None:
    """What is slower the first time: compiling kernels, touching memory."""
    reader = CacheReader(model, candidate, plan)
    reader.read(tokens)
    reader.decode(1)


# -- all of them -----------------------------------------------------------------------------------------------------


def read_all(
    make: Callable[[str], Reader], names: Sequence[str], tokens: list[int], plan: Plan, store: Store, tick: Tick
) -> None:
    """Measure what ``store`` does not have; it gets the rows of a context when all of them are complete."""
    for rep in range(plan.reps):
        missing = {c: [n for n in names if not store.has((CONTEXT, c, 0, n, rep))] for c in plan.contexts}
        contexts = [c for c, left in missing.items() if left]
        readers = [make(name) for name in names if any(name in missing[c] for c in contexts)]
        done = 0
        for context in contexts:
            _read_to(readers, tokens[done:context], rep, tick, f"reading {done:,} to {context:,}")
            taking_part = [r for r in readers if r.name in missing[context]]
            later = {n for c in contexts if c > context for n in missing[c]}
            rows = measured(taking_part, context, plan, tick, later)
            store.add([{**row, "rep": rep} for row in rows])
            readers, done = [r for r in readers if r.name in later], context


def _read_to(readers: Sequence[Reader], tokens: list[int], turn: int, tick: Tick, what: str) -> None:
    for i, start in enumerate(range(0, len(tokens), PIECE)):
        piece = tokens[start : start + PIECE]
        for reader in turned(readers, turn + i):
            tick(f"{what}: {reader.name}", 0)
            reader.read(piece)
            tick(what, len(piece))


def measured(readers: Sequence[Reader], context: int, plan: Plan, tick: Tick, later: set[str]) -> list[Row]:
    """Decode in turn, and a row for each reader."""
    first: dict[str, float] = {}
    seconds: dict[str, list[float]] = {r.name: [] for r in readers}
    sizes = {r.name: r.sizes() for r in readers}
    for reader in readers:
        reader.branch(reader.name not in later)
    for turn in range(plan.rounds):
        for reader in turned(readers, turn):
            tick(f"decoding at {context:,}: {reader.name}", 0)
            once, rest = reader.decode(plan.decode_tokens)
            first.setdefault(reader.name, once)
            seconds[reader.name].append(rest / plan.decode_tokens)
    for reader in readers:
        reader.back()
    sitting = uuid.uuid4().hex[:12]
    rows = []
    for r in readers:
        row: Row = {"kind": CONTEXT, "context": context, "candidate": r.name, "sitting": sitting}
        row |= {"prompt_tokens": context, "prefill_s": r.seconds, "ttft_s": r.seconds + first[r.name]}
        row |= {"decode_s": seconds[r.name], **sizes[r.name], "peak_bytes": r.sizes()["peak_bytes"]}
        rows.append(row)
    return rows


def turned(readers: Sequence[T], turn: int) -> list[T]:
    """All of them, another one first each time."""
    n = turn % len(readers) if readers else 0
    return [*readers[n:], *readers[:n]]
