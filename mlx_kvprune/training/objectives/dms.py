"""Dynamic memory sparsification: a token is evicted where its gate's number is positive, a window later (arXiv 2506.05345).

Training draws ``z = gate + logistic noise``. A token's logits fall by ``log(1 - sigmoid(z / heat))`` (Gumbel-sigmoid), which
leaves it a little weight, so that what goes can come back; it counts as gone where ``z > 0`` (straight-through). The share that
goes is led along ``1 - 1 / c``, with ``c`` from 1 to ``Recipe.compression``. The heat is 0.3, where the paper has 0.1.
"""

from __future__ import annotations

import mlx.core as mx

from mlx_kvprune.training.bias import Bias
from mlx_kvprune.training.objective import dropped_biases, outside
from mlx_kvprune.training.objectives.base import Raws
from mlx_kvprune.training.recipe import Example, Recipe, ramp

HEAT = 0.3
EPS = 1e-4  # above what ``student`` leaves out: what is dropped learns as if it were there
LED = 0.8  # share of the training after which the compression is what was asked for


def switched(soft: mx.array, least: float = 0.5) -> mx.array:
    """One where ``soft`` is at least that much, else zero, with the gradient of ``soft`` (straight-through)."""
    return (soft >= least).astype(mx.float32) + soft - mx.stop_gradient(soft)


def noisy(raws: Raws, recipe: Recipe, step: int) -> list[mx.array]:
    """Gates with logistic noise, the same for the same step."""
    keys = mx.random.split(mx.random.key(1_000_003 * recipe.seed + step), len(raws))
    lots = [mx.random.uniform(1e-6, 1 - 1e-6, raw.shape, key=key) for raw, key in zip(raws, keys, strict=True)]
    return [raw + mx.log(lot) - mx.log1p(-lot) for raw, lot in zip(raws, lots, strict=True)]


def biases(raws: Raws, example: Example, recipe: Recipe, step: int) -> list[Bias]:
    """``log(1 - sigmoid(z / heat))`` for keys older than the window."""
    drops = [mx.log(mx.sigmoid(-z / HEAT) + EPS) for z in noisy(raws, recipe, step)]
    return dropped_biases(drops, example.start, example.length, example.bounds)


def held_beyond(raws: Raws, example: Example, recipe: Recipe, step: int) -> mx.array:
    """What is held of the tokens outside the window above what the compression allows."""
    compression = 1 + (recipe.compression - 1) * ramp(step, recipe, 0.0, LED)
    gone = [outside(switched(mx.sigmoid(z / HEAT)), example.bounds) for z in noisy(raws, recipe, step)]
    return mx.maximum(1 - 1 / compression - mx.concatenate(gone).mean(), 0.0)
