"""The page of results, made from stored runs:

    python -m mlx_kvprune.evals.results docs/results/*.jsonl --pictures docs/results > docs/results.md

Each file is what ``mlx-kvprune eval --out FILE`` wrote; a run that is not finished gives the rows that are there.
``bench.stored`` makes the section on speed.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

from mlx_kvprune.evals import tables
from mlx_kvprune.evals.findings import findings, over_seeds
from mlx_kvprune.evals.frontier import label, panels
from mlx_kvprune.evals.store import Unit, key, parsed
from mlx_kvprune.evals.tasks import TASKS
from mlx_kvprune.report.frontier import draw

Row = dict[str, Any]
DRAWN_FROM = 3  # budgets that make a line
HEAD = """# Results: quality against the full cache; speed and memory

Made of stored runs by the command in [results/README.md](results/README.md); each table has the command that measured it, the
day, the machine and the versions.

- Budgets written as fractions are of the text; every condition then holds the **bytes** that `window` holds with as many
  slots: what a policy remembers beside its slots is paid for in slots, and at 4 bits more slots fit. `kv MB` is the most that
  was held, everything counted.
- KL is from the full cache's prediction, in nats a token, over the second half of the text (whole blocks of 32
  predictions; the columns by distance are of all predictions); in brackets 95% intervals of a bootstrap over these.
  *KL over window's*: the difference on the same tokens, which is known better than either.
- Answers are exact if every token was the model's first choice; log p is the answer's, in nats;
  *against full's*: minus that of the full cache for the same questions. In `turns`, where so small a model seldom says
  the word even with the full cache (*first choice*), a question counts as answered if the word is likelier than with the full
  cache after the same conversation without that fact.
- Questions count only where the full cache solves 80%. *Of full's*: how many of the full cache's answers are left. Facts are
  invented, of kinds that the full cache finds; questions repeat the fact's words unless they are called paraphrased, and the
  answer's first words are given. Intervals are Wilson's; where a document has several questions (`ask`), of as many
  independent ones as these are worth by their design effect, with Student's quantile.
- **Capacity-bound** tasks need many things held at once, **dilution-bound** ones one thing among much else: a
  policy may gain in one and lose in the other.
- A condition that has no room at a budget, beside sinks, window and block and what its policy remembers, is left out; under a
  table stands which. Allocators other than a policy's own were measured for `tova` alone.
- `window` (sinks and the newest tokens) and `random` are controls. `retention` asks learned gates (docs/gates.md), whose own
  bytes are not in `kv MB` but beside it (`gates MB`, where the run noted them; half of that in the file). Training did not see
  these texts; at `aesop-fables` gates were looked at while they trained, and `mansfield-park` was looked at to say how long a
  block of `global` may be.
- The defaults that follow: `retention` where gates come along; without gates `window`, for no untrained policy is better
  everywhere and on both models ([LOG.md](../LOG.md), 2026-11-29); `probe` for `ask` with one question.
"""


@dataclass
class Table:
    """The units of one task under one setup, and the runs that measured them; ``name``: of their file."""

    task: str
    setup: dict[str, Any]
    runs: list[dict[str, Any]] = field(default_factory=list)
    units: list[Unit] = field(default_factory=list)
    name: str = ""

    def rows(self) -> list[Row]:
        """The task's rows; beside what is held the bytes of the gates, where the runs know them."""
        sizes = {which: size for run in self.runs for which, size in run.get("gate_bytes", {}).items()}
        return TASKS[self.task].told(self.units, sizes)


def read(paths: Sequence[Path]) -> list[Table]:
    """The tables of files, in the order in which their tasks began; the same piece of work of a file counts once.

    Raises:
        ValueError: a file cannot be read or holds something else.
    """
    found: dict[str, Table] = {}
    for path in paths:
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except OSError as error:
            raise ValueError(f"[results] cannot read {path}; got {error.strerror}; try docs/results/*.jsonl") from error
        for run, unit in _with_runs(parsed(lines, path)):
            place = json.dumps([path.name, unit["task"], unit["setup"]], sort_keys=True)
            table = found.setdefault(place, Table(unit["task"], unit["setup"], name=path.stem))
            table.units.append(unit)
            if run not in table.runs:
                table.runs.append(run)
    for table in found.values():
        table.units = list({key(unit): unit for unit in table.units}.values())
    return list(found.values())


def _with_runs(lines: Sequence[dict[str, Any]]) -> Iterator[tuple[dict[str, Any], Unit]]:
    run: dict[str, Any] = {}
    for line in lines:
        if "run" in line:
            run = line["run"]
        elif line["task"] in TASKS:
            yield run, line


def page(read_tables: Sequence[Table], pictures: Path | None = None) -> str:
    """The whole page: per model what follows, then the tables.

    Args:
        pictures: a folder beside the page, into which a picture of each table is drawn that says how KL falls with bytes.
    """
    parts, names = [HEAD], _picture_names(read_tables)
    for model in dict.fromkeys(table.setup["model"] for table in read_tables):
        mine = [table for table in read_tables if table.setup["model"] == model]
        parts += [f"## {model}", *_findings(mine)]
        for table in sorted(mine, key=_order):
            parts.append(_section(table, pictures / names[id(table)] if pictures else None))
    return "\n\n".join(part.strip() for part in parts) + "\n"


def _order(table: Table) -> tuple[int, int]:
    """As in the table of tasks; capacity-bound tasks apart from the others."""
    bound = TASKS[table.task].bound
    return ("", tables.DILUTION, tables.CAPACITY).index(bound), list(TASKS).index(table.task)


def _findings(mine: Sequence[Table]) -> Iterator[str]:
    named = lambda table: table.setup["data"].rsplit(" ", 1)[0]
    setup_of = lambda table: {"data": named(table), "length": table.setup["tokens"], "dtype": table.setup["dtype"]}
    seeded = [
        (table.setup["seed"], {**row, **setup_of(table), "table": number})
        for number, table in enumerate(mine)
        for row in table.rows()
    ]
    sentences = findings([row for _, row in seeded])
    yield "### What follows" if sentences else ""
    yield "\n".join(f"- {sentence}." for sentence in sentences)
    spread = over_seeds(seeded)
    if spread:
        yield "### Over seeds\n\n" + "\n".join(f"- {line}." for line in spread)


def _picture_names(read_tables: Sequence[Table]) -> dict[int, str]:
    """A file name for each table, by ``id``: no two alike."""
    found: dict[int, str] = {}
    for table in read_tables:
        name, number = f"{table.name}-{table.setup['tokens']}", 2
        while f"{name}.png" in found.values():
            name, number = f"{table.name}-{table.setup['tokens']}-{number}", number + 1
        found[id(table)] = f"{name}.png"
    return found


def _section(table: Table, picture: Path | None) -> str:
    rows = table.rows()
    header, cells = tables.table(table.task, rows)
    setup = table.setup
    about = f"{setup['tokens']:,} tokens, data {setup['data']}, seed {setup['seed']}, type {setup['dtype']}"
    about += "".join(f", gates of `{policy}` {which}" for policy, which in _gates(table))
    text = [f"### {tables.title(table.task, rows)}", "", *_origins(table), f"{about}.", ""]
    budgets = {row["share"] for row in rows if row.get("share")}
    if picture is not None and table.task == "fidelity" and len(budgets) >= DRAWN_FROM:
        draw(panels(rows), picture)
        text += [f"![KL against bytes]({picture.resolve().parent.name}/{picture.name})", ""]
    return "\n".join([*text, tables.drawn(header, cells), *_left_out(table, rows)])


def _left_out(table: Table, rows: Sequence[Row]) -> Iterator[str]:
    """What was asked for and not measured: as the runs say, or as the budgets say that others were measured at."""
    notes = [note for run in table.runs for note in run.get("notes", ()) if note.startswith(f"{table.task}: ")]
    shares = sorted({row["share"] for row in rows if row.get("share")}, key=Fraction, reverse=True)
    measured: dict[str, set[str]] = {}
    for row in rows:
        if row.get("share"):
            measured.setdefault(label(row, rows), set()).add(row["share"])
    gaps = [
        f"`{who}` at {', '.join(x for x in shares if x not in at)}" for who, at in measured.items() if set(shares) - at
    ]
    said = [note.removeprefix(f"{table.task}: ") for note in dict.fromkeys(notes)] or gaps
    if said:
        yield f"\nLeft out: {'; '.join(said)}."


def _gates(table: Table) -> list[tuple[str, str]]:
    """Who asked gates, and what tells these from others."""
    return sorted({(unit["policy"], unit["gate_id"]) for unit in table.units if unit.get("gate_id")})


def _origins(table: Table) -> Iterator[str]:
    """The command, and where and when it ran; a resumed run was measured by several."""
    for command in dict.fromkeys(run.get("command", "") for run in table.runs):
        yield f"`{command}`  "
    places = (f"{run.get('date')}, {run.get('machine')}; {run.get('versions')}" for run in table.runs)
    yield from (f"{place}  " for place in dict.fromkeys(places))


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the page of the files that are named to standard output."""
    parser = argparse.ArgumentParser(
        "python -m mlx_kvprune.evals.results", description="Stored runs as a page in Markdown."
    )
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="what `mlx-kvprune eval --out` wrote")
    parser.add_argument(
        "--pictures", type=Path, metavar="FOLDER", help="draw KL against bytes into this folder beside the page"
    )
    asked = parser.parse_args(arguments)
    try:
        if asked.pictures is not None:
            asked.pictures.mkdir(parents=True, exist_ok=True)
        text = page(read(asked.files), asked.pictures)
    except (ValueError, OSError) as error:
        sys.exit(str(error))
    sys.stdout.write(text)


if __name__ == "__main__":
    main()
