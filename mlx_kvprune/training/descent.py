"""Gates fitted to readings layer by layer, without the model: shuffled pieces, AdamW, a few epochs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np

from mlx_kvprune.gates import Gates
from mlx_kvprune.training.reading import LayerReading, Reading
from mlx_kvprune.training.whitening import Whitening

Tick = Callable[[int, float], None]  # steps done, the loss
Loss = Callable[
    [int, mx.array, LayerReading, slice, int], mx.array
]  # (layer, raw (H_kv, n), its reading, of, which text)


@dataclass(frozen=True)
class Descent:
    """How: passes over the readings, the highest rate of learning, tokens of a piece, what the shuffling starts from."""

    epochs: int = 3
    rate: float = 2e-3
    batch: int = 512
    seed: int = 0

    def steps(self, readings: Sequence[Reading]) -> int:
        return self.epochs * len(self.pieces(readings))

    def pieces(self, readings: Sequence[Reading]) -> list[tuple[int, int]]:
        """Which text, and where it starts."""
        return [(r, s) for r in range(len(readings)) for s in range(0, len(readings[r].tokens), self.batch)]


def descend(
    gates: Gates,
    readings: Sequence[Reading],
    whitening: Whitening,
    loss: Loss,
    how: Descent,
    n_sink: int = 4,
    tick: Tick | None = None,
) -> float:
    """Minimise the mean over layers of ``loss``; returns its mean over the last epoch."""
    rng, losses, pieces = np.random.default_rng(how.seed), [], how.pieces(readings)
    steps = how.steps(readings)
    optimizer = optim.AdamW(learning_rate=optim.cosine_decay(how.rate, steps), weight_decay=0.0)

    def total(gates: Gates, r: int, start: int) -> mx.array:
        cut = slice(max(n_sink, start), start + how.batch)
        each = (
            loss(i, gates(i, whitening(i, layer.x[None, cut]))[0], layer, cut, r)
            for i, layer in enumerate(readings[r].layers)
        )
        return sum(each, mx.array(0.0)) / len(readings[r].layers)

    step = nn.value_and_grad(gates, total)
    for done in range(steps):
        if done % len(pieces) == 0:
            rng.shuffle(pieces)
        value, gradient = step(gates, *pieces[done % len(pieces)])
        gradient, _ = optim.clip_grad_norm(gradient, 1.0)
        optimizer.update(gates, gradient)
        mx.eval(gates.parameters(), optimizer.state, value)
        losses.append(float(value.item()))
        if tick:
            tick(1, losses[-1])
    return float(np.mean(losses[-len(pieces) :]))
