"""Retention gates, by a budget or by decay (see ``objective``)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import mlx.core as mx
import numpy as np

from mlx_kvprune.gates.structure import worth
from mlx_kvprune.training.bias import Bias
from mlx_kvprune.training.objective import budget_biases, decay_biases, held_anyway, held_by_decay
from mlx_kvprune.training.objectives.base import Level, Raws
from mlx_kvprune.training.recipe import Example, Recipe, bounds_of, temperature

REACH = 30.0  # by which biases are moved at most
WHY = "decayed weights sum to a budget where training starts"


def budget(raws: Raws, example: Example, recipe: Recipe, step: int) -> list[Bias]:
    """Ours: the chance that a slot is still held within the budget, softer at first."""
    heat = temperature(step, recipe)
    return budget_biases([worth(raw) for raw in raws], example.start, example.length, example.bounds, heat)


def decay(raws: Raws, example: Example, recipe: Recipe, step: int) -> list[Bias]:
    """TRIM-KV's geometric decay."""
    return decay_biases(raws, example.start, example.length, example.bounds)


def held(raws: Raws, example: Example, recipe: Recipe, step: int) -> mx.array:
    """TRIM-KV's capacity loss."""
    return held_by_decay(raws, example.start, example.length, example.bounds)


def level(readings: Sequence[Raws], recipe: Recipe, made_for: str = "retention") -> Level:
    """Biases moved so that at the end of these texts decayed weights sum to a budget in the middle of those drawn.

    Gates that were trained on ranks alone, or on texts of another length, may decay at any speed; those that hardly decay learn
    little. They stay where no number does it.
    """
    share = math.exp(np.log(recipe.shares).mean())
    heads = [np.concatenate([np.array(raw, np.float64) for raw in raws]) for raws in readings]  # (heads, T)
    budgets = [bounds_of(int(share * raw.shape[1]), recipe) for raw in heads]
    ages = [np.arange(raw.shape[1] - 1, -1, -1, dtype=np.float32) for raw in heads]
    anyway = [np.array(held_anyway(mx.array(age[None]), bounds)) for age, bounds in zip(ages, budgets, strict=True)]
    aim = float(np.mean([bounds.slots for bounds in budgets]))

    def kept(added: float) -> float:
        """What the weights of a head sum to, mean over heads and texts."""
        decays = [np.exp(-age * np.logaddexp(0.0, -(raw + added))) for raw, age in zip(heads, ages, strict=True)]
        return float(np.mean([np.where(a, 1.0, x).sum(axis=1).mean() for a, x in zip(anyway, decays, strict=True)]))

    low, high = -REACH, REACH
    finite = all(np.isfinite(raw).all() for raw in heads)
    if not (finite and kept(low) < aim < kept(high)):  # some heads keep everything, or nothing, whatever is added
        return Level()
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if kept(middle) < aim else (low, middle)
    return Level(added=(low + high) / 2, why=WHY)
