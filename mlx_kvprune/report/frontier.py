"""Quality against bytes: one line per policy, with intervals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Series:
    """One line: ``(bytes, value, low, high)`` for each point."""

    name: str
    points: tuple[tuple[float, float, float, float], ...]


@dataclass(frozen=True)
class Panel:
    """One pair of axes."""

    title: str
    unit: str
    series: tuple[Series, ...]
    share: bool = False  # whether values are shares, from 0 to 1


def draw(panels: Sequence[Panel], path: Path) -> None:
    """Write a picture (PNG, SVG or PDF, by the name) with the panels side by side.

    Raises:
        ValueError: no matplotlib, nothing to draw, or a kind of picture that it does not know.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("[plot] needs matplotlib; got none; try pip install 'mlx-kvprune[plots]'") from None
    if not panels:
        raise ValueError("[plot] nothing to draw; got no task with bounded rows; try --tasks fidelity")
    figure = Figure(figsize=(6.4 * len(panels), 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    for i, panel in enumerate(panels):
        _draw(figure.add_subplot(1, len(panels), i + 1), panel)
    try:
        figure.savefig(path)
    except (ValueError, OSError) as error:
        raise ValueError(f"[plot] cannot write {path}; got {error}; try a name that ends in .png") from error


def _draw(axes, panel: Panel) -> None:
    for series in panel.series:
        points = sorted(series.points)
        x, y = [p[0] / 1e6 for p in points], [p[1] for p in points]
        around = [[max(0.0, p[1] - p[2]) for p in points], [max(0.0, p[3] - p[1]) for p in points]]
        dashed = series.name.split(",")[0] in ("window", "random")
        axes.errorbar(
            x, y, yerr=around, label=series.name, marker="o", ms=4, capsize=3, ls="--" if dashed else "-", lw=1.2
        )
    held = [point[0] / 1e6 for series in panel.series for point in series.points]
    axes.set_xscale("log")
    axes.set_xlim(min(held) / 1.2, max(held) * 1.2)
    axes.set_xticks(_ticks(held), labels=[f"{x:.3g}" for x in _ticks(held)])
    axes.minorticks_off()
    axes.set_xlabel("MB held at most, everything counted")
    axes.set_ylabel(panel.unit)
    axes.set_ylim((0, 1.02) if panel.share else (0, None))
    axes.set_title(panel.title, fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)


def _ticks(held: Sequence[float]) -> list[float]:
    """The sizes that are held, those within a tenth of another left out."""
    found: list[float] = []
    for x in sorted(held):
        if not found or x > 1.1 * found[-1]:
            found.append(x)
    return found
