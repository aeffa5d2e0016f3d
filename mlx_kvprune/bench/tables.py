"""Rows as tables for people."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from mlx_kvprune.bench.rows import BATCH, CONTEXT, Row
from mlx_kvprune.evals import tables

Table = tuple[list[str], list[list[str]]]


def ceiling_table(found: dict[str, Any]) -> Table:
    """What was computed before anything was measured."""
    cells = [
        [f"{r['context']:,}", r["candidate"], _mb(r["kv_bytes"]), f"{r['ceiling_tps']:.1f}"] for r in found["rows"]
    ]
    return ["context", "cache", "MB to read, of the cache", "decode tok/s, at most"], cells


def speed_table(rows: Sequence[Row]) -> Table:
    """One line per context and candidate: how fast."""
    header = ["context", "cache", "prefill tok/s", "x stock", "first token s", "decode tok/s", "x stock", "of ceiling"]
    cells = []
    for row in (row for row in rows if row["kind"] == CONTEXT):
        speed = [_spread(row["prefill_tps"], ".1f"), _spread(row["prefill_to_stock"], ".2f")]
        speed += [_spread(row["ttft_s"], ".2f"), _spread(row["decode_tps"], ".1f")]
        cells.append(
            [f"{row['context']:,}", row["candidate"], *speed, _spread(row["decode_to_stock"], ".2f"), _share(row)]
        )
    return header, cells


def memory_table(rows: Sequence[Row]) -> Table:
    """One line per context and candidate: how much."""
    header = ["context", "cache", "held MB", "of full", "resident MB", "peak MB"]
    cells = []
    for row in (row for row in rows if row["kind"] == CONTEXT):
        full, most = row["kv_bytes_full"], row["kv_bytes_peak"]
        times = f"1/{full / most:.1f}" if full and most else "-"
        sizes = [_mb(row["resident_bytes"]), _mb(row["peak_bytes"])]
        cells.append([f"{row['context']:,}", row["candidate"], _mb(most), times, *sizes])
    return header, cells


def batch_table(rows: Sequence[Row]) -> Table:
    """One line per batch size and candidate."""
    header = ["batch", "cache", "prefill tok/s", "x stock", "decode tok/s, all", "x stock", "held MB", "peak MB",
              "of ceiling"]  # fmt: skip
    cells = []
    for row in (row for row in rows if row["kind"] == BATCH):
        speed = [_spread(row["prefill_tps"], ".1f"), _spread(row["prefill_to_stock"], ".2f")]
        speed += [_spread(row["decode_tps"], ".1f"), _spread(row["decode_to_stock"], ".2f")]
        sizes = [_mb(row["kv_bytes"]), _mb(row["peak_bytes"])]
        cells.append([str(row["batch"]), row["candidate"], *speed, *sizes, _share(row)])
    return header, cells


# In Markdown: a size first, then a name.
as_markdown = functools.partial(tables.as_markdown, first="---:")
drawn = functools.partial(tables.drawn, first="---:")


def _spread(values: Sequence[float] | None, form: str) -> str:
    """``median (least to most)``; the median alone where they are one."""
    if values is None:
        return "-"
    median, low, high = (format(x, form) for x in values)
    return median if low == high else f"{median} ({low} to {high})"


def _mb(nbytes: float | None) -> str:
    return "-" if nbytes is None else f"{nbytes / 1e6:.2f}"


def _share(row: Row) -> str:
    return "-" if row["share"] is None else f"{row['share']:.0%}"
