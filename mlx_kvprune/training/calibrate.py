"""Thresholds that keep a promised share, and what gates cost on held-out texts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_kvprune.gates import Gates
from mlx_kvprune.gates.structure import structure
from mlx_kvprune.training import distill
from mlx_kvprune.training.methods import Method
from mlx_kvprune.training.objective import GONE, dropped_biases
from mlx_kvprune.training.reading import SEGMENT, Reading
from mlx_kvprune.training.recipe import Recipe, bounds_of
from mlx_kvprune.training.whitening import Whitening

DENSITIES = (2, 4, 8, 16)


def as_saved(gates: Gates) -> Gates:
    """Gates rounded as a gate file rounds them."""
    rounded = Gates(gates.shape)
    rounded.restore({name: x.astype(mx.float16) for name, x in gates.arrays().items()})
    return rounded


@dataclass(frozen=True)
class Quality:
    """Measures gates for inputs as they are, on held-out texts."""

    gates: Gates
    method: Method
    recipe: Recipe
    readings: Sequence[Reading]

    def scores(self, reading: Reading) -> list[mx.array]:
        """What the threshold is compared with, of each layer ``(H_kv, T)``."""
        raws = distill.raws_of(self.gates, reading, self.plain, len(reading.tokens))
        return [self.method.score(raw) for raw in raws]

    @property
    def plain(self) -> Whitening:
        return Whitening.none(self.gates.shape.widths)

    def outside(self, reading: Reading) -> np.ndarray:
        """Scores of the tokens that left the window, and are no sinks: of all layers and heads in a row."""
        bounds = bounds_of(1, self.recipe)
        stop = len(reading.tokens) - bounds.window
        return np.concatenate([np.array(x[:, bounds.n_sink : stop]).reshape(-1) for x in self.scores(reading)])

    def thresholds(self) -> dict[str, float]:
        """By the share of tokens outside the window that they keep; none for a method without."""
        if not self.method.has_threshold:
            return {}
        scores = np.concatenate([self.outside(reading) for reading in self.readings])
        return {f"1/{n}": float(np.quantile(scores, 1 - 1 / n)) for n in DENSITIES}

    def kept(self, threshold: float) -> float:
        """The share of tokens outside the window that a threshold keeps."""
        return float(np.mean([(self.outside(reading) >= threshold).mean() for reading in self.readings]))

    def structure(self) -> dict[str, str]:
        """Which layers could be local at a quarter of the text, as a card's settings have it; of gates that rank."""
        if self.method.name != "retention" or self.recipe.scope != "global":
            return {}
        reading = self.readings[0]
        bounds = bounds_of(len(reading.tokens) // 4, self.recipe)
        xs = [layer.x for layer in reading.layers]
        found = structure(self.gates, xs, bounds.slots, window=bounds.window, block=bounds.block)
        return {"local_layers": found.local_layers}

    def kl_at(self, model: nn.Module, threshold: float) -> float:
        """KL of the last segment if everything below a threshold is dropped when it leaves the window."""
        found = []
        for reading in self.readings:
            length = len(reading.tokens)
            drops = [mx.where(x >= threshold, 0.0, GONE) for x in self.scores(reading)]
            biases = dropped_biases(drops, length - SEGMENT, SEGMENT, bounds_of(1, self.recipe))
            found.append(distill.held_out_kl(model, reading, biases))
        return float(np.mean(found))

    def rows(self, kls: dict[str, float]) -> list[dict[str, Any]]:
        """KL by budget, in the words of a card; below the least that the method can hold there is one row."""
        length, found = len(self.readings[0].tokens), []
        for n, (share, kl) in zip(distill.SHARES, kls.items(), strict=True):
            slots = bounds_of(length // n, self.recipe).slots
            name = share if slots <= length // n else f"{share} (its least)"
            if not found or found[-1]["slots"] != slots:
                found.append({"budget": name, "slots": slots, "kl": round(kl, 4)})
        return found

    def threshold_rows(self, model: nn.Module, thresholds: dict[str, float]) -> list[dict[str, Any]]:
        """KL by threshold."""
        found = []
        for share, threshold in thresholds.items():
            row = {"threshold": share, "kept": round(self.kept(threshold), 4)}
            found.append({**row, "kl": round(self.kl_at(model, threshold), 4)})
        return found
