"""Gates from forward passes alone: what later tokens attended to, foretold from the token.

Attention falls off with age about as 1 / age. So the mass that token i gets from all tokens at least ``window`` later is taken
as a Poisson count with the rate ``exp(g_i)`` and the exposure ``e_i = sum_t 1 / (t - i)``; ``g`` is fitted by its likelihood,
``e exp(g) - m g``. Ranking by ``g_i - log(t - i)`` is then ranking by the attention that is expected next, and that is what a
retention score with ``-log(-log beta) = g`` does.
"""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
import numpy as np

from mlx_kvprune.gates import Gates
from mlx_kvprune.gates.structure import worth
from mlx_kvprune.training.descent import Descent, Tick, descend
from mlx_kvprune.training.reading import LayerReading, Reading
from mlx_kvprune.training.whitening import Whitening

SHIFT = 8.0  # rates are small; raised by this, ``worth(raw)`` is about ``raw``


def exposure(length: int, window: int) -> np.ndarray:
    """``sum over t of 1 / (t - i)`` for ``t - i >= window`` and ``t < length``: ``(length,)``."""
    harmonic = np.concatenate([[0.0], np.cumsum(1.0 / np.arange(1, length + 1))])
    last = length - 1 - np.arange(length)
    return np.where(last >= window, harmonic[last] - harmonic[min(window - 1, length)], 0.0)


def start_biases(gates: Gates, readings: Sequence[Reading], window: int) -> None:
    """Set every head's bias to the rate that all its tokens have together."""
    for i, gate in enumerate(gates.layers):
        mass = sum(r.layers[i].mass.sum(axis=1) for r in readings)
        seen = sum(exposure(len(r.tokens), window).sum() for r in readings)
        gate.bias = mx.log(mx.maximum(mass / seen, 1e-9)) + SHIFT


def fit_poisson(
    gates: Gates,
    readings: Sequence[Reading],
    whitening: Whitening,
    window: int,
    n_sink: int,
    how: Descent,
    tick: Tick | None = None,
) -> float:
    """Fit gates for whitened inputs to readings; returns the mean loss of the last epoch."""
    start_biases(gates, readings, window)
    exposures = [mx.array(exposure(len(r.tokens), window), mx.float32) for r in readings]

    def loss(i: int, raw: mx.array, layer: LayerReading, cut: slice, r: int) -> mx.array:
        g = worth(raw) - SHIFT
        return (exposures[r][cut] * mx.exp(g) - layer.mass[:, cut] * g).mean()

    return descend(gates, readings, whitening, loss, how, n_sink, tick)
