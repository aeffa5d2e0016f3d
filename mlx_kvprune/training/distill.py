"""Gates trained end to end: the student's output against the full cache's, through the model, which stays as it is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np

from mlx_kvprune.gates import Gates
from mlx_kvprune.training.objective import (
    Bounds,
    budget_biases,
    decay_biases,
    divergence,
    held_by_decay,
    spared,
    surprisal,
)
from mlx_kvprune.training.reading import SEGMENT, Reading
from mlx_kvprune.training.student import run
from mlx_kvprune.training.whitening import Whitening

HARD = 0.02  # a temperature at which the student is all but the cache


@dataclass(frozen=True)
class Recipe:
    """How gates are trained.

    Attributes:
        target: ``budget`` or ``decay`` (see ``objective``).
        steps: of the optimizer, a segment each.
        rate: of learning at its highest, of the weights.
        bias_rate: of the biases: they say what a head gets beside the others, and are few.
        warm: temperature of the first step, ``budget`` only; it falls geometrically to ``cold``.
        cold: of the last.
        shares: budgets as shares of the text, drawn between these, evenly in the logarithm.
        capacity: weight of the capacity loss, ``decay`` only.
        surprisal: weight of the next token's loss.
        shared: one budget over all layers and heads.
        window: newest tokens, never evicted.
        seed: of what is drawn.
    """

    target: str = "budget"
    steps: int = 600
    rate: float = 3e-4
    bias_rate: float = 2e-2
    warm: float = 0.4
    cold: float = 0.15
    shares: tuple[float, float] = (1 / 16, 1 / 3)
    capacity: float = 1.0
    surprisal: float = 0.0
    shared: bool = True
    window: int = 16
    seed: int = 0


def bounds_of(slots: int, recipe: Recipe) -> Bounds:
    """The student's budget; the block is the one that the cache takes."""
    block = max(32, min(128, slots // 4 // 32 * 32))
    least = recipe.window + block + 4 + 8
    return Bounds(max(slots, least), recipe.window, block, shared=recipe.shared)


def raws_of(gates: Gates, reading: Reading, whitening: Whitening, stop: int) -> list[mx.array]:
    """What the gates say of the first ``stop`` tokens, of each layer ``(H_kv, stop)``."""
    return [gates(i, whitening(i, layer.x[None, :stop]))[0] for i, layer in enumerate(reading.layers)]


@dataclass(frozen=True)
class Example:
    """A segment of a reading, and the budget that it is read with."""

    reading: Reading
    start: int
    bounds: Bounds


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


def loss_of(
    gates: Gates, model: nn.Module, example: Example, whitening: Whitening, recipe: Recipe, heat: float
) -> tuple[mx.array, mx.array]:
    """What is minimised, and the divergence alone."""
    reading, start = example.reading, example.start
    length = min(SEGMENT, len(reading.tokens) - start)
    raws = raws_of(gates, reading, whitening, start + length)
    if recipe.target == "decay":
        biases = decay_biases(raws, start, length, example.bounds)
    else:
        biases = budget_biases(raws, start, length, example.bounds, heat)
    window = recipe.target == "budget"
    logits = run(model, reading, start, length, biases, spared(start, length, example.bounds, window))
    span = slice(start, start + length)
    kl = divergence(logits, reading.top[span], reading.top_ids[span])
    total = kl
    if recipe.target == "decay" and recipe.capacity:
        total = total + recipe.capacity * held_by_decay(raws, start, length, example.bounds)
    if recipe.surprisal:
        targets = mx.array(reading.tokens[start + 1 : start + length])
        total = total + recipe.surprisal * surprisal(logits[: length - 1], targets)
    return total, kl


def held_out(
    gates: Gates, model: nn.Module, readings: Sequence[Reading], whitening: Whitening, recipe: Recipe
) -> dict[str, float]:
    """KL of the last segment of each reading at 1/4, 1/8 and 1/16, all but hard: mean over readings."""
    found: dict[str, list[float]] = {}
    for reading in readings:
        start = len(reading.tokens) - SEGMENT
        raws = raws_of(gates, reading, whitening, len(reading.tokens))
        for share in (4, 8, 16):
            bounds = bounds_of(len(reading.tokens) // share, recipe)
            biases = budget_biases(raws, start, SEGMENT, bounds, HARD)
            logits = run(model, reading, start, SEGMENT, biases, spared(start, SEGMENT, bounds))
            kl = divergence(logits, reading.top[start:], reading.top_ids[start:])
            found.setdefault(f"1/{share}", []).append(float(kl.item()))
    return {share: float(np.mean(x)) for share, x in found.items()}


class Distiller:
    """Takes steps, one at a time, so that whoever calls can look, stop and save between them."""

    def __init__(self, gates: Gates, model: nn.Module, whitening: Whitening, recipe: Recipe):
        self.gates, self.model, self.whitening, self.recipe = gates, model, whitening, recipe
        self.done = 0
        warmup = min(50, max(1, recipe.steps // 10))
        rising = lambda rate: optim.linear_schedule(rate / 10, rate, warmup)
        rates = [
            optim.join_schedules([rising(rate), optim.cosine_decay(rate, recipe.steps)], [warmup])
            for rate in (recipe.bias_rate, recipe.rate)
        ]
        kinds = [optim.AdamW(learning_rate=rate, weight_decay=0.0, betas=[0.9, 0.98]) for rate in rates]
        self.optimizer = optim.MultiOptimizer(kinds, [lambda name, x: name.endswith(".bias")])

    def step(self, readings: Sequence[Reading]) -> tuple[float, float]:
        """One step on a segment of one of the readings; returns loss and divergence."""
        rng = np.random.default_rng((self.recipe.seed, self.done))
        example, heat = drawn(readings, self.recipe, rng), temperature(self.done, self.recipe)
        loss = lambda gates: loss_of(gates, self.model, example, self.whitening, self.recipe, heat)
        (value, kl), gradient = nn.value_and_grad(self.gates, loss)(self.gates)
        gradient, _ = optim.clip_grad_norm(gradient, 0.5)
        self.optimizer.update(self.gates, gradient)
        mx.eval(self.gates.parameters(), self.optimizer.state, value, kl)
        self.done += 1
        return float(value.item()), float(kl.item())
