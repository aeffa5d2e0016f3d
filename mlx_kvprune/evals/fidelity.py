"""Teacher-forced fidelity: the same text through the stock cache and through bounded ones; their predictions compared.

For every token t after the first, with p the full cache's prediction and q the bounded one's:

* ``KL(p || q) = sum_v p_v (log p_v - log q_v)``, in nats;
* change of NLL: ``log p[token_t] - log q[token_t]``, positive where the bounded cache is worse;
* top-1 agreement: whether ``argmax p == argmax q``.

Nothing is lost before the budget is full, so that means are taken over the second half of the text. Neighbouring tokens
are not independent: intervals come from resampling blocks of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_kvprune.evals.conditions import CHUNK, FULL, SIZES, Condition, finish, held
from mlx_kvprune.evals.job import Job, Measured, Tick
from mlx_kvprune.evals.store import Unit, by_condition, named

GROUP = 6  # conditions that are read together: what is lost if a run is killed
MEASURES = ("kl", "nll_change", "agreement")
BLOCK = 32  # tokens that are resampled together
FEWEST_BLOCKS = 8  # of which a difference is told
FIRST_BIN = 256
ALIKE = 1.25  # bytes over fewer bytes, up to which two conditions are compared


@dataclass(frozen=True)
class Trace:
    """What one condition did on one text, per predicted token ``(T - 1,)``, and what its caches held at the end."""

    kl: np.ndarray
    nll: np.ndarray
    nll_full: np.ndarray
    agrees: np.ndarray
    held: dict[str, int]


def run(
    model: nn.Module, tokens: Sequence[int], conditions: Sequence[Condition], *, seed: int = 0, tick: Tick | None = None
) -> list[dict[str, Any]]:
    """One row per condition: means over the second half of ``tokens``, with intervals, and means by distance."""
    traces = trace(model, tokens, conditions, tick=tick)
    half = len(tokens) // 2
    return [
        {"task": "fidelity", **condition.describe(), "tokens": len(tokens), **summary(one, half, seed), **one.held}
        for condition, one in traces.items()
    ]


def measure(job: Job, tokens: Sequence[int], conditions: Sequence[Condition], tick: Tick) -> Measured:
    """A result for each condition; ``GROUP`` of them share one reading of the full cache."""
    for group in batched(conditions, GROUP):
        for condition, one in trace(job.model, tokens, group, tick=tick).items():
            half = len(tokens) // 2
            result = {"tokens": len(tokens), **summary(one, half, job.seed), **one.held, "blocks": blocks(one, half)}
            yield condition, result


def batched(conditions: Sequence[Condition], size: int) -> list[list[Condition]]:
    """The conditions in groups of ``size``; the full cache in one of its own, for it is read with each group anyway."""
    full, others = ([c for c in conditions if c.is_full is is_full] for is_full in (True, False))
    groups = [others[i : i + size] for i in range(0, len(others), size)]
    return [[*full, *groups[0]], *groups[1:]] if groups else [full][: len(full)]


def blocks(one: Trace, start: int) -> dict[str, list[float]]:
    """Means of whole blocks of ``BLOCK`` neighbouring predictions from ``start`` on, or of all there are if these are fewer:
    what rows are made of.
    """
    size = min(BLOCK, len(one.kl) - start)
    n = (len(one.kl) - start) // size * size
    cut = lambda x: [float(v) for v in x[start : start + n].reshape(-1, size).mean(axis=1)]
    return {"kl": cut(one.kl), "nll_change": cut(one.nll - one.nll_full), "agreement": cut(one.agrees)}


def rows(units: Sequence[Unit]) -> list[dict[str, Any]]:
    """One row per condition; several texts are pooled, their blocks resampled together.

    ``over_window`` is how much more KL there is than with ``window`` at the same budget, block by block, if that holds about
    as many bytes: all conditions read the same tokens, so that what makes a block hard for one does for the other, and the
    difference is known better than either.
    """
    groups = list(by_condition(units))
    controls = [some for some in groups if (some[0]["policy"], some[0]["allocator"]) == ("window", "uniform")]
    return [
        {
            "task": "fidelity",
            **named(some[0]),
            **_pooled([unit["result"] for unit in some]),
            **_over(some, _control(some[0], controls)),
        }
        for some in groups
    ]


def _control(unit: Unit, controls: Sequence[Sequence[Unit]]) -> Sequence[Unit]:
    """``window`` at the condition's budget, precision and seed; where budgets were levelled, the only one there is."""
    same = lambda x: (x.get("kv_bits"), x["seed"]) == (unit.get("kv_bits"), unit["seed"])
    alike = [some for some in controls if same(some[0])]
    budget = lambda x: x.get("share") or x["budget"]
    return next((some for some in alike if budget(some[0]) == budget(unit)), alike[0] if len(alike) == 1 else [])


def _alike(mine: Sequence[Unit], windows: Sequence[Unit]) -> bool:
    """Whether they hold about as many bytes: at equal slots a threshold may hold far fewer than ``window`` does."""
    held = [max(unit["result"]["kv_bytes_peak"] for unit in some) for some in (mine, windows)]
    return max(held) <= ALIKE * min(held)


def _over(mine: Sequence[Unit], windows: Sequence[Unit]) -> dict[str, float]:
    """The mean difference of KL by blocks, on the texts that both have read, with its interval."""
    kl = lambda units: {unit["item"]: x["kl"] for unit in units if (x := unit["result"].get("blocks"))}
    of_mine, control = kl(mine), kl(windows)
    both = [(x, control[item]) for item, x in of_mine.items() if item in control]
    if not both or mine[0]["policy"] in ("full", "window") or not _alike(mine, windows):
        return {}
    x = np.concatenate([np.array(a) - np.array(b) for a, b in both])
    if len(x) < FEWEST_BLOCKS:
        return {}
    means = bootstrap_means(x, block=1)
    low, high = (float(end) for end in np.quantile(means, [0.025, 0.975]))
    chance = 2 * min(float((means >= 0).mean()), float((means <= 0).mean()))
    return {
        "over_window": _mean(x),
        "over_window_low": low,
        "over_window_high": high,
        "over_window_p": min(1.0, chance),
    }


def _pooled(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One text by its blocks as well, if they are enough: a row's differences from ``window`` are of these."""
    row = {name: value for name, value in results[0].items() if name != "blocks"} | {"texts": len(results)}
    if len(results) == 1 and len(results[0].get("blocks", {}).get("kl", ())) < FEWEST_BLOCKS:
        return row
    for name in results[0]["blocks"]:
        x = np.concatenate([result["blocks"][name] for result in results])
        low, high = bootstrap_interval(x, block=1)
        row |= {name: _mean(x), f"{name}_low": low, f"{name}_high": high}
    row |= {name: _mean(np.array([result[name] for result in results])) for name in ("nll", "nll_full")}
    near = zip(*(result["by_distance"] for result in results), strict=True)
    row["by_distance"] = [_pooled_near(some) for some in near]
    sizes = {name: max(result[name] for result in results) for name in SIZES}
    return {**row, **sizes}


def _pooled_near(some: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Means of one distance over texts; the ends of intervals have none."""
    means = {name: _mean(np.array([x[name] for x in some])) for name in MEASURES if name in some[0]}
    return {"from": some[0]["from"], "to": some[0]["to"], **means}


def work(n_tokens: int, conditions: Sequence[Condition], group: int = 1 << 30) -> int:
    """How many tokens ``run`` sends through the model, or ``measure`` with groups of ``GROUP``."""
    bounded = sum(not c.is_full for c in set(conditions))
    return n_tokens * (bounded + max(1, math.ceil(bounded / group)))


def trace(
    model: nn.Module,
    tokens: Sequence[int],
    conditions: Sequence[Condition],
    *,
    chunk: int = CHUNK,
    tick: Tick | None = None,
    against: Condition = FULL,
) -> dict[Condition, Trace]:
    """Run the conditions in lockstep: the full cache's logits exist for one chunk at a time, and serve all of them.

    Args:
        tokens: token ids of the text, ``T`` of them.
        chunk: tokens of one forward call.
        against: what the conditions are compared with, if not with the full cache.
    """
    ids = mx.array(list(tokens))
    caches = {condition: condition.caches(model) for condition in {against: 0, **dict.fromkeys(conditions)}}
    parts: dict[Condition, list[np.ndarray]] = {condition: [] for condition in conditions}
    for start in range(0, len(tokens), chunk):
        span = ids[None, start : start + chunk]
        targets = ids[start + 1 : start + 1 + span.shape[1]]
        full = _logits(model, span, caches[against], tick)
        for condition in conditions:
            logits = full if condition == against else _logits(model, span, caches[condition], tick)
            if targets.size:  # the text's last token foretells none
                parts[condition].append(compare(full, logits, targets))
    return {c: Trace(*np.concatenate(parts[c], axis=1), held=held(caches[c])) for c in conditions}


def _logits(model: nn.Module, span: mx.array, caches: list[Any], tick: Tick | None) -> mx.array:
    logits = model(span, cache=caches)[0]
    mx.eval(logits)
    finish(caches)
    if tick:
        tick(span.shape[1])
    return logits


def compare(full: mx.array, logits: mx.array, targets: mx.array) -> np.ndarray:
    """KL, both NLLs and agreement of two predictions.

    Args:
        full: logits of the full cache ``(L, vocab)``.
        logits: logits of the bounded one ``(L, vocab)``.
        targets: the tokens that came ``(L,)``; one fewer at the end of a text, whose last row is then left out.

    Returns:
        ``(4, L)`` float64: KL(full || bounded), NLL bounded, NLL full, 1 where both favour the same token.
    """
    n = targets.shape[0]
    log_p, log_q = (x - mx.logsumexp(x, axis=-1, keepdims=True) for x in (_float(full[:n]), _float(logits[:n])))
    kl = (mx.exp(log_p) * (log_p - log_q)).sum(axis=-1)
    nll = [-mx.take_along_axis(x, targets[:, None], axis=-1)[:, 0] for x in (log_q, log_p)]
    agrees = (log_p.argmax(axis=-1) == log_q.argmax(axis=-1)).astype(mx.float32)
    return np.array(mx.stack([kl, *nll, agrees])).astype(np.float64)


def _float(x: mx.array) -> mx.array:
    return x.astype(mx.float32)


def summary(one: Trace, start: int, seed: int = 0) -> dict[str, Any]:
    """Means over the predictions made at positions ``>= start``, each with its interval, and means by distance."""
    tail = slice(start, None)
    measures = {"kl": one.kl, "nll_change": one.nll - one.nll_full, "agreement": one.agrees}
    row: dict[str, Any] = {"from_token": start, "nll": _mean(one.nll[tail]), "nll_full": _mean(one.nll_full[tail])}
    for name, x in measures.items():
        low, high = bootstrap_interval(x[tail], seed=seed)
        row |= {name: _mean(x[tail]), f"{name}_low": low, f"{name}_high": high}
    row["by_distance"] = [_near(measures, a, b, seed) for a, b in bins(len(one.kl))]
    return row


def _near(measures: dict[str, np.ndarray], a: int, b: int, seed: int) -> dict[str, Any]:
    """Means and intervals of the predictions made at positions ``a`` to ``b``."""
    found: dict[str, Any] = {"from": a, "to": b}
    for name, x in measures.items():
        low, high = bootstrap_interval(x[a:b], seed=seed)
        found |= {name: _mean(x[a:b]), f"{name}_low": low, f"{name}_high": high}
    return found


def bins(n: int, first: int = FIRST_BIN) -> list[tuple[int, int]]:
    """Distances from the start of the text, doubling: ``(0, 256), (256, 512), (512, 1024) ...`` up to ``n``."""
    edges = [0, first]
    while edges[-1] < n:
        edges.append(2 * edges[-1])
    return [(a, min(b, n)) for a, b in pairwise(edges) if a < n]


def bootstrap_interval(
    x: np.ndarray, *, block: int = BLOCK, draws: int = 2000, level: float = 0.95, seed: int = 0
) -> tuple[float, float]:
    """Interval of the mean of a series ``(n,)`` whose neighbours depend on each other: circular block bootstrap.

    ``ceil(n / block)`` blocks of consecutive values (the series closed to a ring) are drawn with replacement, ``draws``
    times; the interval lies between the quantiles of their means. Politis and Romano 1992.
    """
    low, high = np.quantile(bootstrap_means(x, block=block, draws=draws, seed=seed), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def bootstrap_means(x: np.ndarray, *, block: int = BLOCK, draws: int = 2000, seed: int = 0) -> np.ndarray:
    """The means of ``draws`` resampled series, as ``bootstrap_interval`` draws them."""
    n = len(x)
    block = max(1, min(block, n // 2))
    ring = np.concatenate([[0.0], np.cumsum(np.concatenate([x, x[: block - 1]]))])
    block_means = (ring[block:] - ring[:-block]) / block  # (n,): one block starts at every value
    picked = np.random.default_rng(seed).integers(n, size=(draws, math.ceil(n / block)))
    return block_means[picked].mean(axis=1)


def _mean(x: np.ndarray) -> float:
    return float(np.mean(x))
