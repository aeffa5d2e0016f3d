"""Gates that foretell what a second reading of the text attends to: KVzap (arXiv 2601.07891) and Fast KVzip (arXiv 2601.17668).

The target of a token is the largest attention that the second reading gives it (``LayerReading.peak``); KVzap's is the
logarithm of that times ``|W_o v_i| / |h_j|``, where ``|h_j|`` is here that of the attention's input, after the norm.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_kvprune.gates import Gates
from mlx_kvprune.gates.modules import SINKS
from mlx_kvprune.training.descent import Descent, Tick, descend
from mlx_kvprune.training.reading import LayerReading, Reading
from mlx_kvprune.training.whitening import Whitening

LEAST = 1e-8  # of a target, before its logarithm is taken
RIDGE = 1e-2  # relative to inputs of spread one


def log_peak(layer: LayerReading) -> mx.array:
    """KVzap's target ``(H_kv, T)``."""
    return mx.log(mx.maximum(layer.peak, LEAST))


def fit_ridge(gates: Gates, readings: Sequence[Reading], whitening: Whitening, n_sink: int, tick: Tick) -> float:
    """Linear gates for whitened inputs in closed form; returns the mean squared error."""
    errors = []
    for i, gate in enumerate(gates.layers):
        weight, bias, error = ridge(*_pairs(readings, whitening, i, n_sink), RIDGE)
        gate.weight, gate.bias = mx.array(weight.T, mx.float32), mx.array(bias, mx.float32)
        errors.append(error)
        tick(1, error)
    mx.eval(gates.parameters())
    return float(np.mean(errors))


def _pairs(readings: Sequence[Reading], whitening: Whitening, i: int, n_sink: int) -> tuple[np.ndarray, np.ndarray]:
    xs = [np.array(whitening(i, r.layers[i].x[n_sink:])) for r in readings]
    ys = [np.array(log_peak(r.layers[i])[:, n_sink:]).T for r in readings]
    return np.concatenate(xs), np.concatenate(ys)


def ridge(x: np.ndarray, y: np.ndarray, weight: float) -> tuple[np.ndarray, np.ndarray, float]:
    """``argmin |x w + b - y|^2 / n + weight |w|^2`` for ``x`` ``(n, width)`` and ``y`` ``(n, H_kv)``, and its squared error.

    Returns:
        ``w (width, H_kv)``, ``b (H_kv,)``, the error.
    """
    x_mean, y_mean = x.mean(axis=0, dtype=np.float64), y.mean(axis=0, dtype=np.float64)
    centred = x - x_mean
    left = centred.T @ centred / len(x) + weight * np.eye(x.shape[1])
    w = np.linalg.solve(left, centred.T @ (y - y_mean) / len(x))
    b = y_mean - x_mean @ w
    return w, b, float(np.square(x @ w + b - y).mean())


def fit_squared(
    gates: Gates, readings: Sequence[Reading], whitening: Whitening, n_sink: int, how: Descent, tick: Tick
) -> float:
    """Gates of any form on the squared error of KVzap's target; returns the last epoch's."""
    for i, gate in enumerate(gates.layers):
        gate.bias = mx.stack([log_peak(r.layers[i])[:, n_sink:].mean(axis=1) for r in readings]).mean(axis=0)

    def loss(i: int, raw: mx.array, layer: LayerReading, cut: slice, r: int) -> mx.array:
        return mx.square(raw - log_peak(layer)[:, cut]).mean()

    return descend(gates, readings, whitening, loss, how, n_sink, tick)


def fit_score(
    gates: Gates, readings: Sequence[Reading], whitening: Whitening, n_sink: int, how: Descent, tick: Tick
) -> float:
    """Sink gates, whose number is the log of a score in 0 to 1, by cross entropy to KVzip's; returns the last epoch's."""
    for i, gate in enumerate(_modules(gates)):
        mean = mx.stack([r.layers[i].peak[:, n_sink:].mean(axis=1) for r in readings]).mean(axis=0)
        mean = mx.clip(mean, 1e-4, 0.99)
        start = mx.log(mean) - mx.log1p(-mean) + float(np.log(SINKS))
        gate.bias = mx.broadcast_to(start[:, None, None], gate.bias.shape)

    def loss(i: int, raw: mx.array, layer: LayerReading, cut: slice, r: int) -> mx.array:
        return cross_entropy(raw, layer.peak[:, cut]).mean()

    return descend(gates, readings, whitening, loss, how, n_sink, tick)


def _modules(gates: Gates) -> list[Any]:
    return gates.layers


def cross_entropy(log_score: mx.array, target: mx.array) -> mx.array:
    """``-(y log p + (1 - y) log(1 - p))`` from ``log p``, elementwise."""
    log_score = mx.minimum(log_score, -1e-6)
    return -(target * log_score + (1 - target) * mx.log(-mx.expm1(log_score)))
