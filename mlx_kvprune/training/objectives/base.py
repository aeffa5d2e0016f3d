"""The two halves of an objective."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import mlx.core as mx

from mlx_kvprune.training.bias import Bias
from mlx_kvprune.training.recipe import Example, Recipe

Raws = Sequence[mx.array]  # what the gates say, of each layer (H_kv, start + length)


@dataclass(frozen=True)
class Level:
    """How gates that another training made are brought to where this one starts: ``scale * number + added``.

    Attributes:
        why: what that reaches, in words; empty if they stay as they are.
    """

    scale: float = 1.0
    added: float = 0.0
    why: str = ""


@dataclass(frozen=True)
class Objective:
    """How gates act on the student, and what they may hold.

    Attributes:
        biases: ``(raws, example, recipe, step)`` to the bias of each layer.
        penalty: the same to a number that is added to the loss, times ``Recipe.capacity``; None for nothing.
        settled: share of the training after which it asks for what it asks at the end; gates from before are not the best.
        level: ``(raws of each reading, recipe, method that the gates were trained for)`` to where they start; None for there.
    """

    biases: Callable[[Raws, Example, Recipe, int], list[Bias]]
    penalty: Callable[[Raws, Example, Recipe, int], mx.array] | None = None
    settled: float = 0.0
    level: Callable[[Sequence[Raws], Recipe, str], Level] | None = None
