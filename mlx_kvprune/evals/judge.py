"""Rows of question tasks: exact matches with intervals, the answer's log-probability, what is left of the full cache's."""

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
    pairs = [pair for unit in units for pair in paired(unit["result"]["outcomes"], full.get(unit["item"], []), wording)]
    outcomes, against = [x for x, _ in pairs], [y for _, y in pairs if y is not None]
    solved, solved_full = (sum(x["exact"] for x in some) for some in (outcomes, against))
    kept = sum(bool(x["exact"] and y and y["exact"]) for x, y in pairs)
    low, high = wilson(solved, len(outcomes))
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
        "kept": kept,
        "kept_low": wilson(kept, solved_full)[0],
        "kept_high": wilson(kept, solved_full)[1],
        "counts": bool(against) and solved_full >= COUNTS_FROM * len(against),
        **mean_interval("logprob", [x["logprob"] for x in outcomes]),
        "prompt_tokens": max(x["prompt_tokens"] for x in outcomes),
        **{name: max(x[name] for x in outcomes) for name in SIZES},
        "outcomes": [{k: v for k, v in x.items() if k not in SIZES} for x in outcomes],
    }


def paired(outcomes: Sequence[Outcome], full: Sequence[Outcome], wording: str) -> list[tuple[Outcome, Outcome | None]]:
    """The outcomes of one wording with those of the full cache to the same questions, None where it has none."""
    mine, theirs = ([x for x in some if x["wording"] == wording] for some in (outcomes, full))
    return [(x, theirs[i] if i < len(theirs) else None) for i, x in enumerate(mine)]


def wilson(solved: int, n: int) -> tuple[float, float]:
    """The 95% score interval of a share: Wilson 1927; (0, 1) of nothing."""
    if not n:
        return 0.0, 1.0
    p, z2 = solved / n, Z * Z
    middle, width = (p + z2 / (2 * n)) / (1 + z2 / n), Z * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n)) / (1 + z2 / n)
    return max(0.0, middle - width), min(1.0, middle + width)


def mean_interval(name: str, values: Iterable[float], draws: int = 2000, seed: int = 0) -> dict[str, float]:
    """Fields for the mean of independent values and its 95% bootstrap interval."""
    x = np.array(list(values), float)
    picked = np.random.default_rng(seed).integers(len(x), size=(draws, len(x)))
    low, high = np.quantile(x[picked].mean(axis=1), [0.025, 0.975])
    return {name: float(x.mean()), f"{name}_low": float(low), f"{name}_high": float(high)}
