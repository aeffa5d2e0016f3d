"""The utility stage of each method that has one: gates from forward passes alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from mlx_kvprune.gates import Gates
from mlx_kvprune.training.descent import Descent
from mlx_kvprune.training.methods import RATES
from mlx_kvprune.training.objectives.rereading import fit_ridge, fit_score, fit_squared
from mlx_kvprune.training.plan import Plan
from mlx_kvprune.training.reading import Reading
from mlx_kvprune.training.utility import fit_poisson
from mlx_kvprune.training.whitening import Whitening

N_SINK = 4


def fit_utility(
    plan: Plan,
    gates: Gates,
    readings: Sequence[Reading],
    whitening: Whitening,
    stage: Callable[[str, float, float, str], None],
) -> float:
    """Fit gates for whitened inputs; returns the loss.

    Args:
        stage: is told how far it is.
    """
    how = Descent(rate=plan.rate or RATES[gates.shape.form], seed=plan.seed)
    closed = plan.method == "kvzap" and gates.shape.form == "linear"
    total, done = gates.shape.layers if closed else how.steps(readings), 0

    def tick(n: int, loss: float) -> None:
        nonlocal done
        done += n
        stage("fitting", done, total, f", loss {loss:.4f}")

    if closed:
        return fit_ridge(gates, readings, whitening, N_SINK, tick)
    if plan.method == "kvzap":
        return fit_squared(gates, readings, whitening, N_SINK, how, tick)
    if plan.method == "fastkvzip":
        return fit_score(gates, readings, whitening, N_SINK, how, tick)
    return fit_poisson(gates, readings, whitening, plan.recipe.window, N_SINK, how, tick)
