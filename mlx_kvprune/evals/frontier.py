"""What of the rows is drawn: KL of fidelity and scores of questions, against bytes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mlx_kvprune.report.frontier import Panel, Series

Row = dict[str, Any]


def panels(rows: Sequence[Row]) -> list[Panel]:
    """One panel per task and wording that has bounded rows; wordings that the full cache does not solve are left out."""
    found = []
    for task in dict.fromkeys(row["task"] for row in rows):
        mine = [row for row in rows if row["task"] == task and row["policy"] != "full"]
        if task == "fidelity" and mine:
            found.append(Panel("KL against the full cache", "nats a token", _series(mine, "kl")))
        for wording in dict.fromkeys(row["wording"] for row in mine if row.get("counts")):
            some = [row for row in mine if row["wording"] == wording]
            found.append(Panel(f"{task}: {wording}", "exact answers", _series(some, "score"), share=True))
    return found


def _series(rows: Sequence[Row], measure: str) -> tuple[Series, ...]:
    lines: dict[str, list[tuple[float, float, float, float]]] = {}
    for row in rows:
        point = (row["kv_bytes_peak"], row[measure], row[f"{measure}_low"], row[f"{measure}_high"])
        lines.setdefault(label(row, rows), []).append(point)
    return tuple(Series(name, tuple(points)) for name, points in lines.items())


def label(row: Row, among: Sequence[Row] = ()) -> str:
    """A condition without its budget: ``snapkv, head_adaptive, 4 bits``; with gates and local layers where they tell apart."""
    allocator = "" if row["allocator"] == "uniform" else f", {row['allocator']}"
    said = row["policy"] + allocator + (f", {row['kv_bits']} bits" if row.get("kv_bits") else "")
    rivals = [x for x in among if (x["policy"], x["allocator"]) == (row["policy"], row["allocator"])]
    for name, what in (("gates", ""), ("local_layers", "local layers "), ("threshold", "threshold ")):
        if len({x.get(name) for x in rivals}) > 1 and row.get(name):
            said += f", {what}{row[name]}"
    return said
