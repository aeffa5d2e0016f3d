"""A tiny model whose texts have something to foretell, and what was read of them."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import tiny_models as zoo

from mlx_kvprune.attach import hooked
from mlx_kvprune.gates import Gates, GateShape
from mlx_kvprune.training.reading import Reading, read

WINDOW = 16


def text(seed: int, length: int = 512) -> list[int]:
    """Tokens that come again: later ones have something to attend to."""
    rng = np.random.default_rng(seed)
    words = rng.integers(0, zoo.VOCAB, (12, 8))
    return words[rng.integers(0, 12, length // 8 + 1)].reshape(-1)[:length].tolist()


def readings(model, count: int, length: int = 512, window: int = WINDOW, first: int = 0) -> list[Reading]:
    return [read(model, text(first + i, length), window) for i in range(count)]


def gates_for(model, form: str, seed: int = 0, hidden: int = 16) -> Gates:
    shapes = [layer.shape for layer in hooked(model).rung.layers]
    heads, groups = tuple(s.n_kv_heads for s in shapes), tuple(s.n_heads // s.n_kv_heads for s in shapes)
    return Gates(GateShape(form, (128,) * len(shapes), heads, groups, hidden), seed=seed)


def shaken(gates: Gates, seed: int = 3, scale: float = 0.2) -> Gates:
    """Gates whose weights are none of the round numbers that they start with."""
    mx.random.seed(seed)
    gates.restore({name: x + scale * mx.random.normal(x.shape) for name, x in gates.arrays().items()})
    mx.eval(gates.parameters())
    return gates
