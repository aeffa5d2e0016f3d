"""Regret: how much attention the full cache gives to tokens that a bounded cache no longer holds.

For a query at position t, with ``a`` the full cache's attention weights of one head and ``e_j`` the position at which
the bounded cache evicted token j from that head's KV head:

    regret(t) = sum over j with e_j <= t of a[t, j],    by the age of the eviction, t - e_j.

Regret of young evictions blames the choice at the edge of the window; regret of old ones says that what was dropped
long ago is wanted again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_kvprune.attach import make_cache
from mlx_kvprune.cache import PrunedKVCache
from mlx_kvprune.evals.conditions import CHUNK, SIZES, Condition, finish, held
from mlx_kvprune.evals.fidelity import GROUP, batched
from mlx_kvprune.evals.job import Job, Measured, Tick
from mlx_kvprune.evals.store import Unit, by_condition, named
from mlx_kvprune.forward import pruned
from mlx_kvprune.scorers.base import Held, Scorer, Seen, State, attention_of

AGES = (0, 32, 128, 512)  # lower edges; the last bin is open
NEVER = np.iinfo(np.int32).max
SAMPLES = 256


@dataclass(frozen=True)
class LastQueries(Scorer):
    """Evicts nothing worth speaking of: it remembers the last call's queries, so that its weights can be computed."""

    needs = frozenset({"queries"})

    def observe(self, state: State, seen: Seen) -> State:
        return {"queries": seen.queries}


def run(
    model: nn.Module,
    tokens: Sequence[int],
    conditions: Sequence[Condition],
    *,
    seed: int = 0,
    samples: int = SAMPLES,
    tick: Tick | None = None,
) -> list[dict[str, Any]]:
    """One row per condition: the mean regret of ``samples`` queries of the second half, by age and by layer."""
    found = _results(model, tokens, conditions, seed, samples, tick)
    return [{"task": "regret", **condition.describe(), **result} for condition, result in found]


def measure(job: Job, tokens: Sequence[int], conditions: Sequence[Condition], tick: Tick) -> Measured:
    """A result for each condition; ``GROUP`` of them share one reading of the full cache."""
    for group in batched(conditions, GROUP):
        yield from _results(job.model, tokens, group, job.seed, SAMPLES, tick)


def rows(units: Sequence[Unit]) -> list[dict[str, Any]]:
    """One row per condition; several texts are averaged."""
    return [
        {"task": "regret", **named(some[0]), **_mean([unit["result"] for unit in some])} for some in by_condition(units)
    ]


def _mean(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    if len(results) == 1:
        return results[0]
    by_layer = np.mean([result["by_layer"] for result in results], axis=0)
    ages = zip(*(result["by_age"] for result in results), strict=True)
    by_age = [{"from": some[0]["from"], "regret": float(np.mean([x["regret"] for x in some]))} for some in ages]
    means = {"regret": float(by_layer.mean()), "by_age": by_age, "by_layer": by_layer.tolist()}
    sizes = {name: max(result[name] for result in results) for name in SIZES}
    return {**results[0], **means, "worst_layer": int(by_layer.argmax()), "texts": len(results), **sizes}


def _results(
    model: nn.Module, tokens: Sequence[int], conditions: Sequence[Condition], seed: int, samples: int, tick: Tick | None
) -> list[tuple[Condition, dict[str, Any]]]:
    everything, lost, sizes = recording(model), [], []
    for condition in conditions:
        caches = condition.caches(model)
        lost.append(evictions(model, tokens, caches, tick))
        sizes.append(held(caches))
    totals = measured(model, tokens, lost, sampled(len(tokens), samples, seed), everything, tick=tick)
    return [
        (
            condition,
            {"tokens": len(tokens), **summary(total), **(_full_size(everything) if condition.is_full else size)},
        )
        for condition, total, size in zip(conditions, totals, sizes, strict=True)
    ]


def _full_size(everything: list[Any]) -> dict[str, int]:
    """What mlx-lm's own cache would hold: the recording caches without what they record."""
    size = held(everything)
    return {**size, "kv_bytes": size["kv_bytes_full"], "kv_bytes_peak": size["kv_bytes_full"]}


def work(n_tokens: int, conditions: Sequence[Condition], group: int = 1 << 30) -> int:
    """How many tokens ``run`` sends through the model, or ``measure`` with groups of ``GROUP``."""
    bounded = sum(not c.is_full for c in conditions)
    return n_tokens * (bounded + max(1, -(-bounded // group)))


def sampled(n_tokens: int, samples: int, seed: int) -> np.ndarray:
    """Positions of the second half, ``samples`` of them or all, in order."""
    half = np.arange(n_tokens // 2, n_tokens)
    return np.sort(np.random.default_rng(seed).choice(half, size=min(samples, len(half)), replace=False))


def evictions(model: nn.Module, tokens: Sequence[int], caches: list[Any], tick: Tick | None = None) -> np.ndarray:
    """When each token was evicted: ``(layers, B = 1, H_kv, T)`` int32, ``NEVER`` where it is held to the end.

    The text is read in the steps in which slots change hands: at most once, before the first token of a step.
    A full cache evicts nothing: its answer has one layer and one head that stand for all.
    """
    bounded, start = pruned(caches), 0
    if not bounded:
        return np.full((1, 1, 1, len(tokens)), NEVER, np.int32)
    lost = None
    while start < len(tokens):
        stop = min(len(tokens), start + min(c.step_room() for c in bounded))
        model(mx.array([list(tokens[start:stop])]), cache=caches)
        finish(caches)
        now = np.stack([_is_held(cache, len(tokens)) for cache in bounded])
        lost = np.full(now.shape, NEVER, np.int32) if lost is None else lost
        missing = ~now & (lost == NEVER)
        missing[..., stop:] = False
        lost[missing] = start
        if tick:
            tick(stop - start)
        start = stop
    assert lost is not None
    return lost


def _is_held(cache: PrunedKVCache, n_tokens: int) -> np.ndarray:
    """Which positions one layer holds: ``(B, H_kv, n_tokens)`` bool."""
    positions = np.array(cache.held.positions()).astype(np.int64)
    now = np.zeros((*positions.shape[:2], n_tokens + 1), bool)
    np.put_along_axis(
        now, np.where(positions < 0, n_tokens, positions), True, axis=-1
    )  # the last one is for empty slots
    return now[..., :n_tokens]


def measured(
    model: nn.Module,
    tokens: Sequence[int],
    lost: Sequence[np.ndarray],
    queries: np.ndarray,
    caches: list[Any],
    *,
    chunk: int = CHUNK,
    tick: Tick | None = None,
) -> list[np.ndarray]:
    """Mean regret per layer and age ``(layers, len(AGES))`` for each table of evictions.

    Args:
        lost: tables ``(layers, 1, H_kv, T)`` as ``evictions`` makes them.
        queries: positions of the queries that are asked, in order.
        caches: fresh ones, as ``recording`` makes them.
    """
    totals: list[Any] = [0.0] * len(lost)
    for start in range(0, len(tokens), chunk):
        stop = min(len(tokens), start + chunk)
        model(mx.array([list(tokens[start:stop])]), cache=caches)
        finish(caches)
        asked = queries[(queries >= start) & (queries < stop)]
        if len(asked):
            weights = full_weights(caches, asked, start)
            totals = [total + mass(weights, table, asked) for total, table in zip(totals, lost, strict=True)]
        if tick:
            tick(stop - start)
    return [total / len(queries) for total in totals]


def recording(model: nn.Module) -> list[Any]:
    """Caches that evict nothing and remember the queries of the last call.

    Raises:
        ValueError: the model does its own attention, so that its queries are not seen.
    """
    caches = make_cache(model, "window", None)
    for cache in pruned(caches):
        if cache.dense:
            raise ValueError(
                "[regret] needs the queries; got a model that does its own attention; try --tasks fidelity,needles"
            )
        cache.scorer = LastQueries()
    return caches


def full_weights(caches: list[Any], asked: np.ndarray, start: int) -> np.ndarray:
    """The full cache's attention weights of the ``asked`` queries of the last call, which began at ``start``.

    They are the softmax of scaled query-key products: what a model adds beside them (the attention sinks of gpt_oss,
    the position scores that deepseek_v3 hands over as a mask) is not seen here.

    Returns:
        ``(layers, B, H_kv, n, S)`` float32, the mean over the query heads of a KV head; slot = position.
    """
    rows = mx.array(asked - start)
    return np.stack([np.array(_layer_weights(cache)[:, :, :, rows].mean(axis=2)) for cache in pruned(caches)])


def _layer_weights(cache: PrunedKVCache) -> mx.array:
    order = mx.argsort(cache.held.positions(), axis=-1)[..., None]
    keys = mx.take_along_axis(cache.held.rows("keys"), order, axis=2)
    positions = mx.broadcast_to(mx.arange(cache.held.written, dtype=mx.int32), keys.shape[:3])
    everything = Held(keys, keys, positions, None, cache.held.written, cache.layer, cache.scale)
    return attention_of(cache.signals["queries"], everything)


def mass(weights: np.ndarray, lost: np.ndarray, asked: np.ndarray) -> np.ndarray:
    """Attention mass on evicted tokens, summed over queries, mean over heads: ``(layers, len(AGES))``.

    Args:
        weights: ``(layers, B, H_kv, n, S)``.
        lost: ``(layers, B, H_kv, T)``, T >= S.
        asked: positions of the queries ``(n,)``.
    """
    slots = weights.shape[-1]
    age = asked[:, None] - lost[:, :, :, None, :slots].astype(np.int64)  # (layers, B, H_kv, n, S); negative: still held
    edges = (*AGES, NEVER)
    inside = [(age >= low) & (age < high) for low, high in pairwise(edges)]
    return np.stack([(weights * x).sum(axis=(3, 4)).mean(axis=(1, 2)) for x in inside], axis=-1)


def summary(total: np.ndarray) -> dict[str, Any]:
    """A row's fields from regret per layer and age ``(layers, len(AGES))``."""
    by_layer = total.sum(axis=1)
    return {
        "regret": float(by_layer.mean()),
        "by_age": [{"from": low, "regret": float(x)} for low, x in zip(AGES, total.mean(axis=0), strict=True)],
        "by_layer": [float(x) for x in by_layer],
        "worst_layer": int(by_layer.argmax()),
    }
