"""Gates and their model trained together, as SP-KV is published: low-rank adapters, or all of the model's weights.

The whole text passes through the student, without a context that the full cache read, for the keys change as the model does.
The gates learn five times as fast as the model, and in the last quarter, where they are made hard, not at all.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_unflatten

from mlx_kvprune.gates import Gates
from mlx_kvprune.training.bias import Bias
from mlx_kvprune.training.distill import (
    Distiller,
    by_share,
    flat,
    optimizer_for,
    output_loss,
    prefixed,
    restore_optimizer,
    scores_of,
    under,
    with_state_of,
)
from mlx_kvprune.training.objective import Bounds, budget_biases, divergence
from mlx_kvprune.training.objectives import OBJECTIVES
from mlx_kvprune.training.objectives.spkv import LAST
from mlx_kvprune.training.reading import SEGMENT, Reading
from mlx_kvprune.training.recipe import Example, Recipe, bounds_of
from mlx_kvprune.training.student import run_live
from mlx_kvprune.training.whitening import Whitening

FASTER = 5.0  # how much faster gates learn than their model
MODEL, MODEL_OPTIMIZER = "model.", "model_optimizer."
SCALE = 20.0  # of low-rank adapters, as in mlx-lm


class Pair(nn.Module):
    """Both that learn."""

    def __init__(self, gates: Gates, model: nn.Module):
        super().__init__()
        self.gates, self.model = gates, model


def let_learn(model: nn.Module, rank: int, seed: int = 0) -> None:
    """Let all of a model's weights learn, or adapters of a rank that are put in, whose first numbers the seed decides."""
    if not rank:
        model.unfreeze()
        return
    from mlx_lm.tuner.utils import linear_to_lora_layers

    model.freeze()
    mx.random.seed(seed)  # mlx-lm draws from MLX's own state
    linear_to_lora_layers(model, n_layers(model), _lora(rank))


def check_learns(model: nn.Module, rank: int) -> None:
    """Refuse a model whose own weights cannot learn.

    Raises:
        ValueError: they are quantized, and no adapters were asked for.
    """
    if not rank and any(getattr(module, "bits", None) for _, module in model.named_modules()):
        raise ValueError(
            "[full] quantized weights cannot learn; got a quantized model; try --lora 8, or --dtype float32"
        )


def n_layers(model: Any) -> int:
    return len(model.layers)


def _lora(rank: int) -> dict[str, float]:
    return {"rank": rank, "scale": SCALE, "dropout": 0.0}


def save_adapters(folder: Path, model: nn.Module, rank: int) -> None:
    """Write what the model learned as mlx-lm writes adapters: ``mlx_lm.load(path, adapter_path=folder)`` reads them."""
    folder.mkdir(parents=True, exist_ok=True)
    about = {"fine_tune_type": "lora" if rank else "full", "num_layers": n_layers(model)}
    about |= {"lora_parameters": _lora(rank)} if rank else {}
    (folder / "adapter_config.json").write_text(json.dumps(about, indent=2))
    mx.save_safetensors(str(folder / "adapters.safetensors"), flat(model.trainable_parameters()))


class JointDistiller(Distiller):
    """Steps of gates and model; ``Recipe.rate`` is the model's."""

    times = FASTER

    def __init__(self, gates: Gates, model: nn.Module, whitening: Whitening, recipe: Recipe):
        super().__init__(gates, model, whitening, recipe)
        self.pair = Pair(gates, model)
        self.model_optimizer = optimizer_for(recipe)

    def step(self, readings: Sequence[Reading]) -> tuple[float, float]:
        rng = np.random.default_rng((self.recipe.seed, self.done))
        reading = readings[int(rng.integers(len(readings)))]
        example = Example(reading, 0, bounds_of(len(reading.tokens), self.recipe), most=len(reading.tokens))
        (value, kl), gradient = nn.value_and_grad(self.pair, lambda _: self._loss(example))(self.pair)
        gradient, _ = optim.clip_grad_norm(gradient, 0.5)
        if self.done < LAST * self.recipe.steps:
            self.optimizer.update(self.gates, gradient["gates"])
        self.model_optimizer.update(self.model, gradient["model"])
        mx.eval(self.pair.trainable_parameters(), self.optimizer.state, self.model_optimizer.state, value, kl)
        self.done += 1
        return float(value.item()), float(kl.item())

    def _loss(self, example: Example) -> tuple[mx.array, mx.array]:
        objective, recipe, step = OBJECTIVES[self.recipe.target], self.recipe, self.done
        raws: list[mx.array] = []
        biases = lambda raw: objective.biases([raw], example, recipe, step)[0]
        logits = self._live(mx.array(example.reading.tokens), biases, raws)
        total, kl = output_loss(logits, example, recipe)
        if objective.penalty and recipe.capacity:
            total = total + recipe.capacity * objective.penalty(raws, example, recipe, step)
        return total, kl

    def _live(self, tokens: mx.array, biases: Callable[[mx.array], Bias], raws: list[mx.array]) -> mx.array:
        def bias_of(i: int, x: mx.array) -> Bias:
            raws.append(self.gates(i, self.whitening(i, x[None]))[0])
            return biases(raws[-1])

        return run_live(self.model, tokens, bias_of)

    def shorten(self, steps: int) -> None:
        super().shorten(steps)
        self.model_optimizer = with_state_of(self.model_optimizer, optimizer_for(self.recipe), self.model)

    def held_out(self, readings: Sequence[Reading]) -> dict[str, float]:
        """KL from the model as it was, with the full cache, of the last segment; budgets of each layer."""

        def kl(reading: Reading, bounds: Bounds) -> float:
            length, last = len(reading.tokens), len(reading.tokens) - SEGMENT
            biases = lambda raw: budget_biases(scores_of([raw], self.recipe), 0, length, bounds, 0.0)[0]
            logits = self._live(mx.array(reading.tokens), biases, [])[last:]
            found: Any = divergence(logits, reading.top[last:], reading.top_ids[last:])
            return float(found.item())

        return by_share(kl, readings, self.recipe)

    @property
    def learned(self) -> dict[str, mx.array]:
        return super().learned | prefixed(MODEL, flat(self.model.trainable_parameters()))

    @property
    def state(self) -> dict[str, mx.array]:
        return super().state | prefixed(MODEL_OPTIMIZER, flat(self.model_optimizer.state))

    def restore(self, arrays: dict[str, mx.array], done: int) -> None:
        super().restore(arrays, done)
        self.restore_model(arrays)
        restore_optimizer(self.model_optimizer, self.model, under(MODEL_OPTIMIZER, arrays))

    def restore_model(self, arrays: dict[str, mx.array]) -> None:
        """Give the model what it had learned."""
        self.model.update(tree_unflatten(list(under(MODEL, arrays).items())))
