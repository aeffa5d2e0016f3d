"""Rows as tables: what is shown of each task, and Markdown."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import Any

Row = dict[str, Any]
Cells = dict[str, str]
BY_DISTANCE = re.compile(r"KL \d+-\d+")  # headers
NAMED = ("policy", "allocator", "budget", "share", "kv_bits", "seed", "gates", "gate_id", "local_layers", "threshold")
CAPACITY, DILUTION = "capacity", "dilution"
TITLES = {CAPACITY: "capacity-bound: many things held at once", DILUTION: "dilution-bound: one thing among much else"}


def table(task: str, rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Header and cells of one task's rows; all lines are as wide as the header."""
    lines = _question_lines(rows) if "outcomes" in rows[0] else [_line(task, row, rows) for row in rows]
    header = list(dict.fromkeys(name for line in lines for name in line))
    return header, [[line.get(name, "-") for name in header] for line in lines]


def title(task: str, rows: Sequence[Row]) -> str:
    """The task and what bounds it, if anything."""
    bound = rows[0].get("bound")
    return f"{task} ({TITLES[bound]})" if bound else task


def _line(task: str, row: Row, rows: Sequence[Row]) -> Cells:
    texts = {"texts": str(row["texts"])} if len({x.get("texts") for x in rows}) > 1 and "texts" in row else {}
    return {**condition(row, rows), **texts, **CELLS[task](row), **size(row)}


def _fidelity(row: Row) -> Cells:
    near = {f"KL {x['from']}-{x['to']}": fixed(x["kl"], ".3f") for x in row["by_distance"]}
    measures = {"KL": interval(row, "kl", ".3f"), "change of NLL": interval(row, "nll_change", "+.3f")}
    over = interval(row, "over_window", "+.3f") if "over_window" in row else "-"
    return {
        "KL": measures["KL"],
        "KL over window's": over,
        **measures,
        "top-1": interval(row, "agreement", ".1%"),
        **near,
    }


def _regret(row: Row) -> Cells:
    lows = [x["from"] for x in row["by_age"]]
    names = [f"age {a}-{b}" for a, b in pairwise(lows)] + [f"age {lows[-1]}+"]
    ages = {name: f"{x['regret']:.2%}" for name, x in zip(names, row["by_age"], strict=True)}
    layer = row["worst_layer"]
    worst = f"{row['by_layer'][layer]:.1%} (layer {layer})" if row["regret"] else "-"
    return {"regret": f"{row['regret']:.2%}", **ages, "worst layer": worst}


def _generation(row: Row) -> Cells:
    least = "at least " if row.get("cut_ended") else ""  # the limit cut some of them
    inflation = "-" if row["inflation"] is None else f"{least}{row['inflation']:.2f}x of {row['ended_full']}"
    same = {"same as full": f"{row['same']:.1f} tokens"}
    if row["own_kl"] is not None:
        same |= {
            "KL of own words": f"{max(0.0, row['own_kl']):.3f}",
            "full says the same": f"{row['own_agreement']:.1%}",
        }
    ends = {"cut off": f"{row['cut']}/{row['texts']}", "loops": f"{row['loops']}/{row['texts']}"}
    return {"length": f"{row['length']:.1f}", "inflation": inflation, **ends, **same}


def _density(row: Row) -> Cells:
    most = [x["compression"] for x in row["by_text"]]
    longest = {
        f"{x['kind']}, {x['tokens']}": f"{x['compression']:.1f}x"
        for x in row["by_text"]
        if x["tokens"] == row["tokens"]
    }
    return {
        "compression": f"{min(most):.1f}-{max(most):.1f}x",
        **longest,
        "for a doubling": f"{row['slope']:+.2f} (R2 {row['r2']:.2f})",
        "density": f"{row['density']:.3f}",
        "heads": f"{row['density_least']:.3f}-{row['density_most']:.3f}",
        "spread": f"{row['spread']:.3f}",
        "moves with the text": f"{row['moves']:.3f}",
    }


CELLS: dict[str, Callable[[Row], Cells]] = {
    "fidelity": _fidelity,
    "regret": _regret,
    "generation": _generation,
    "density": _density,
}


def _question_lines(rows: Sequence[Row]) -> list[Cells]:
    lines: dict[tuple, Cells] = {}
    for row in rows:
        cells = lines.setdefault(_name(row), condition(row, rows))
        name = f"{row['wording']} (full {full_rate(row, rows)})"
        cells[name] = f"{row['exact']}/{row['trials']}"
        cells[f"{row['wording']}: of full's"] = f"{row['kept']}/{row['exact_full']}"
        if all("first" in x for x in row["outcomes"]):  # an answer may be right that the model would not have said
            cells[f"{row['wording']}: first choice"] = f"{sum(x['first'] for x in row['outcomes'])}/{row['trials']}"
        cells[f"{row['wording']}: log p"] = f"{row['logprob']:.2f}"
        if any("gain" in x for x in rows):
            own = row["policy"] == "full" or "gain" not in row
            cells[f"{row['wording']}: against full's"] = "-" if own else interval(row, "gain", "+.2f")
    for row in rows:
        lines[_name(row)] |= size(row)
    return list(lines.values())


def full_rate(row: Row, rows: Sequence[Row]) -> str:
    """What the full cache solves of a wording, the same for all of its rows."""
    alike = [x for x in rows if x["wording"] == row["wording"]]
    first = max(alike, key=lambda x: x["exact_full"])
    of = max(x["trials"] for x in alike)
    return f"{first['exact_full']}/{of}" + ("" if first["counts"] else ", does not count")


def _name(row: Row) -> tuple:
    return tuple(row.get(name) for name in NAMED)


def condition(row: Row, rows: Sequence[Row]) -> Cells:
    """What names a condition; only what differs within the table."""
    cells = {"policy": row["policy"]}
    for name, label in (("allocator", "allocator"), ("kv_bits", "bits"), ("share", "of the text")):
        values = {str(x.get(name)) for x in rows if x["policy"] != "full"}
        if len(values) > 1 or (name == "share" and values - {"None"}):
            cells[label] = "-" if row["policy"] == "full" else str(row.get(name) or "-")
    for name, label in (("gates", "gates"), ("local_layers", "local layers"), ("threshold", "threshold")):
        if len({x[name] for x in rows if x.get(name)}) > (name == "gates"):  # one place of gates is everybody's
            cells[label] = _short(row.get(name) or "-")
    return {**cells, "budget": row["budget"]}


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def size(row: Row) -> Cells:
    """What is held."""
    gates = {"gates MB": f"{row['gate_bytes'] / 1e6:.2f}"} if row.get("gate_bytes") else {}
    return {"slots": str(row["slots_held"]), "kv MB": f"{row['kv_bytes_peak'] / 1e6:.2f}"} | gates


def interval(row: Row, name: str, form: str) -> str:
    """A number and its 95% interval."""
    value, low, high = (fixed(row[key], form) for key in (name, f"{name}_low", f"{name}_high"))
    return f"{value} [{low}, {high}]"


def fixed(x: float, form: str) -> str:
    """A number in three places or so, without the minus of what rounds to zero."""
    return f"{round(x, 3) + 0.0:{form}}"


def as_markdown(heading: str, header: Sequence[str], cells: Iterable[Sequence[str]], first: str = "---") -> str:
    """A table in Markdown; ``first`` rules how its first column is aligned."""
    return f"**{heading}**\n\n{drawn(header, cells, first)}\n"


def drawn(header: Sequence[str], cells: Iterable[Sequence[str]], first: str = "---") -> str:
    """The lines of a table in Markdown."""
    lines = [header, [first, "---", *("---:" for _ in header[2:])], *cells]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
