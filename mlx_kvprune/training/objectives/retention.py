"""Retention gates, by a budget or by decay (see ``objective``)."""

from __future__ import annotations

import mlx.core as mx

from mlx_kvprune.gates.structure import worth
from mlx_kvprune.training.bias import Bias
from mlx_kvprune.training.objective import budget_biases, decay_biases, held_by_decay
from mlx_kvprune.training.objectives.base import Raws
from mlx_kvprune.training.recipe import Example, Recipe, temperature


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
