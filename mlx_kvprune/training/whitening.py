"""Inputs of gates brought to one scale while they train, and the scale folded into their first weights after it.

Attention inputs differ a hundredfold in spread from channel to channel; an optimizer with one rate for all weights would hardly
move some of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

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
            x = mx.concatenate([r.layers[i].x for r in readings]).astype(mx.float32)
            plain = form not in FOLDABLE
            means.append(mx.zeros(x.shape[1]) if plain else x.mean(axis=0))
            spreads.append(mx.ones(x.shape[1]) if plain else mx.sqrt(x.var(axis=0) + 1e-6))
        mx.eval(means, spreads)
        return cls(tuple(means), tuple(spreads))

    def __call__(self, layer: int, x: mx.array) -> mx.array:
        """Inputs ``(..., width)`` of a layer on the scale that gates are trained on, float32."""
        return (x.astype(mx.float32) - self.means[layer]) / self.spreads[layer]

    def folded(self, gates: Gates) -> Gates:
        """Gates for inputs as they are, from gates for inputs on this scale."""
        plain = Gates(gates.shape)
        plain.update(tree_map(lambda x: x, gates.parameters()))
        if gates.shape.form not in FOLDABLE:
            return plain
        for gate, mean, spread in zip(plain.layers, self.means, self.spreads, strict=True):
            gate.weight = gate.weight / spread
            bias = "hidden_bias" if "hidden_bias" in gate else "bias"
            gate[bias] = gate[bias] - gate.weight @ mean
        mx.eval(plain.parameters())
        return plain
