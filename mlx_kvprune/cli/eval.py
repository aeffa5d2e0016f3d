"""``eval``: quality against the full cache."""

from __future__ import annotations

import json as jsons
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mlx_kvprune.cli.options import Json, ModelOptions, load, spread

if TYPE_CHECKING:
    from mlx_kvprune.evals.conditions import Condition
    from mlx_kvprune.evals.fidelity import Tick

EPILOG = """Examples:

  mlx-kvprune eval

  mlx-kvprune eval --policies all --budgets 128,256,512 --tasks fidelity --data book.txt --out rows.jsonl

  mlx-kvprune eval --tasks needles --policies snapkv,probe --trials 50 --json | tail -1
"""
TASKS = ("fidelity", "needles", "regret")
Row = dict[str, Any]


def _option(*flags: str, metavar: str | None = None, help: str, **more: Any) -> Any:
    return typer.Option(*flags, metavar=metavar, help=help, rich_help_panel="Evaluation", **more)


Policies = Annotated[
    str,
    _option(
        "--policies", metavar="NAMES", help="Comma-separated, or `all`; full, window and random always come along."
    ),
]
Budgets = Annotated[
    str, _option("--budgets", metavar="SIZES", help="Comma-separated: 256 (tokens per KV head) or 8MB (bytes in all).")
]
Tasks = Annotated[str, _option("--tasks", metavar="NAMES", help=f"Comma-separated: {', '.join(TASKS)}.")]
Data = Annotated[
    Path | None,
    _option(
        "--data",
        metavar="FILE",
        help="Text: .txt, .md, or .jsonl with a field text; also .gz. Default: the document in examples/documents/.",
    ),
]
Tokens = Annotated[int, _option("--tokens", min=64, help="Length of the text; the needles' haystacks have half of it.")]
Trials = Annotated[int, _option("--trials", min=1, help="Needles to be found; believe a difference from 50 on.")]
Seed = Annotated[int, _option("--seed", min=0, help="Of everything that is drawn.")]
Markdown = Annotated[bool, _option("--markdown", help="Print the tables as Markdown.")]
Out = Annotated[Path | None, _option("--out", metavar="FILE", help="Append the rows to this JSONL file, task by task.")]


@dataclass(frozen=True)
class Job:
    """What the tasks of one run share.

    Attributes:
        model: the loaded model.
        tokenizer: its tokenizer.
        texts: documents.
        conditions: the rows of the tables.
        tokens: length of the text; haystacks have half of it.
        trials: needles.
        seed: of everything that is drawn.
    """

    model: Any
    tokenizer: Any
    texts: list[str]
    conditions: list[Condition]
    tokens: int
    trials: int
    seed: int


@spread
def eval_(
    model: ModelOptions,
    policies: Policies = "snapkv",
    budgets: Budgets = "256",
    tasks: Tasks = "fidelity,needles,regret",
    data: Data = None,
    tokens: Tokens = 2048,
    trials: Trials = 10,
    seed: Seed = 0,
    markdown: Markdown = False,
    json: Json = False,
    out: Out = None,
) -> None:
    """Compare bounded caches with the full one: predictions, needles, attention to what was evicted.

    The defaults take about seven minutes for SmolLM2-135M on two CPU cores.

    All policies get equal slots, and `kv MB` counts everything that they hold.
    """
    from mlx_kvprune.cli import output

    chosen = tasks_named(tasks)
    job, notes = prepare(model, _split(policies), _split(budgets), data, tokens, trials, seed)
    rows, more = run_tasks(chosen, job, out)
    for note in notes + more:
        output.say(f"[eval] {note}")
    show(rows, markdown, to_stderr=json)
    if json:
        about = {"model": model.model, "tokens": tokens, "trials": trials, "seed": seed}
        output.write_json({**about, "notes": notes + more, "rows": rows})


def tasks_named(text: str) -> list[str]:
    """The tasks of a comma-separated list.

    Raises:
        ValueError: an unknown one, or none.
    """
    names = _split(text)
    if not names or set(names) - set(TASKS):
        raise ValueError(f"[tasks] not a list of tasks; got {text!r}; try some of: {','.join(TASKS)}")
    return names


def prepare(
    model: ModelOptions, policies: list[str], budgets: list[str], data: Path | None, tokens: int, trials: int, seed: int
) -> tuple[Job, list[str]]:
    """Load everything, cheap checks first; notes name the conditions that this model cannot run.

    Raises:
        ValueError: what was asked for makes no sense, or the model's trained context is too short.
    """
    from mlx_kvprune.context import trained_context
    from mlx_kvprune.evals import conditions, texts

    wanted, documents = conditions.grid(policies, budgets, seed), texts.documents(data)
    loaded, tokenizer = load(model)
    limit = trained_context(loaded)
    if limit is not None and tokens > limit:
        raise ValueError(f"[tokens] longer than the model's trained context; got {tokens}; try {limit} or less")
    possible, notes = conditions.possible(loaded, wanted)
    return Job(loaded, tokenizer, documents, possible, tokens, trials, seed), notes


def run_tasks(tasks: Sequence[str], job: Job, out: Path | None = None) -> tuple[list[Row], list[str]]:
    """Rows of all tasks, and notes on what they left out; ``out`` gets the rows of a task when it is done."""
    from mlx_kvprune.evals import regret

    rows: list[Row] = []
    notes: list[str] = []
    if "regret" in tasks:
        regret.recording(job.model)  # refuses now, not after the other tasks
    with _progress(job, tasks) as tick:
        for task in tasks:
            found, more = run_task(task, job, tick)
            rows, notes = rows + found, notes + more
            _append(out, found)
    return rows, notes


def run_task(task: str, job: Job, tick: Tick) -> tuple[list[Row], list[str]]:
    """Rows of one task, and notes on what it left out."""
    from mlx_kvprune.evals import conditions, fidelity, needles, regret, texts

    if task == "needles":
        known = {"n_trials": job.trials, "n_tokens": job.tokens // 2, "seed": job.seed, "tick": tick}
        return needles.run(job.model, job.tokenizer, job.texts, job.conditions, **known), []
    run = {"fidelity": fidelity.run, "regret": regret.run}[task]
    some, notes = conditions.without_question(job.conditions)
    tokens = texts.excerpt(job.tokenizer, job.texts, job.tokens)
    return run(job.model, tokens, some, seed=job.seed, tick=tick), [f"{task}: {note}" for note in notes]


def work(task: str, job: Job) -> int:
    """How many tokens a task sends through the model."""
    from mlx_kvprune.evals import conditions, fidelity, needles, regret

    if task == "needles":
        return needles.work(job.trials, job.tokens // 2, job.conditions)
    some, _ = conditions.without_question(job.conditions)
    return {"fidelity": fidelity.work, "regret": regret.work}[task](job.tokens, some)


# -- tables ----------------------------------------------------------------------------------------------------------


def table(task: str, rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Header and cells of one task's rows."""
    if task == "needles":
        return _needle_table(rows)
    cells = [_fidelity_cells(row) if task == "fidelity" else _regret_cells(row) for row in rows]
    return list(cells[0]), [list(row.values()) for row in cells]


def _fidelity_cells(row: Row) -> dict[str, str]:
    near = {f"KL {x['from']}-{x['to']}": _fixed(x["kl"], ".3f") for x in row["by_distance"]}
    measures = {"KL": _with_interval(row, "kl", ".3f"), "change of NLL": _with_interval(row, "nll_change", "+.3f")}
    return {**_condition(row), **measures, "top-1": _with_interval(row, "agreement", ".1%"), **near, **_size(row)}


def _with_interval(row: Row, name: str, form: str) -> str:
    value, low, high = (_fixed(row[key], form) for key in (name, f"{name}_low", f"{name}_high"))
    return f"{value} [{low}, {high}]"


def _fixed(x: float, form: str) -> str:
    """A number in three places or so, without the minus of what rounds to zero."""
    return f"{round(x, 3) + 0.0:{form}}"


def _regret_cells(row: Row) -> dict[str, str]:
    lows = [x["from"] for x in row["by_age"]]
    names = [f"age {a}-{b}" for a, b in pairwise(lows)] + [f"age {lows[-1]}+"]
    ages = {name: f"{x['regret']:.2%}" for name, x in zip(names, row["by_age"], strict=True)}
    layer = row["worst_layer"]
    worst = f"{row['by_layer'][layer]:.1%} (layer {layer})" if row["regret"] else "-"
    return {**_condition(row), "regret": f"{row['regret']:.2%}", **ages, "worst layer": worst, **_size(row)}


def _needle_table(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    lines: dict[tuple[str, str], dict[str, str]] = {}
    for row in rows:
        full = f"full {row['exact_full']}/{row['trials']}" + ("" if row["counts"] else ", does not count")
        cells = lines.setdefault((row["policy"], row["budget"]), _condition(row))
        cells[f"{row['wording']} ({full})"] = f"{row['exact']}/{row['trials']}"
        cells[f"{row['wording']}: log p"] = f"{row['logprob']:.2f}"
        lines[row["policy"], row["budget"]] = cells
    for row in rows:
        lines[row["policy"], row["budget"]] |= _size(row)
    return list(next(iter(lines.values()))), [list(cells.values()) for cells in lines.values()]


def _condition(row: Row) -> dict[str, str]:
    return {"policy": row["policy"], "budget": row["budget"]}


def _size(row: Row) -> dict[str, str]:
    return {"slots": str(row["slots_held"]), "kv MB": f"{row['kv_bytes_peak'] / 1e6:.2f}"}


def as_markdown(title: str, header: Sequence[str], cells: Iterable[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [header, ["---", "---", *("---:" for _ in header[2:])], *cells]
    return "\n".join([f"**{title}**", "", *(f"| {' | '.join(line)} |" for line in lines), ""])


def show(rows: Sequence[Row], markdown: bool, to_stderr: bool) -> None:
    """Print one table per task."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    for task in dict.fromkeys(row["task"] for row in rows):
        header, cells = table(task, [row for row in rows if row["task"] == task])
        if markdown:
            print(as_markdown(task, header, cells), file=sys.stderr if to_stderr else sys.stdout)
            continue
        drawn = Table(title=task, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
        for i, name in enumerate(header):
            drawn.add_column(name, no_wrap=i < 2, justify="left" if i < 2 else "right")
        for line in cells:
            drawn.add_row(*line)
        Console(stderr=to_stderr).print(drawn)


# -- small things ----------------------------------------------------------------------------------------------------


def _split(text: str) -> list[str]:
    return list(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))


def _append(out: Path | None, rows: Iterable[Row]) -> None:
    if out is not None:
        with out.open("a", encoding="utf-8") as file:
            file.writelines(jsons.dumps(row) + "\n" for row in rows)


@contextmanager
def _progress(job: Job, tasks: Sequence[str]) -> Iterator[Tick]:
    """A bar on stderr that counts tokens; silent where stderr is no terminal."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("tokens", total=sum(work(name, job) for name in tasks))
        yield lambda n: bar.advance(task, n)
