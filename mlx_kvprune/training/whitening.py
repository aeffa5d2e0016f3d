"""Inputs of gates brought to one scale while they train, and the scale folded into their first weights after it.

Attention inputs differ a hundredfold in spread from channel to channel; an optimizer with one rate for all weights would hardly
move some of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
from mlx.utils import tree_map

from mlx_kvprune.gates import Gates
from mlx_kvprune.training.reading import Reading

FOLDABLE = ("linear", "mlp", "shared")


@dataclass(frozen=True)
class Whitening:
    """Mean and spread of each layer's input ``(width,)``."""

    means: tuple[mx.array, ...]
    spreads: tuple[mx.array, ...]

    @classmethod
    def of(cls, readings: Sequence[Reading], form: str) -> Whitening:
        """Of what was read; for forms that could not take it into their weights, nothing is changed."""
        means, spreads = [], []
        for i in range(len(readings[0].layers)):
            mean, spread = _moments([r.layers[i].x for r in readings])
            plain = form not in FOLDABLE
            means.append(mx.zeros_like(mean) if plain else mean)
            spreads.append(mx.ones_like(spread) if plain else spread)
        mx.eval(means, spreads)
        return cls(tuple(means), tuple(spreads))

    @classmethod
    def none(cls, widths: Sequence[int]) -> Whitening:
        """One that changes nothing."""
        return cls(tuple(mx.zeros(w) for w in widths), tuple(mx.ones(w) for w in widths))

    def arrays(self) -> dict[str, mx.array]:
        """By name, for a checkpoint."""
        named = [(f"mean.{i}", x) for i, x in enumerate(self.means)]
        return dict(named + [(f"spread.{i}", x) for i, x in enumerate(self.spreads)])

    @classmethod
    def restored(cls, arrays: dict[str, mx.array]) -> Whitening:
        """From ``arrays()``."""
        layers = range(len(arrays) // 2)
        return cls(tuple(arrays[f"mean.{i}"] for i in layers), tuple(arrays[f"spread.{i}"] for i in layers))

    def __call__(self, layer: int, x: mx.array) -> mx.array:
        """Inputs ``(..., width)`` of a layer on the scale that gates are trained on, float32."""
        return (x.astype(mx.float32) - self.means[layer]) / self.spreads[layer]

    def folded(self, gates: Gates) -> Gates:
        """Gates for inputs as they are, from gates for inputs on this scale."""
        plain = Gates(gates.shape)
        plain.update(tree_map(lambda x: x, gates.parameters()))
        if gates.shape.form not in FOLDABLE:
            return plain
        layers: Any = plain.layers
        for gate, mean, spread in zip(layers, self.means, self.spreads, strict=True):
            gate.weight = gate.weight / spread
            bias = "hidden_bias" if "hidden_bias" in gate else "bias"
            gate[bias] = gate[bias] - gate.weight @ mean
        mx.eval(plain.parameters())
        return plain

    def unfolded(self, gates: Gates) -> Gates:
        """Gates for inputs on this scale, from gates for inputs as they are: what ``folded`` undoes."""
        spreads = tuple(1 / x for x in self.spreads)
        return Whitening(tuple(-m * s for m, s in zip(self.means, spreads, strict=True)), spreads).folded(gates)


def _moments(xs: Sequence[mx.array]) -> tuple[mx.array, mx.array]:
    """Mean and spread ``(width,)`` of the rows of several arrays, one array at a time."""
    count = sum(x.shape[0] for x in xs)
    mean = mx.stack([x.astype(mx.float32).sum(axis=0) for x in xs]).sum(axis=0) / count
    squares = [mx.square(x.astype(mx.float32) - mean).sum(axis=0) for x in xs]
    return mean, mx.sqrt(mx.stack(squares).sum(axis=0) / count + 1e-6)
