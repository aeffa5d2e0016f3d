"""SP-KV's write gate: ``u = sigmoid(gate(h))``, and ``log(u + eps)`` on the logits of keys older than the window.

As published the model learns with its gates, from the next token alone (``joint``). A model that stays as it is hardly makes
them sparse, so that a capacity term leads their mean to a density. In the last quarter ``(1 - a) u + a [u >= tau]`` with ``a``
from 0 to 1 takes the place of ``u``, and what training saw is what the cache will do.

A density makes all texts alike. ``Recipe.quality`` asks for a divergence instead: the output counts only where it is beyond,
and all that is written costs something, so that texts that need little get little. Gates are hard from the start then, with
logistic noise that ends with the training: where nothing holds them up, soft ones sink until hardly any is above the threshold,
and the model reads through them all the same.

Gates of ``retention`` are a good start. Their number is about the log of a token's lifetime, for ``beta = sigmoid(number)``,
on one scale for all heads, and what lives long is worth writing.
"""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
import numpy as np

from mlx_kvprune.training.bias import Bias
from mlx_kvprune.training.objective import Bounds, dropped_biases, outside
from mlx_kvprune.training.objectives.base import Level, Raws
from mlx_kvprune.training.objectives.dms import EPS, HEAT, noisy, switched
from mlx_kvprune.training.recipe import Example, Recipe, ramp

TAU = 0.5
LAST = 0.75  # share of the training after which gates become hard
FIRST = 0.2  # share that is written where gates of ``retention`` are the start
SPREAD = 2.0  # by which their numbers are drawn apart: noise of 1.8 must not undo an order in which they are 1.7 apart
LED = 0.5  # share of the training after which the density is what was asked for


def written(raw: mx.array, recipe: Recipe, step: int) -> mx.array:
    """``u``, and towards the end what it becomes at the threshold, whose gradient is that of ``u`` (straight-through)."""
    u = mx.sigmoid(raw)
    a = ramp(step, recipe, LAST, 1.0)
    return (1 - a) * u + a * switched(u, TAU)


def drawn(raws: Raws, recipe: Recipe, step: int) -> list[mx.array]:
    """Zero or one, of each layer ``(H_kv, S)``: one with the chance ``u``, and at the end where ``u`` is at the threshold; the
    gradient is a sigmoid's.
    """
    still = 1 - ramp(step, recipe, LAST, 1.0)
    pairs = zip(raws, noisy(raws, recipe, step), strict=True)
    return [switched(mx.sigmoid((raw + still * (z - raw)) / HEAT), TAU) for raw, z in pairs]


def biases(raws: Raws, example: Example, recipe: Recipe, step: int) -> list[Bias]:
    """``log(u + eps)`` for keys older than the window."""
    shares = drawn(raws, recipe, step) if recipe.quality else [written(raw, recipe, step) for raw in raws]
    drops = [mx.log(x + EPS) for x in shares]
    return dropped_biases(drops, example.start, example.length, example.bounds)


def written_beyond(raws: Raws, example: Example, recipe: Recipe, step: int) -> mx.array:
    """What the mean of ``u`` is above the density, which falls from one in the first half; with a quality, that mean."""
    if recipe.quality:
        return mx.concatenate([outside(mx.sigmoid(raw), example.bounds) for raw in raws]).mean()
    mean = mx.concatenate([outside(written(raw, recipe, step), example.bounds) for raw in raws]).mean()
    allowed = 1 + (recipe.density - 1) * ramp(step, recipe, 0.0, LED)
    return mx.maximum(mean - allowed, 0.0)


def level(readings: Sequence[Raws], recipe: Recipe, made_for: str = "spkv") -> Level:
    """Where gates of ``retention`` start: those of the longest lifetimes, a ``FIRST`` of all, are written."""
    if made_for != "retention":
        return Level()
    numbers = np.concatenate([np.array(raw)[:, Bounds.n_sink :].reshape(-1) for raws in readings for raw in raws])
    least = float(np.quantile(numbers, 1 - FIRST))
    if not np.isfinite(least):
        return Level()
    why = f"of gates of retention, the {FIRST:.0%} that live longest are written where training starts"
    return Level(SPREAD, -SPREAD * least, why)
