"""Rows of question tasks: exact matches with intervals, the answer's log-probability, what is left of the full cache's.

Several questions about one document are not independent: where an item has several, intervals are those of clusters.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from mlx_kvprune.evals.asking import COUNTS_FROM, Outcome
from mlx_kvprune.evals.conditions import SIZES
from mlx_kvprune.evals.store import Unit, by_condition, named

Z = 1.959964  # of a 95% interval


def rows(task: str, units: Sequence[Unit]) -> list[dict[str, Any]]:
    """One row per condition and wording, from units whose result has ``outcomes``."""
    full = {unit["item"]: unit["result"]["outcomes"] for unit in units if unit["policy"] == "full"}
    return [
        _row(task, mine, wording, full)
        for mine in by_condition(units)
        for wording in dict.fromkeys(x["wording"] for unit in mine for x in unit["result"]["outcomes"])
    ]


def _row(task: str, units: Sequence[Unit], wording: str, full: dict[int, list[Outcome]]) -> dict[str, Any]:
    items = [paired(unit["result"]["outcomes"], full.get(unit["item"], []), wording) for unit in units]
    pairs = [pair for item in items for pair in item]
    outcomes, against = [x for x, _ in pairs], [y for _, y in pairs if y is not None]
    solved, solved_full = (sum(x["exact"] for x in some) for some in (outcomes, against))
    of_full = [[bool(x["exact"]) for x, y in item if y and y["exact"]] for item in items]
    low, high = clustered([[bool(x["exact"]) for x, _ in item] for item in items])
    kept_low, kept_high = clustered(of_full)
    return {
        "task": task,
        **named(units[0]),
        "wording": wording,
        "trials": len(outcomes),
        "exact": solved,
        "score": solved / len(outcomes),
        "score_low": low,
        "score_high": high,
        "exact_full": solved_full,
        "kept": sum(map(sum, of_full)),
        "kept_low": kept_low,
        "kept_high": kept_high,
        "counts": bool(against) and solved_full >= COUNTS_FROM * len(against),
        **mean_interval("logprob", [[x["logprob"] for x, _ in item] for item in items]),
        "prompt_tokens": max(x["prompt_tokens"] for x in outcomes),
        **{name: max(x[name] for x in outcomes) for name in SIZES},
        "outcomes": [{k: v for k, v in x.items() if k not in SIZES} for x in outcomes],
    }


def paired(outcomes: Sequence[Outcome], full: Sequence[Outcome], wording: str) -> list[tuple[Outcome, Outcome | None]]:
    """The outcomes of one wording with those of the full cache to the same questions, None where it has none."""
    mine, theirs = ([x for x in some if x["wording"] == wording] for some in (outcomes, full))
    return [(x, theirs[i] if i < len(theirs) else None) for i, x in enumerate(mine)]


def wilson(solved: float, n: float) -> tuple[float, float]:
    """The 95% score interval of a share: Wilson 1927; (0, 1) of nothing."""
    if not n:
        return 0.0, 1.0
    p, z2 = solved / n, Z * Z
    middle, width = (p + z2 / (2 * n)) / (1 + z2 / n), Z * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n)) / (1 + z2 / n)
    return max(0.0, middle - width), min(1.0, middle + width)


def clustered(items: Sequence[Sequence[bool]]) -> tuple[float, float]:
    """The 95% interval of the share that is right, of items with several questions each.

    Wilson's, of so many independent questions as say as much: the number over the design effect, which is the variance of
    the share by items over that of independent draws (Kish 1965, *Survey Sampling*), and at least one.
    """
    items = [item for item in items if item]
    n, right = sum(map(len, items)), sum(map(sum, items))
    p, several = right / max(1, n), any(len(item) > 1 for item in items)
    effect = 1.0
    if several and len(items) > 1 and 0 < p < 1:
        by_items = sum((sum(item) - p * len(item)) ** 2 for item in items) / n**2 * len(items) / (len(items) - 1)
        effect = max(1.0, by_items / (p * (1 - p) / n))
    return wilson(right / effect, n / effect)


def mean_interval(name: str, items: Iterable[Sequence[float]], draws: int = 2000, seed: int = 0) -> dict[str, float]:
    """Fields for the mean of values and its 95% bootstrap interval, for which whole items are drawn."""
    totals = np.array([(sum(item), len(item)) for item in items if len(item)], float)
    picked = totals[np.random.default_rng(seed).integers(len(totals), size=(draws, len(totals)))].sum(axis=1)
    low, high = np.quantile(picked[:, 0] / picked[:, 1], [0.025, 0.975])
    mean = totals[:, 0].sum() / totals[:, 1].sum()
    return {name: float(mean), f"{name}_low": float(low), f"{name}_high": float(high)}
