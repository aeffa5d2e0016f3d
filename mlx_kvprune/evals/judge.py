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
T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)  # Student's, of 1 to 10 degrees of freedom


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
        **_gain(items),
        "prompt_tokens": max(x["prompt_tokens"] for x in outcomes),
        **{name: max(x[name] for x in outcomes) for name in SIZES},
        "outcomes": [{k: v for k, v in x.items() if k not in SIZES} for x in outcomes],
    }


def _gain(items: Sequence[Sequence[tuple[Outcome, Outcome | None]]]) -> dict[str, float]:
    """The answer's log-probability over that with the full cache, question by question; nothing where that has none."""
    over = [[x["logprob"] - y["logprob"] for x, y in item if y] for item in items]
    return mean_interval("gain", over) if any(over) else {}


def paired(outcomes: Sequence[Outcome], full: Sequence[Outcome], wording: str) -> list[tuple[Outcome, Outcome | None]]:
    """The outcomes of one wording with those of the full cache to the same questions, None where it has none."""
    mine, theirs = ([x for x in some if x["wording"] == wording] for some in (outcomes, full))
    return [(x, theirs[i] if i < len(theirs) else None) for i, x in enumerate(mine)]


def wilson(solved: float, n: float, z: float = Z) -> tuple[float, float]:
    """The 95% score interval of a share: Wilson 1927; (0, 1) of nothing."""
    if not n:
        return 0.0, 1.0
    p, z2 = solved / n, z * z
    middle, width = (p + z2 / (2 * n)) / (1 + z2 / n), z * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n)) / (1 + z2 / n)
    return max(0.0, middle - width), min(1.0, middle + width)


def student(degrees: int) -> float:
    """The two-sided 95% quantile of Student's distribution; above 10 by its expansion around the normal one."""
    if degrees <= len(T):
        return T[degrees - 1]
    second, third = (5 * Z**5 + 16 * Z**3 + 3 * Z) / 96, (3 * Z**7 + 19 * Z**5 + 17 * Z**3 - 15 * Z) / 384
    return Z + (Z**3 + Z) / 4 / degrees + second / degrees**2 + third / degrees**3


def clustered(items: Sequence[Sequence[bool]]) -> tuple[float, float]:
    """The 95% interval of the share that is right, of items with several questions each.

    Wilson's, of so many independent questions as say as much: the number over the design effect, which is the variance of
    the share by items over that of independent draws (Kish 1965, *Survey Sampling*), and at least one; with Student's
    quantile, for that variance is known no better than items are many. One item alone says what one question does. With few
    items most of which are all right or all wrong, it is still too narrow.
    """
    items = [item for item in items if item]
    n, right, k = sum(map(len, items)), sum(map(sum, items)), len(items)
    if k == n:  # one question to an item, or nothing
        return wilson(right, n)
    if k == 1:
        return wilson(right / n, 1)
    p, effect = right / n, 1.0
    if 0 < p < 1:
        by_items = sum((sum(item) - p * len(item)) ** 2 for item in items) / n**2 * k / (k - 1)
        effect = max(1.0, by_items / (p * (1 - p) / n))
    return wilson(right / effect, n / effect, student(k - 1))


def mean_interval(name: str, items: Iterable[Sequence[float]], draws: int = 2000, seed: int = 0) -> dict[str, float]:
    """Fields for the mean of values and its 95% bootstrap interval, for which whole items are drawn; or one item's values."""
    some = [item for item in items if len(item)]
    some = [[x] for x in some[0]] if len(some) == 1 else some
    totals = np.array([(sum(item), len(item)) for item in some], float)
    picked = totals[np.random.default_rng(seed).integers(len(totals), size=(draws, len(totals)))].sum(axis=1)
    low, high = np.quantile(picked[:, 0] / picked[:, 1], [0.025, 0.975])
    mean = totals[:, 0].sum() / totals[:, 1].sum()
    return {name: float(mean), f"{name}_low": float(low), f"{name}_high": float(high)}
