"""Gates trained end to end: the student's output against the full cache's, through the model, which stays as it is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from mlx_kvprune.gates import Gates
from mlx_kvprune.gates.structure import worth
from mlx_kvprune.training.bias import Bias
from mlx_kvprune.training.objective import Bounds, budget_biases, divergence, surprisal
from mlx_kvprune.training.objectives import OBJECTIVES, Level
from mlx_kvprune.training.reading import SEGMENT, Reading
from mlx_kvprune.training.recipe import Example, Recipe, bounds_of, drawn, temperature
from mlx_kvprune.training.student import run
from mlx_kvprune.training.whitening import Whitening

__all__ = ["Distiller", "Recipe", "held_out", "loss_of", "temperature"]

TIE = 1e-5  # by which each token's score is above that of the one before, where scores do not age
SHARES = (4, 8, 16)  # of the text, by which quality is measured
GATES, OPTIMIZER = "gates.", "optimizer."  # prefixes of a checkpoint's arrays


def raws_of(gates: Gates, reading: Reading, whitening: Whitening, stop: int) -> list[mx.array]:
    """What the gates say of the first ``stop`` tokens, of each layer ``(H_kv, stop)``."""
    return [gates(i, whitening(i, layer.x[None, :stop]))[0] for i, layer in enumerate(reading.layers)]


def loss_of(
    gates: Gates, model: nn.Module, example: Example, whitening: Whitening, recipe: Recipe, step: int
) -> tuple[mx.array, mx.array]:
    """What is minimised, and the divergence alone."""
    objective, reading, start, length = OBJECTIVES[recipe.target], example.reading, example.start, example.length
    raws = raws_of(gates, reading, whitening, start + length)
    logits = run(model, reading, start, length, objective.biases(raws, example, recipe, step))
    total, kl = output_loss(logits, example, recipe)
    if objective.penalty and recipe.capacity:
        total = total + recipe.capacity * objective.penalty(raws, example, recipe, step)
    return total, kl


def output_loss(logits: mx.array, example: Example, recipe: Recipe) -> tuple[mx.array, mx.array]:
    """Divergence from the full cache, and the next token's loss if it counts; and the divergence alone.

    With ``Recipe.quality`` only the divergence beyond it counts, as a multiple of it.
    """
    reading, start, length = example.reading, example.start, logits.shape[0]
    kl = divergence(logits, reading.top[start : start + length], reading.top_ids[start : start + length])
    counted = mx.maximum(kl / recipe.quality - 1, 0.0) if recipe.quality else kl
    if not recipe.surprisal:
        return counted, kl
    targets = mx.array(reading.tokens[start + 1 : start + length])
    return counted + recipe.surprisal * surprisal(logits[: length - 1], targets), kl


def scores_of(raws: Sequence[mx.array], recipe: Recipe) -> list[mx.array]:
    """What tokens are ranked by."""
    if recipe.ageing:
        return [worth(raw) for raw in raws]
    newer = TIE * mx.arange(raws[0].shape[1])
    return [(-raw if recipe.falling else raw) + newer for raw in raws]


def held_out(
    gates: Gates, model: nn.Module, readings: Sequence[Reading], whitening: Whitening, recipe: Recipe
) -> dict[str, float]:
    """KL of the last segment of each reading at 1/4, 1/8 and 1/16, as the cache evicts: mean over readings."""

    def kl(reading: Reading, bounds: Bounds) -> float:
        start = len(reading.tokens) - SEGMENT
        scores = scores_of(raws_of(gates, reading, whitening, len(reading.tokens)), recipe)
        return held_out_kl(model, reading, budget_biases(scores, start, SEGMENT, bounds, 0.0))

    return by_share(kl, readings, recipe)


def by_share(kl: Callable[[Reading, Bounds], float], readings: Sequence[Reading], recipe: Recipe) -> dict[str, float]:
    """Means over readings, by the share of a text that its budget is; short texts have the same budget for several."""
    shares = {f"1/{n}": bounds_of(len(readings[0].tokens) // n, recipe) for n in SHARES}
    means = {bounds: float(np.mean([kl(reading, bounds) for reading in readings])) for bounds in set(shares.values())}
    return {share: means[bounds] for share, bounds in shares.items()}


def held_out_kl(model: nn.Module, reading: Reading, biases: Sequence[Bias]) -> float:
    """KL of a reading's last segment, with these biases."""
    start = len(reading.tokens) - SEGMENT
    kl: Any = divergence(run(model, reading, start, SEGMENT, biases), reading.top[start:], reading.top_ids[start:])
    return float(kl.item())


def optimizer_for(recipe: Recipe, times: float = 1.0) -> optim.Optimizer:
    """AdamW whose rate rises for a tenth of the steps, at most 50, and falls as a cosine.

    Biases, one a head, have a rate of their own: they say how much each head gets beside the others, which is most of what
    there is to learn; at their rate the other weights lose what the first stage found.
    """
    warmup = min(50, max(1, recipe.steps // 10))

    def adam(rate: float) -> optim.AdamW:
        rise, fall = optim.linear_schedule(rate / 10, rate, warmup), optim.cosine_decay(rate, recipe.steps)
        schedule = optim.join_schedules([rise, fall], [warmup])
        return optim.AdamW(learning_rate=schedule, weight_decay=0.0, betas=[0.9, 0.98])

    if not recipe.bias_rate:
        return adam(recipe.rate * times)
    is_bias = lambda name, x: name.endswith(".bias")
    return optim.MultiOptimizer([adam(recipe.bias_rate * times), adam(recipe.rate * times)], [is_bias])


class Distiller:
    """Takes steps, one at a time, so that whoever calls can look, stop and save between them."""

    times = 1.0  # the recipe's rate that gates learn with

    def __init__(self, gates: Gates, model: nn.Module, whitening: Whitening, recipe: Recipe):
        self.gates, self.model, self.whitening, self.recipe = gates, model, whitening, recipe
        self.done = 0
        self.optimizer = optimizer_for(recipe, self.times)

    def begin(self, readings: Sequence[Reading], made_for: str = "") -> Level:
        """Bring gates to where this training starts; returns what was done.

        Args:
            readings: texts that say what that takes.
            made_for: the method that another training made them for, if one did.
        """
        level = OBJECTIVES[self.recipe.target].level
        if level is None:
            return Level()
        raws = [raws_of(self.gates, reading, self.whitening, len(reading.tokens)) for reading in readings]
        found = level(raws, self.recipe, made_for)
        self.gates.move(found.scale, found.added)
        return found

    def step(self, readings: Sequence[Reading]) -> tuple[float, float]:
        """One step on a segment of one of the readings; returns loss and divergence."""
        rng = np.random.default_rng((self.recipe.seed, self.done))
        example = drawn(readings, self.recipe, rng)
        loss = lambda gates: loss_of(gates, self.model, example, self.whitening, self.recipe, self.done)
        (value, kl), gradient = nn.value_and_grad(self.gates, loss)(self.gates)
        gradient, _ = optim.clip_grad_norm(gradient, 0.5)
        self.optimizer.update(self.gates, gradient)
        mx.eval(self.gates.parameters(), self.optimizer.state, value, kl)
        self.done += 1
        return float(value.item()), float(kl.item())

    def shorten(self, steps: int) -> None:
        """Let rates fall, and all else that goes by steps, as if this training had so many."""
        self.recipe = replace(self.recipe, steps=steps)
        self.optimizer = with_state_of(self.optimizer, optimizer_for(self.recipe, self.times), self.gates)

    def held_out(self, readings: Sequence[Reading]) -> dict[str, float]:
        """``held_out`` of the gates as they are."""
        return held_out(self.gates, self.model, readings, self.whitening, self.recipe)

    @property
    def learned(self) -> dict[str, mx.array]:
        """All that was trained, by name."""
        return prefixed(GATES, self.gates.arrays())

    @property
    def state(self) -> dict[str, mx.array]:
        """All that another needs to go on; arrays are never written to, so that it stays as it is."""
        return self.learned | prefixed(OPTIMIZER, flat(self.optimizer.state))

    def restore(self, arrays: dict[str, mx.array], done: int) -> None:
        """Go on from a ``state`` after ``done`` steps."""
        self.gates.restore(under(GATES, arrays))
        restore_optimizer(self.optimizer, self.gates, under(OPTIMIZER, arrays))
        self.done = done

    def restore_model(self, arrays: dict[str, mx.array]) -> None:
        """The model learned nothing."""

    def with_gates(self, gates: Gates, whitening: Whitening) -> Distiller:
        """The same with other gates."""
        return type(self)(gates, self.model, whitening, self.recipe)


def restore_optimizer(optimizer: optim.Optimizer, module: nn.Module, arrays: dict[str, mx.array]) -> None:
    """Give an optimizer the state that it had."""
    optimizer.init(module.trainable_parameters())
    optimizer.state = tree_unflatten(list(arrays.items()))


def with_state_of(old: optim.Optimizer, new: optim.Optimizer, module: nn.Module) -> optim.Optimizer:
    """The new optimizer, which goes on where the old one stands."""
    if (state := flat(old.state)) and any(name.endswith(".m") for name in state):
        restore_optimizer(new, module, state)
    return new


def flat(tree: Any) -> dict[str, mx.array]:
    """The arrays of a tree by name."""
    return dict(tree_flatten(tree))


def prefixed(prefix: str, arrays: dict[str, mx.array]) -> dict[str, mx.array]:
    """The same under longer names."""
    return {prefix + name: x for name, x in arrays.items()}


def under(prefix: str, arrays: dict[str, mx.array]) -> dict[str, mx.array]:
    """Those with a prefix, without it."""
    return {name.removeprefix(prefix): x for name, x in arrays.items() if name.startswith(prefix)}
