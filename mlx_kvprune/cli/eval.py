"""``eval``: quality against the full cache."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mlx_kvprune.cli.options import Json, ModelOptions, load, spread
from mlx_kvprune.evals.presets import DEFAULTS, LENGTHS, chosen
from mlx_kvprune.places import check_file, expand

if TYPE_CHECKING:
    from mlx_kvprune.evals.job import Grid, Job, Task, Tick
    from mlx_kvprune.evals.store import Store

EPILOG = """Examples:

  mlx-kvprune eval --quick

  mlx-kvprune eval --policies all --budgets 1/4,1/8 --tasks fidelity --data book.txt --out rows.jsonl --plot kl.png

  mlx-kvprune eval --tasks needles,multikey --policies snapkv --allocators uniform,global --kv-bits none,4 --trials 50

Tasks: fidelity, regret (attention that is wanted again), needles, paraphrase, multikey, multivalue, tracking, turns (a
conversation), aware (the question known before reading), ask (documents), generation, density, qa (the data's own questions).
"""
Row = dict[str, Any]


def _option(*flags: str, metavar: str | None = None, help: str, **more: Any) -> Any:
    return typer.Option(*flags, metavar=metavar, help=help, rich_help_panel="Evaluation", **more)


WIDE = 400  # columns of a table that is written to a file
ROOMY = 200  # from which a terminal has room for all that is known
UNDRAWN = ("regret", "generation", "density")  # tasks without a line against bytes


def _default(name: str) -> str:
    return f"Default: {DEFAULTS[name]}."


Policies = Annotated[
    str | None,
    _option(
        "--policies",
        metavar="NAMES",
        help=f"Comma-separated, or `all`; full, window and random always come along. {_default('policies')}",
    ),
]
Budgets = Annotated[
    str | None,
    _option(
        "--budgets",
        metavar="SIZES",
        help="Comma-separated: 256 (tokens per KV head), 8MB (bytes in all), or 1/4 (of the text, at the bytes that window "
        f"takes for as many tokens). {_default('budgets')}",
    ),
]
Allocators = Annotated[
    str | None, _option("--allocators", metavar="NAMES", help=f"Comma-separated. {_default('allocators')}")
]
Bits = Annotated[
    str | None,
    _option(
        "--kv-bits", metavar="NUMBERS", help="Comma-separated: 8, 4 ...; none is the model's own type, the default."
    ),
]
Equal = Annotated[
    str | None,
    _option(
        "--equal",
        metavar="WHAT",
        help="What all conditions of a budget have in common: bytes or slots. Default: bytes for fractions, else slots.",
    ),
]
Gates = Annotated[
    str,
    _option(
        "--gates",
        metavar="PLACES",
        help="Learned gates, for policies that ask some: files, folders or hub repos, comma-separated. Default: those that "
        "come along.",
    ),
]
Local = Annotated[
    str,
    _option(
        "--local-layers",
        metavar="LAYERS",
        help="Of the policies, not of the controls: layers that hold sinks and the newest tokens alone (0,4-6; auto).",
    ),
]
Tasks = Annotated[
    str | None, _option("--tasks", metavar="NAMES", help=f"Comma-separated; see below. {_default('tasks')}")
]
Data = Annotated[
    list[Path] | None,
    _option(
        "--data",
        metavar="FILE",
        help="Text: .txt, .md, or a benchmark's .jsonl (context, input, answers; or text); also .gz; may be given several "
        "times. Default: the document in examples/documents/.",
    ),
]
Threshold = Annotated[
    str,
    _option(
        "--threshold",
        metavar="X|SHARE",
        help="For spkv, kvzap, fastkvzip and dms: drop what the gate finds worth less. A number, or the share that is to stay "
        "as the card of the gates knows it: 1/4. Sizes then depend on the text.",
    ),
]
Tokens = Annotated[int | None, _option("--tokens", min=64, help=f"Length of the text. {_default('tokens')}")]
Haystack = Annotated[
    int | None, _option("--haystack", min=64, help="Length of texts with questions. Default: half of --tokens.")
]
Trials = Annotated[
    int | None,
    _option("--trials", min=1, help=f"Questions of each kind; believe a difference from 50 on. {_default('trials')}"),
]
Texts = Annotated[
    int | None, _option("--texts", min=1, help=f"Texts of the tasks without questions. {_default('texts')}")
]
AnswerTokens = Annotated[
    int | None,
    _option("--answer-tokens", min=1, help=f"Of a generated answer, at most. {_default('answer_tokens')}"),
]
Seed = Annotated[
    int,
    _option(
        "--seed", min=0, max=2**32 - 1, help="Of everything that is drawn, and which excerpts of the texts are read."
    ),
]
Quick = Annotated[
    bool, _option("--quick", help="A grid of about 70,000 tokens: under ten minutes on two quiet CPU cores.")
]
GridName = Annotated[
    str,
    _option(
        "--grid",
        metavar="NAME",
        help="standard: all policies at 1/4, 1/8 and 1/16; frontier: four of them from 1/2 to 1/32; other options go before.",
    ),
]
Markdown = Annotated[bool, _option("--markdown", help="Print the tables as Markdown.")]
Out = Annotated[
    Path | None,
    _option(
        "--out",
        metavar="FILE",
        help="Append each finished piece of work to this JSONL file, and skip what stands there: a killed run goes on.",
    ),
]
Plot = Annotated[
    Path | None, _option("--plot", metavar="FILE", help="Draw KL and scores against bytes (needs matplotlib).")
]


@spread
def eval_(
    model: ModelOptions,
    policies: Policies = None,
    budgets: Budgets = None,
    allocators: Allocators = None,
    kv_bits: Bits = None,
    equal: Equal = None,
    gates: Gates = "",
    local_layers: Local = "",
    threshold: Threshold = "",
    tasks: Tasks = None,
    data: Data = None,
    tokens: Tokens = None,
    haystack: Haystack = None,
    trials: Trials = None,
    texts: Texts = None,
    answer_tokens: AnswerTokens = None,
    seed: Seed = 0,
    quick: Quick = False,
    grid: GridName = "",
    markdown: Markdown = False,
    json: Json = False,
    out: Out = None,
    plot: Plot = None,
) -> None:
    """Compare bounded caches with the full one: predictions, questions, conversations, attention to what was evicted.

    `kv MB` counts everything that is held. Only questions that the full cache answers in 80% of the trials count.
    """
    from mlx_kvprune.bench import plot as pictures
    from mlx_kvprune.cli import output
    from mlx_kvprune.evals import tasks as known

    given = {"policies": policies, "budgets": budgets, "allocators": allocators, "kv_bits": kv_bits, "equal": equal}
    given |= {"tasks": tasks, "tokens": tokens, "haystack": haystack, "trials": trials, "texts": texts}
    given |= {"answer_tokens": answer_tokens, "gates": gates, "local_layers": local_layers, "threshold": threshold}
    if quick and grid:
        raise ValueError(f"[grid] --quick is a grid of its own; got --grid {grid} as well; try one of them")
    wanted = chosen("quick" if quick else grid, **given)
    some = known.named(split(wanted["tasks"]))
    pictures.check(plot)
    if plot is not None and not {task.name for task in some} - set(UNDRAWN):
        raise ValueError(f"[plot] nothing to draw; got --tasks {wanted['tasks']}; try it without --plot")
    out = expand(out) if out is not None else None
    if out is not None:
        check_file(out, "out")
    job = prepare(model, wanted, data or [], seed)
    rows, notes = run_tasks(some, job, out)
    for note in notes:
        output.say(f"[eval] {note}")
    show(rows, markdown, to_stderr=json)
    if json:
        about = {name: wanted[name] for name in LENGTHS}
        output.write_json({"model": model.model, **about, "seed": seed, "notes": notes, "rows": rows})
    if plot is not None:
        from mlx_kvprune.evals.frontier import panels
        from mlx_kvprune.report.frontier import draw

        draw(panels(rows), plot)


def split(text: str) -> list[str]:
    """The parts of a comma-separated list, each once."""
    return list(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))


def prepare(model: ModelOptions, wanted: dict[str, Any], data: Sequence[Path], seed: int) -> Job:
    """Load everything, cheap checks first.

    Raises:
        ValueError: what was asked for makes no sense, or the model's trained context is too short.
    """
    from mlx_kvprune.evals.job import Job
    from mlx_kvprune.evals.texts import loaded
    from mlx_kvprune.ladder import trained_context

    grid, documents = grid_of(wanted), loaded(data)
    grid.conditions(wanted["tokens"], seed)
    found, tokenizer = load(model)
    limit, longest = trained_context(found), max(wanted["tokens"], wanted["haystack"])
    if limit is not None and longest > limit:
        name = "tokens" if wanted["tokens"] > limit else "haystack"
        raise ValueError(f"[{name}] longer than the model's trained context; got {longest}; try {limit} or less")
    lengths = {name: wanted[name] for name in LENGTHS}
    return Job(found, tokenizer, documents, grid, **lengths, seed=seed, about=about(model, documents))


def grid_of(wanted: dict[str, Any]) -> Grid:
    """The grid that options name.

    Raises:
        ValueError: bits, allocators or what is equal are not known.
    """
    from mlx_kvprune.evals.conditions import expanded
    from mlx_kvprune.evals.job import EQUAL, Grid
    from mlx_kvprune.policy import find
    from mlx_kvprune.settings import ALLOCATORS, BITS

    if wanted["equal"] not in EQUAL:
        raise ValueError(f"[equal] not known; got {wanted['equal']!r}; try one of: {', '.join(EQUAL)}")
    allocators, bits = split(wanted["allocators"]), split(str(wanted["kv_bits"]))
    if not allocators or set(allocators) - set(ALLOCATORS):
        raise ValueError(f"[allocators] not known; got {wanted['allocators']!r}; try some of: {','.join(ALLOCATORS)}")
    if not bits or set(bits) - {"none", *map(str, BITS)}:
        raise ValueError(
            f"[kv-bits] not known; got {wanted['kv_bits']!r}; try some of: none,{','.join(map(str, BITS))}"
        )
    widths = tuple(None if x == "none" else int(x) for x in bits)
    policies, budgets = (tuple(split(wanted[name])) for name in ("policies", "budgets"))
    gates = tuple(split(wanted["gates"]))
    least = wanted["threshold"].strip()
    found = Grid(policies, budgets, tuple(allocators), widths, wanted["equal"], gates, wanted["local_layers"], least)
    if least and not any(find(name).drops for name in expanded(policies)):
        raise ValueError(f"[threshold] no policy that has one; got {','.join(policies)}; try --policies spkv")
    if found.gates and not any(find(name).gates for name in expanded(policies)):
        raise ValueError(f"[gates] no policy that asks some; got {','.join(policies)}; try --policies retention")
    return found


def about(model: ModelOptions, documents: Sequence[Any]) -> dict[str, Any]:
    """What names the model and the data in stored rows."""
    import hashlib

    asked = [part for x in documents if x.question for part in (x.question, *x.answers)]
    texts = hashlib.sha256("\0".join([*(x.text for x in documents), *asked]).encode()).hexdigest()[:12]
    names = ",".join(dict.fromkeys(document.name for document in documents))
    return {"model": model.model, "dtype": model.dtype or "default", "data": f"{names} {texts}"}


def run_tasks(tasks: Sequence[Task], job: Job, out: Path | None = None) -> tuple[list[Row], list[str]]:
    """Rows of all tasks, and notes on what they left out; ``out`` keeps every piece of work when it is done."""
    from mlx_kvprune.evals import job as jobs
    from mlx_kvprune.evals.origin import origin
    from mlx_kvprune.evals.store import Store

    notes: list[str] = []
    sizes: dict[str, int] = {}
    jobs.check(job, tasks)
    for task in tasks:
        some, left_out = task.conditions(job)
        notes += [*task.notes(job), *left_out]
        sizes |= jobs.gate_sizes(job, some)
    notes = list(dict.fromkeys(notes))
    store = Store(out, origin() | ({"notes": notes} if notes else {}) | ({"gate_bytes": sizes} if sizes else {}))
    with _progress(job, tasks, store) as tick:
        jobs.run(job, tasks, store, tick)
    return [row for task in tasks for row in jobs.rows(job, task, store)], notes


def show(rows: Sequence[Row], markdown: bool, to_stderr: bool) -> None:
    """Print one table per task; on a narrow terminal without the columns by distance, which Markdown and JSON have."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    from mlx_kvprune.evals import tables

    console = Console(stderr=to_stderr)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console = Console(stderr=to_stderr, width=WIDE)  # a file has room for all columns
    roomy = console.width >= ROOMY
    for task in dict.fromkeys(row["task"] for row in rows):
        mine = [row for row in rows if row["task"] == task]
        header, cells = tables.table(task, mine)
        if markdown:
            text = tables.as_markdown(tables.title(task, mine), header, cells)
            print(text, file=sys.stderr if to_stderr else sys.stdout)
            continue
        shown = [i for i, name in enumerate(header) if roomy or not tables.BY_DISTANCE.fullmatch(name)]
        drawn = Table(title=tables.title(task, mine), title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
        for i in shown:
            drawn.add_column(header[i], no_wrap=i < 2, justify="left" if i < 2 else "right")
        for line in cells:
            drawn.add_row(*(line[i] for i in shown))
        console.print(drawn)


@contextmanager
def _progress(job: Job, tasks: Sequence[Task], store: Store) -> Iterator[Tick]:
    """A bar on stderr that counts the tokens that are left; silent where stderr is no terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    from mlx_kvprune.evals.job import left

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("tokens", total=left(job, tasks, store) if console.is_terminal else None)
        yield lambda n: bar.advance(task, n)
