"""Measured rows: the file they are kept in, and what is computed of them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from mlx_kvprune.bench.variants import spread_of

Row = dict[str, Any]
Key = tuple[str, int, int, str, int]  # kind, size, length of a batch's texts, candidate, repetition
CONTEXT, BATCH, RUN = "context", "batch", "run"
SIZE = {CONTEXT: "context", BATCH: "batch"}
SAME = ("model", "dtype", "budget", "prefill_step_size", "backend", "chip", "threads")  # what rows must share


def key_of(row: Row) -> Key:
    """By what a row is known again."""
    return row["kind"], row[SIZE[row["kind"]]], row.get("batch_context", 0), row["candidate"], row["rep"]


def question_of(row: Row) -> tuple[Any, ...]:
    """The fields of ``SAME``."""
    return tuple(row.get(name) for name in SAME)


class Store:
    """Rows of one question, in memory and, if there is a path, in a JSONL file that other questions may share.

    Args:
        path: read now, appended to later; a last line that was cut off is dropped.
        about: the fields of ``SAME``: what has to be equal for rows to be of the same question.
        run: kept in front of the first rows that this process adds: machine, versions, bandwidth.

    Raises:
        ValueError: the file cannot be read, or has other content.
    """

    def __init__(self, path: Path | None, about: Row, run: Row | None = None) -> None:
        self.path, self.about, self._run = path, {name: about.get(name) for name in SAME}, run
        self.rows = [row for row in read(path) if self._is_mine(row)]
        self.kept, self._keys = len(self.rows), {key_of(row) for row in self.rows}

    def has(self, key: Key) -> bool:
        return key in self._keys

    def add(self, rows: Sequence[Row]) -> None:
        """Keep rows that were measured in turn, all or none."""
        rows = [{**self.about, **row} for row in rows]
        self.rows += rows
        self._keys |= {key_of(row) for row in rows}
        if self.path is not None:
            before = [] if self._run is None else [{"kind": RUN, **self.about, **self._run}]
            _append(self.path, [*before, *rows])
            self._run = None

    def _is_mine(self, row: Row) -> bool:
        return row.get("kind") in SIZE and question_of(row) == question_of(self.about)


def read(path: Path | None) -> list[Row]:
    """The rows of a file; none if there is no such file, and without a last line that was cut off."""
    if path is None or not path.exists():
        return []
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError:
        raise ValueError(f"[out] not a file of rows; got {str(path)!r}; try another name") from None
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line) if line.strip() else {}
        except ValueError:
            if number == len(lines) and line.startswith("{"):  # a run was killed while it wrote this
                break
            raise ValueError(
                f"[out] not a file of rows; got line {number} of {str(path)!r}; try another name"
            ) from None
        if not isinstance(row, dict) or (row and "kind" not in row):
            raise ValueError(
                f"[out] not a row of bench; got line {number} of {str(path)!r}, perhaps of `eval`; try another name"
            )
        rows += [row] if row else []
    return rows


def _append(path: Path, rows: Iterable[Row]) -> None:
    """Write rows in one go, after the last whole line."""
    with path.open("ab+") as file:
        file.seek(0)
        whole, newline, tail = file.read().rpartition(b"\n")
        if tail and not _is_json(tail):
            file.truncate(len(whole) + len(newline))
        elif tail:
            file.write(b"\n")
        file.write("".join(json.dumps(row) + "\n" for row in rows).encode())
        file.flush()


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    return True


# -- what is computed ------------------------------------------------------------------------------------------------


def ceiling_tps(gbps: float, weights: float, cache: float, batch: int = 1) -> float:
    """Tokens a second that a decode step cannot exceed: every weight and every row is read once a step."""
    return batch * gbps * 1e9 / (weights + batch * cache)


def ratios(ours: Row, stock: Row | None) -> dict[str, list[float]]:
    """How many times as fast as stock in the same round: median, least, most; nothing if measured at another time."""
    if stock is None or stock["sitting"] != ours["sitting"]:
        return {}
    decode = [b / a for a, b in zip(ours["decode_s"], stock["decode_s"], strict=True)]
    return {"prefill": spread_of([stock["prefill_s"] / ours["prefill_s"]]), "decode": spread_of(decode)}


def merged(rows: Sequence[Row], reference: str) -> list[Row]:
    """One row for each kind, size and candidate, by size: spreads over repetitions and rounds, ratios to ``reference``."""
    known = {key_of(row): row for row in rows}
    groups: dict[tuple[str, int, int, str], list[Row]] = {}
    for row in rows:
        groups.setdefault(key_of(row)[:4], []).append(row)
    out = []
    for key, reps in sorted(groups.items(), key=lambda item: item[0][:3]):
        pairs = [ratios(row, known.get((*key[:3], reference, row["rep"]))) for row in reps]
        out.append(_merged(reps, [pair for pair in pairs if pair]))
    return out


def _merged(reps: Sequence[Row], pairs: Sequence[dict[str, list[float]]]) -> Row:
    last = reps[-1]
    tokens, per_step = last["prompt_tokens"], last.get("batch", 1)
    known = ("kind", "context", "batch", "batch_context", "candidate", "prompt_tokens")
    row: Row = {name: last[name] for name in known if name in last} | {"reps": len(reps)}
    row["prefill_tps"] = spread_of([tokens / r["prefill_s"] for r in reps])
    row["ttft_s"] = spread_of([r["ttft_s"] for r in reps])
    row["decode_tps"] = spread_of([per_step / s for r in reps for s in r["decode_s"]])
    for what in ("prefill", "decode"):
        row[f"{what}_to_stock"] = _over([pair[what] for pair in pairs])
    for field in ("kv_bytes", "kv_bytes_peak", "kv_bytes_full", "resident_bytes", "peak_bytes", "ceiling_tps"):
        row[field] = last.get(field)
    row["share"] = round(row["decode_tps"][0] / last["ceiling_tps"], 3) if last.get("ceiling_tps") else None
    return row


def _over(spreads: Sequence[Sequence[float]]) -> list[float] | None:
    """The median of medians, the least and the most of several spreads."""
    if not spreads:
        return None
    return [spread_of([s[0] for s in spreads])[0], min(s[1] for s in spreads), max(s[2] for s in spreads)]
