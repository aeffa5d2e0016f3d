"""Throughput of several requests at a time, in mlx-lm's own ``BatchGenerator``."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from typing import Any

from mlx_kvprune.bench.candidates import Candidate
from mlx_kvprune.bench.reading import Plan, Tick, turned
from mlx_kvprune.bench.rows import BATCH, Row, Store, ceiling_tps
from mlx_kvprune.forward import leaves

import mlx.core as mx  # isort: skip

SHIFT = 7  # tokens by which the texts of a batch differ


class BatchReader:
    """One candidate's batch: all requests are read first, then all decode."""

    def __init__(self, model: Any, candidate: Candidate, prompts: list[list[int]], plan: Plan) -> None:
        from mlx_lm.generate import BatchGenerator

        n = len(prompts)
        self.name, self.nbytes_of, self.seconds, self.size, self.peak = candidate.name, candidate.nbytes, 0.0, n, 0
        mx.synchronize()
        self.active = mx.get_active_memory()
        options: Any = {"prefill_step_size": plan.step, "prefill_batch_size": n, "completion_batch_size": n}
        self.generator = BatchGenerator(model, max_tokens=2 + plan.rounds * (plan.decode_tokens + 1), **options)
        self.generator.insert(prompts, caches=[candidate.make() for _ in prompts])

    def read(self) -> None:
        """Until the first token of every request is there."""
        mx.reset_peak_memory()
        start = time.perf_counter()
        while not self.generator.next()[1]:
            pass
        self.seconds = time.perf_counter() - start
        self.peak = mx.get_peak_memory() - self.active

    def decode(self, n: int) -> float:
        """Seconds of ``n`` steps; one before them waits for what is still under way."""
        self._step()
        start = time.perf_counter()
        for _ in range(n):
            self._step()
        return time.perf_counter() - start

    def nbytes(self) -> int:
        """Of the caches of all requests."""
        return sum(c.nbytes for c in leaves(self.generator._generation_batch.prompt_cache))

    def close(self) -> None:
        self.generator.close()

    def _step(self) -> None:
        _, told = self.generator.next()
        assert len(told) == self.size, "a request ended early"


def batch_all(
    model: Any, known: Sequence[Candidate], tokens: list[int], sizes: Sequence[int], length: int,
    plan: Plan, store: Store, tick: Tick,
) -> list[str]:  # fmt: skip
    """Measure what ``store`` does not have; notes on those that cannot be batched."""
    able = [c for c in known if all(hasattr(x, "merge") for x in c.make())]
    notes = [f"batch: {c.name} was left out: its caches cannot be batched" for c in known if c not in able]
    for size in sizes:
        for rep in range(plan.reps):
            missing = [c for c in able if not store.has((BATCH, size, length, c.name, rep))]
            if missing:
                prompts = [tokens[i * SHIFT : i * SHIFT + length] for i in range(size)]
                rows = _measured(model, missing, prompts, plan, tick)
                store.add([{**row, "rep": rep} for row in rows])
    return notes


def _measured(model: Any, known: Sequence[Candidate], prompts: list[list[int]], plan: Plan, tick: Tick) -> list[Row]:
    size, tokens = len(prompts), sum(map(len, prompts))
    readers = []
    for candidate in known:
        tick(f"batch of {size}: {candidate.name}", 0)
        reader = BatchReader(model, candidate, prompts, plan)
        reader.read()
        readers.append(reader)
        tick(f"batch of {size}", tokens)
    seconds: dict[str, list[float]] = {r.name: [] for r in readers}
    for turn in range(plan.rounds):
        for reader in turned(readers, turn):
            seconds[reader.name].append(reader.decode(plan.decode_tokens) / plan.decode_tokens)
    sitting, rows = uuid.uuid4().hex[:12], []
    for r in readers:
        row: Row = {"kind": BATCH, "batch": size, "candidate": r.name, "sitting": sitting, "prompt_tokens": tokens}
        row |= {"prefill_s": r.seconds, "ttft_s": r.seconds, "decode_s": seconds[r.name], "kv_bytes": r.nbytes()}
        row |= {"peak_bytes": r.peak, "batch_context": len(prompts[0])}
        row["ceiling_tps"] = ceiling_tps(plan.gbps, plan.weights, r.nbytes_of(len(prompts[0])), size)
        rows.append(row)
        r.close()
    return rows
