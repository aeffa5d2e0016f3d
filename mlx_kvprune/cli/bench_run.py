"""One run of ``bench``: who and how much, the measuring, and what is told of it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_kvprune.cli.options import ModelOptions, load
from mlx_kvprune.places import check_file

if TYPE_CHECKING:
    from mlx_kvprune.bench.candidates import Candidate
    from mlx_kvprune.bench.reading import Plan, Tick
    from mlx_kvprune.bench.rows import Store

Fields = dict[str, Any]
WARM = 64  # tokens that everybody reads before anything counts
WIDE = 140  # columns of a table in a file
SHIFT = 8  # tokens by which the texts of a batch may differ


@dataclass(frozen=True)
class Amount:
    """How much is measured: lengths and batch sizes ascending, and the numbers of a ``Plan``."""

    contexts: list[int]
    sizes: list[int]
    batch_context: int
    rounds: int
    decode_tokens: int
    reps: int
    step: int

    @property
    def longest(self) -> int:
        """Tokens of text that are needed."""
        return max(self.contexts[-1], self.batch_context + SHIFT * max(self.sizes, default=0))


@dataclass(frozen=True)
class Who:
    """Who takes part: names of mlx-lm's own caches, policies with settings, and the budget of all."""

    stock: tuple[str, ...]
    policies: tuple[str, ...]
    budget: str


@dataclass
class Run:
    """All that one call of the verb needs.

    Attributes:
        known: the candidates of MLX.
        llama: the GGUF for llama.cpp, or None.
        tokens: the text.
        fields: of ``--json``.
    """

    model: Any
    plan: Plan
    amount: Amount
    known: list[Candidate]
    llama: Path | None
    tokens: list[int]
    store: Store
    ceiling: Fields
    notes: list[str]
    fields: Fields


def check_out(out: Path | None) -> None:
    """Refuse a file that could not be gone on with, before a model is loaded.

    Raises:
        ValueError: no such folder, a folder, no right to write, or a file of something else.
    """
    from mlx_kvprune.bench.rows import Store

    if out is not None:
        check_file(out, "out")
    Store(out, {})


def prepare(options: ModelOptions, amount: Amount, who: Who, out: Path | None) -> Run:
    """Load the model and find out who takes part, and what the machine allows.

    Raises:
        ValueError: the budget is too small, or a policy needs what this model cannot give.
    """
    from mlx_kvprune.bench import candidates
    from mlx_kvprune.bench.ceiling import ceilings, weight_nbytes
    from mlx_kvprune.bench.llama import gguf_of
    from mlx_kvprune.bench.reading import Plan
    from mlx_kvprune.bench.rows import Store
    from mlx_kvprune.bench.variants import text_of_length
    from mlx_kvprune.cli.output import working

    model, tokenizer = load(options)
    known, notes = candidates.candidates(model, who.stock, who.policies, who.budget)
    if not known:
        raise ValueError(f"[stock] nothing to measure; got {notes[0]}; try --policies window")
    weights, gguf = weight_nbytes(model), gguf_of(options.model)
    with working("measuring the bandwidth of a copy"):
        ceiling = ceilings(weights, amount.contexts, known)
    notes.append(about_llama(gguf))
    notes += _beyond(model, amount.contexts[-1])
    turns = amount.reps, amount.rounds, amount.decode_tokens, amount.step
    plan = Plan(tuple(amount.contexts), *turns, ceiling["copy_gb_s"][0], weights)
    tokens = text_of_length(tokenizer, amount.longest)
    about = about_run(options.model, model, who.budget, amount)
    fields = {**about, "weight_bytes": weights, "contexts": amount.contexts, "batch": amount.sizes}
    llama = None if isinstance(gguf, str) else gguf
    store = Store(out, about, machine_row(ceiling))
    return Run(model, plan, amount, known, llama, tokens, store, ceiling, notes, fields)


def _beyond(model: Any, longest: int) -> list[str]:
    from mlx_kvprune.ladder import trained_context

    limit = trained_context(model)
    if limit is None or longest <= limit:
        return []
    return [f"beyond the model's trained context of {limit:,} tokens only speed and memory mean something"]


def about_run(name: str, model: Any, budget: str, amount: Amount) -> Fields:
    """What rows have to share, to be shown in one table."""
    from mlx.utils import tree_flatten

    from mlx_kvprune.cli import machine
    from mlx_kvprune.kernels.launch import engine

    flat: Any = tree_flatten(model.parameters())
    kinds = sorted({str(x.dtype).removeprefix("mlx.core.") for _, x in flat})
    about = {"model": name, "dtype": "+".join(kinds), "budget": budget, "backend": engine() or "cpu"}
    told = machine.about()
    threads = machine.settings().get("OPENBLAS_NUM_THREADS", "all")
    return {**about, "prefill_step_size": amount.step, "chip": told["chip"], "threads": threads}


def machine_row(ceiling: Fields) -> Fields:
    """Command, machine, versions and time, for the file."""
    from mlx_kvprune.cli import machine
    from mlx_kvprune.evals.origin import command

    told = machine.about()
    kept = {name: told[name] for name in ("system", "architecture", "chip", "cores", "memory_bytes")}
    now = datetime.now(UTC).isoformat(timespec="seconds")
    more = {"blas": machine.blas_name(), "environment": machine.settings(), "copy_gb_s": ceiling["copy_gb_s"]}
    return {"command": command(), "date": now, "machine": kept, "versions": machine.versions(), **more}


# -- measuring -------------------------------------------------------------------------------------------------------


def measure(run: Run) -> None:
    """All that the store does not have yet."""
    from mlx_kvprune.bench.batches import batch_all
    from mlx_kvprune.bench.llama import NAME, LlamaReader
    from mlx_kvprune.bench.reading import CacheReader, read_all, warm_up

    by_name = {c.name: c for c in run.known}
    names, warm = [*by_name, *([NAME] if run.llama else [])], set()

    def make(name: str) -> Any:
        if name != NAME:
            if name not in warm:
                warm_up(run.model, by_name[name], run.tokens[:WARM], run.plan)
                warm.add(name)
            return CacheReader(run.model, by_name[name], run.plan)
        assert run.llama is not None
        room = run.plan.contexts[-1] + run.plan.rounds * (run.plan.decode_tokens + 2) + 1
        return LlamaReader(run.llama, room, run.plan, half_bytes(run.model))

    amount = run.amount
    work = amount.contexts[-1] * len(names) + sum(amount.sizes) * amount.batch_context * len(run.known)
    with _progress(amount.reps * work) as tick:
        read_all(make, names, run.tokens, run.plan, run.store, tick)
        told = (run.tokens, amount.sizes, amount.batch_context, run.plan, run.store, tick)
        run.notes += batch_all(run.model, run.known, *told)


def about_llama(gguf: Path | str) -> str:
    """That llama.cpp takes part, and on what terms; or why it does not."""
    from mlx_kvprune.bench.llama import threads

    if isinstance(gguf, str):
        return f"llama.cpp was left out: {gguf}"
    size = gguf.stat().st_size / 1e6
    terms = f"the file's own weights ({size:.0f} MB), a float16 cache, threads: {threads()}"
    return f"llama.cpp computes with {terms}; with --dtype 4bit MLX has the file's weights, too"


def half_bytes(model: Any) -> Callable[[int], float]:
    """Bytes of a full cache in float16 after so many tokens."""
    from mlx_kvprune.attach import hooked
    from mlx_kvprune.bench.llama import HALF

    shapes = [layer.shape for layer in hooked(model).rung.layers]
    each = HALF * sum(s.n_kv_heads * (s.key_dim + s.value_dim) for s in shapes)
    return lambda tokens: each * tokens


@contextmanager
def interruptible(store: Store) -> Iterator[None]:
    """Say what is kept when the user has had enough."""
    from mlx_kvprune.cli import output

    try:
        yield
    except KeyboardInterrupt:
        if store.path is None:
            output.say("[bench] interrupted; nothing was kept; try --out FILE, and the same command goes on")
        else:
            output.say(f"[bench] interrupted; {len(store.rows)} rows stand in {store.path}; the same command goes on")
        raise


@contextmanager
def _progress(total: int) -> Iterator[Tick]:
    from mlx_kvprune.progress import Bar

    done = 0
    with Bar() as bar:

        def tick(what: str, tokens: int) -> None:
            nonlocal done
            done += tokens
            bar(what, min(done, total), total)

        yield tick


# -- telling ---------------------------------------------------------------------------------------------------------


def tell(run: Run, markdown: bool, json: bool) -> None:
    """The ceiling, before anything is measured."""
    from mlx_kvprune.bench.tables import ceiling_table
    from mlx_kvprune.bench.variants import text_of
    from mlx_kvprune.cli import output

    about, copy = run.fields, text_of(run.ceiling["copy_gb_s"], ".1f")
    output.say(f"[bench] {about['model']}, {about['dtype']}, {about['backend']}, budget {about['budget']}; "
               f"a copy: {copy} GB/s; weights {output.megabytes(run.plan.weights)}")  # fmt: skip
    if run.store.kept:
        output.say(f"[bench] {run.store.kept} rows stand in {run.store.path} already")
    show("ceiling", ceiling_table(run.ceiling), markdown, json)


def finish(run: Run, markdown: bool, json: bool, plot: Path | None) -> None:
    """Tables, picture, and the JSON object."""
    from mlx_kvprune.bench import tables
    from mlx_kvprune.bench.rows import merged
    from mlx_kvprune.cli import output

    length = run.amount.batch_context
    reference = "stock full" if any(c.name == "stock full" for c in run.known) else run.known[0].name
    rows = [row for row in merged(run.store.rows, reference) if row.get("batch_context", length) == length]
    if reference != "stock full":
        output.say(f"[bench] `x stock` compares with {reference}")
    show("speed by context", tables.speed_table(rows), markdown, json)
    show("memory by context", tables.memory_table(rows), markdown, json)
    if run.amount.sizes:
        show(f"throughput by batch, {length} tokens each", tables.batch_table(rows), markdown, json)
    if plot is not None:
        from mlx_kvprune.bench.plot import draw

        copy = f"a copy: {run.ceiling['copy_gb_s'][0]:.1f} GB/s"
        draw(rows, plot, f"{copy}; {run.fields['model']}, {run.fields['dtype']}, budget {run.fields['budget']}")
    if json:
        output.write_json({**run.fields, "ceiling": run.ceiling, "notes": run.notes, "rows": rows})


def show(title: str, table: tuple[list[str], list[list[str]]], markdown: bool, to_stderr: bool) -> None:
    """Print a table."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    from mlx_kvprune.bench.tables import as_markdown

    header, cells = table
    if markdown:
        print(as_markdown(title, header, cells), file=sys.stderr if to_stderr else sys.stdout, flush=True)
        return
    drawn = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for i, name in enumerate(header):
        drawn.add_column(name, no_wrap=i < 2, justify="left" if i == 1 else "right")
    for line in cells:
        drawn.add_row(*line)
    terminal = (sys.stderr if to_stderr else sys.stdout).isatty()
    Console(stderr=to_stderr, width=None if terminal else WIDE).print(drawn)
