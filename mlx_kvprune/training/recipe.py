"""How gates are trained, and what one step of it is shown."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mlx_kvprune.policy import GLOBAL_PART, PART_OF_BUDGET
from mlx_kvprune.training.objective import Bounds
from mlx_kvprune.training.reading import SEGMENT, Reading


@dataclass(frozen=True)
class Recipe:
    """How gates are trained.

    Attributes:
        target: one of ``objectives.OBJECTIVES``.
        steps: of the optimizer, a segment each.
        rate: of learning at its highest.
        bias_rate: of one number a head, its bias; zero for the same rate.
        warm: temperature of the first step, ``budget`` only; it falls geometrically to ``cold``.
        cold: of the last.
        shares: budgets as shares of the text, drawn between these, evenly in the logarithm.
        capacity: weight of the capacity loss; ``budget`` has none.
        surprisal: weight of the next token's loss.
        density: share of the tokens outside the window that ``spkv`` may write.
        quality: divergence in nats that a text may cost, ``spkv``: as little as keeps it is written; 0: ``density`` instead.
        compression: that ``dms`` is led to.
        scope: who competes for a budget (see ``Bounds``).
        ageing: scores fall as tokens grow older.
        falling: the gate's number is larger for tokens that are worth less, ``dms``.
        window: newest tokens, never evicted.
        seed: of what is drawn.
    """

    target: str = "decay"
    steps: int = 600
    rate: float = 3e-4
    bias_rate: float = 1e-2
    warm: float = 0.4
    cold: float = 0.15
    shares: tuple[float, float] = (1 / 16, 1 / 3)
    capacity: float = 1.0
    surprisal: float = 0.0
    density: float = 1 / 8
    quality: float = 0.0
    compression: float = 16.0
    scope: str = "global"
    ageing: bool = True
    falling: bool = False
    window: int = 64
    seed: int = 0


@dataclass(frozen=True)
class Example:
    """A segment of a reading, and the budget that it is read with."""

    reading: Reading
    start: int
    bounds: Bounds
    most: int = SEGMENT

    @property
    def length(self) -> int:
        """Tokens of the segment."""
        return min(self.most, len(self.reading.tokens) - self.start)


def bounds_of(slots: int, recipe: Recipe) -> Bounds:
    """The student's budget; the block is the one that the cache takes."""
    part = GLOBAL_PART if recipe.scope == "global" else PART_OF_BUDGET
    block = max(32, min(128, slots // part // 32 * 32))
    least = recipe.window + block + 4 + 8
    return Bounds(max(slots, least), recipe.window, block, scope=recipe.scope, ageing=recipe.ageing)


def drawn(readings: Sequence[Reading], recipe: Recipe, rng: np.random.Generator, segment: int = SEGMENT) -> Example:
    """A segment of one of the readings, late enough that something is evicted, and a budget for it."""
    reading = readings[int(rng.integers(len(readings)))]
    last = len(reading.tokens) // segment - 1
    start = segment * int(rng.integers(min(2, last), last + 1))
    low, high = np.log(recipe.shares)
    slots = int((start + segment) * math.exp(rng.uniform(low, high)))
    return Example(reading, start, bounds_of(slots, recipe))


def temperature(step: int, recipe: Recipe) -> float:
    """Falls geometrically, and stays at its lowest for the last quarter."""
    done = min(1.0, step / max(1, 0.75 * recipe.steps))
    return recipe.warm * (recipe.cold / recipe.warm) ** done


def ramp(step: int, recipe: Recipe, start: float, stop: float) -> float:
    """From 0 to 1 between two shares of the training."""
    return min(1.0, max(0.0, (step / max(1, recipe.steps) - start) / (stop - start)))
