"""The two halves of an objective."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import mlx.core as mx

from mlx_kvprune.training.bias import Bias
from mlx_kvprune.training.recipe import Example, Recipe

Raws = Sequence[mx.array]  # what the gates say, of each layer (H_kv, start + length)


@dataclass(frozen=True)
class Objective:
    """How gates act on the student, and what they may hold.

    Attributes:
        biases: ``(raws, example, recipe, step)`` to the bias of each layer.
        penalty: the same to a number that is added to the loss, times ``Recipe.capacity``; None for nothing.
        settled: share of the training after which it asks for what it asks at the end; gates from before are not the best.
        level: ``(raws of each reading, recipe)`` to what is added to all biases before the first step; None for nothing.
    """

    biases: Callable[[Raws, Example, Recipe, int], list[Bias]]
    penalty: Callable[[Raws, Example, Recipe, int], mx.array] | None = None
    settled: float = 0.0
    level: Callable[[Sequence[Raws], Recipe], float] | None = None
