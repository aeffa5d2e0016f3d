"""The curves of a training, as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from mlx_kvprune.training.checkpoint import Progress

SMOOTH = 20  # steps of a running mean


def draw(progress: Progress, path: Path, title: str) -> None:
    """Training KL by step, and KL on held-out texts by budget.

    Raises:
        ValueError: there is nothing to draw, or no room to write it.
    """
    from matplotlib.figure import Figure

    if not progress.checks:
        raise ValueError("[plot] nothing to draw; got a training without distillation; try --stage distill")
    figure = Figure(figsize=(7, 4.4), layout="constrained")
    axes = figure.add_subplot()
    _curves(axes, progress)
    axes.set(xlabel="step", ylabel="KL from the full cache, nats", yscale="log", title=title)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    try:
        figure.savefig(path, dpi=130)
    except OSError as error:
        raise ValueError(f"[plot] cannot write {path}; got {error.strerror}; try another path") from error


def _curves(axes: Any, progress: Progress) -> None:
    curve = np.array(progress.curve)
    if len(curve):
        n = min(SMOOTH, len(curve))
        mean = np.convolve(curve, np.ones(n) / n, mode="valid")
        axes.plot(np.arange(n, len(curve) + 1), mean, lw=1, color="0.6", label=f"training, mean of {n} steps")
    steps = [step for step, _ in progress.checks]
    for share in progress.checks[0][1]:
        axes.plot(steps, [kls[share] for _, kls in progress.checks], marker="o", ms=4, label=f"held out, {share}")
