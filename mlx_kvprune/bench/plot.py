"""Speed and memory against context, as a picture."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mlx_kvprune.bench.rows import CONTEXT, Row
from mlx_kvprune.places import check_file

SUFFIXES = (".png", ".svg", ".pdf")
PANELS: dict[str, tuple[str, Callable[[Row], Any]]] = {
    "prefill": ("tokens/s", lambda row: row["prefill_tps"][0]),
    "decode": ("tokens/s", lambda row: row["decode_tps"][0]),
    "first token": ("s", lambda row: row["ttft_s"][0]),
    "most bytes held": ("MB", lambda row: _mb(row["kv_bytes_peak"])),
    "peak beside the weights": ("MB", lambda row: _mb(row["peak_bytes"])),
    "share of the decode ceiling": ("", lambda row: row["share"]),
}


def check(path: Path | None) -> None:
    """Refuse what could not be drawn, before hours of measuring.

    Raises:
        ValueError: no matplotlib, a format that is not known, or a folder that is not there.
    """
    if path is None:
        return
    if path.suffix.lower() not in SUFFIXES:
        raise ValueError(f"[plot] not a picture's name; got {str(path)!r}; try {path.stem or 'bench'}.png or .svg")
    check_file(path, "plot")
    if find_spec("matplotlib") is None:
        raise ValueError("[plot] needs matplotlib; got none; try `pip install 'mlx-kvprune[plots]'`")


def draw(rows: Sequence[Row], path: Path, title: str) -> None:
    """Write the picture: a line for each candidate, contexts on a logarithmic axis; spread of decoding as bars."""
    from matplotlib.figure import Figure

    rows = [row for row in rows if row["kind"] == CONTEXT]
    figure = Figure(figsize=(13, 7.5), layout="constrained")
    axes = figure.subplots(2, 3)
    for ax, (name, (unit, value)) in zip(axes.flat, PANELS.items(), strict=True):
        for candidate in dict.fromkeys(row["candidate"] for row in rows):
            _line(ax, [row for row in rows if row["candidate"] == candidate], name, value, candidate)
        _dress(ax, name, unit, sorted({row["context"] for row in rows}))
    handles, labels = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=130)


def _line(ax: Any, rows: Sequence[Row], panel: str, value: Callable[[Row], Any], label: str) -> None:
    points = [(row["context"], value(row), row) for row in rows if value(row) is not None]
    style = "--" if label.startswith("stock") else ":" if label.startswith("llama") else "-"
    xs, ys = [x for x, _, _ in points], [y for _, y, _ in points]
    if panel != "decode":
        ax.plot(xs, ys, style, marker="o", markersize=4, label=label)
        return
    spreads = [row["decode_tps"] for _, _, row in points]
    bars = [[median - low for median, low, _ in spreads], [high - median for median, _, high in spreads]]
    ax.errorbar(xs, ys, bars, fmt=style, marker="o", markersize=4, capsize=2, label=label)


def _dress(ax: Any, name: str, unit: str, contexts: Sequence[int]) -> None:
    from matplotlib.ticker import LogFormatter

    ax.set_title(name, fontsize=10)
    ax.set_ylabel(unit)
    ax.set_xscale("log", base=2)
    ax.set_xticks(contexts, [f"{c:,}" for c in contexts])
    ax.minorticks_off()
    if unit in ("MB", "s") or name == "decode":  # weights of few bits decode several times as fast
        ax.set_yscale("log")
        ax.yaxis.set_major_formatter(LogFormatter())  # 40 instead of 4 x 10^1
        ax.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(1.5, 0.5)))
    else:
        ax.set_ylim(bottom=0)
    ax.set_xlabel("context, tokens")
    ax.grid(alpha=0.25)


def _mb(nbytes: float | None) -> float | None:
    return None if nbytes is None else nbytes / 1e6
