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
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_kvprune.evals.conditions import CHUNK, FULL, Condition, held, settle

Tick = Callable[[int], None]  # told how many tokens went through the model
BLOCK = 32  # tokens that are resampled together
FIRST_BIN = 256


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


def work(n_tokens: int, conditions: Sequence[Condition]) -> int:
    """How many tokens ``run`` sends through the model."""
    return n_tokens * len({FULL, *conditions})


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
            parts[condition].append(compare(full, logits, targets))
    return {c: Trace(*np.concatenate(parts[c], axis=1), held=held(caches[c])) for c in conditions}


def _logits(model: nn.Module, span: mx.array, caches: list[Any], tick: Tick | None) -> mx.array:
    logits = model(span, cache=caches)[0]
    mx.eval(logits)
    settle(caches)
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
    row["by_distance"] = [
        {"from": a, "to": b, **{name: _mean(x[a:b]) for name, x in measures.items()}} for a, b in bins(len(one.kl))
    ]
    return row


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
    n = len(x)
    block = max(1, min(block, n // 2))
    ring = np.concatenate([[0.0], np.cumsum(np.concatenate([x, x[: block - 1]]))])
    block_means = (ring[block:] - ring[:-block]) / block  # (n,): one block starts at every value
    picked = np.random.default_rng(seed).integers(n, size=(draws, math.ceil(n / block)))
    low, high = np.quantile(block_means[picked].mean(axis=1), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _mean(x: np.ndarray) -> float:
    return float(np.mean(x))
