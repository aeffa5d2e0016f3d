"""``fit``: train gates for a model."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mlx_kvprune.cli.options import Json, ModelOptions, load, spread
from mlx_kvprune.places import expand

if TYPE_CHECKING:
    from mlx_kvprune.training.fit import Fitted
    from mlx_kvprune.training.plan import Plan

EPILOG = """Examples:

  mlx-kvprune fit --stage utility --data books.jsonl.gz --data manual.md --held-out other.txt

  mlx-kvprune fit --data books.jsonl.gz --steps 600 --minutes 90 --plot curve.png

  mlx-kvprune fit --method kvzap --data books.jsonl.gz --out gates/kvzap.safetensors

  mlx-kvprune fit --method spkv --lora 8 --data books.jsonl.gz --steps 2000

  mlx-kvprune fit --method spkv --quality 0.03 --form shared --start gates-retention.safetensors --data books.jsonl.gz

  mlx-kvprune generate --policy retention --gates gates-retention.safetensors --budget 512 --prompt - < chapter.txt

Methods: retention (TRIM-KV's decay; one budget over all heads), kvzap and fastkvzip (what a second reading attends to; no
gradients through the model), dms (delayed eviction), spkv (what is worth writing; --lora or --full as published).
"""
Fields = dict[str, Any]
TEXT, HOW, FILES = "Texts", "Training", "Files"


def _option(*flags: str, panel: str, metavar: str | None = None, help: str, **more: Any) -> Any:
    return typer.Option(*flags, metavar=metavar, help=help, rich_help_panel=panel, **more)


Method = Annotated[
    str, _option("--method", panel=HOW, metavar="NAME", help="retention, spkv, kvzap, fastkvzip or dms; see below.")
]
Stage = Annotated[
    str | None,
    _option(
        "--stage",
        panel=HOW,
        metavar="NAME",
        help="utility: forward passes only, minutes; distill: through the model's output, an hour or more; both. Default: "
        "what the method has.",
    ),
]
Data = Annotated[
    list[Path] | None,
    _option(
        "--data",
        panel=TEXT,
        metavar="FILE",
        help="Text to train on: .txt, .md, .jsonl (a field text; a field licence goes into the card), also .gz; may be "
        "given several times, and each is drawn equally often. Default: the example document, which is little.",
    ),
]
HeldOut = Annotated[
    list[Path] | None,
    _option(
        "--held-out", panel=TEXT, metavar="FILE", help="Text to measure on. Default: a part of --data is held out."
    ),
]
NTexts = Annotated[
    int | None,
    _option("--texts", panel=TEXT, metavar="N", min=1, help="Texts to read. Default: 40; 20 where each is read twice."),
]
Tokens = Annotated[
    int | None,
    _option("--tokens", panel=TEXT, metavar="N", min=1, help="Of a text, a multiple of 256. Default: 2048."),
]
Memory = Annotated[
    float,
    _option("--memory", panel=TEXT, metavar="GB", min=0.001, max=1e6, help="The most that texts take; fewer are held."),
]
Steps = Annotated[int | None, _option("--steps", panel=HOW, metavar="N", min=1, help="Of distillation. Default: 600.")]
Minutes = Annotated[
    float | None,
    _option(
        "--minutes",
        panel=HOW,
        metavar="X",
        min=0.0,
        help="Distil no longer than this, reading counted; rates fall in as many steps.",
    ),
]
Form = Annotated[
    str | None,
    _option(
        "--form",
        panel=HOW,
        metavar="NAME",
        help="Of the gates: linear, mlp, shared (one last projection for all layers), sink, dms. Default: the method's.",
    ),
]
Hidden = Annotated[
    int | None, _option("--hidden", panel=HOW, metavar="N", min=1, help="Width of an MLP's hidden layer. Default: 48.")
]
Rate = Annotated[
    float | None, _option("--rate", panel=HOW, metavar="X", help="Highest rate of learning. Default: the form's.")
]
BiasRate = Annotated[
    float | None,
    _option(
        "--bias-rate",
        panel=HOW,
        metavar="X",
        help="Of what a head gets beside the others, which distillation learns faster than the rest. Default: 0.01.",
    ),
]
Heat = Annotated[
    str | None,
    _option(
        "--heat",
        panel=HOW,
        metavar="FROM:TO",
        help="With --target budget: temperature of eviction, which falls; warmer says more of what is far from being kept. "
        "Default: 0.4:0.15.",
    ),
]
Target = Annotated[
    str | None,
    _option(
        "--target",
        panel=HOW,
        metavar="NAME",
        help="decay: TRIM-KV's own loss (default); budget: the student holds what the cache would. Only for retention.",
    ),
]
Capacity = Annotated[
    float | None,
    _option(
        "--capacity",
        panel=HOW,
        metavar="X",
        help="Weight of what gates hold beyond their share, or of all with --quality; 0: none. Default: 1.",
    ),
]
Surprisal = Annotated[
    float | None,
    _option(
        "--surprisal",
        panel=HOW,
        metavar="X",
        help="Weight of the next token's loss beside the divergence from the full cache. Default: 1 with target decay and "
        "for spkv without --quality, else 0.",
    ),
]
Within = Annotated[
    float | None,
    _option(
        "--quality",
        panel=HOW,
        metavar="NATS",
        help="spkv: write as little as leads every text to about this divergence from the full cache, instead of an eighth of "
        "every text: sizes then follow what a text needs.",
    ),
]
Uniform = Annotated[
    bool | None,
    _option(
        "--uniform/--global",
        panel=HOW,
        help="A budget for each head, or one for all layers and heads. Default: as the method's policy does.",
        show_default=False,
    ),
]
Lora = Annotated[
    int, _option("--lora", panel=HOW, metavar="RANK", min=0, help="spkv: adapters of the model learn, too.")
]
Full = Annotated[bool, _option("--full", panel=HOW, help="spkv: all weights of the model learn, too.")]
Seed = Annotated[
    int, _option("--seed", panel=HOW, metavar="N", min=0, max=2**32 - 1, help="Of gates and of all that is drawn.")
]
Check = Annotated[
    int | None,
    _option(
        "--check", panel=HOW, metavar="N", min=1, help="Steps between two looks at held-out texts. Default: 10 looks."
    ),
]
Patience = Annotated[
    int | None,
    _option("--patience", panel=HOW, metavar="N", min=1, help="Looks without gain, after which it stops. Default: 6."),
]
Fresh = Annotated[
    int | None,
    _option(
        "--fresh",
        panel=TEXT,
        metavar="N",
        min=0,
        help="Steps after which a text is replaced; 0: never. Default: 12; never where the model learns.",
    ),
]
Recall = Annotated[
    float,
    _option(
        "--recall",
        panel=TEXT,
        metavar="SHARE",
        help="Weave invented facts into this share of the texts, which come back later: gates learn to keep what a question "
        "may be about.",
    ),
]
Answers = Annotated[
    float,
    _option(
        "--answers",
        panel=TEXT,
        metavar="SHARE",
        help="This share of the texts are conversations: the model is asked about 1,024 tokens, or half of --tokens, and "
        "answers with as many: gates learn what it needs while it speaks.",
    ),
]
Out = Annotated[
    Path | None, _option("--out", panel=FILES, metavar="FILE", help="The gate file. Default: gates-METHOD.safetensors.")
]
Start = Annotated[
    str,
    _option(
        "--start",
        panel=FILES,
        metavar="FILE",
        help="Go on from the gates of this file (or hub repo) instead of the first stage; with --stage distill. spkv also "
        "goes on from gates of retention (with --form shared), which is the best start it has.",
    ),
]
Restart = Annotated[
    bool, _option("--restart", panel=FILES, help="Forget a training that was cut short, and write over --out.")
]
Plot = Annotated[
    Path | None,
    _option("--plot", panel=FILES, metavar="FILE", help="Draw the curves: .png or .svg (needs matplotlib)."),
]


@dataclass(frozen=True)
class TextOptions:
    """What is read."""

    data: Data = None
    held_out: HeldOut = None
    texts: NTexts = None
    tokens: Tokens = None
    memory: Memory = 4.0
    fresh: Fresh = None
    recall: Recall = 0.0
    answers: Answers = 0.0


@dataclass(frozen=True)
class HowOptions:
    """How gates are trained."""

    method: Method = "retention"
    stage: Stage = None
    steps: Steps = None
    minutes: Minutes = None
    form: Form = None
    hidden: Hidden = None
    rate: Rate = None
    bias_rate: BiasRate = None
    heat: Heat = None
    target: Target = None
    capacity: Capacity = None
    surprisal: Surprisal = None
    quality: Within = None
    uniform: Uniform = None
    lora: Lora = 0
    full: Full = False
    seed: Seed = 0
    check: Check = None
    patience: Patience = None
    start: Start = ""


@spread
def fit(
    model: ModelOptions,
    how: HowOptions,
    text: TextOptions,
    out: Out = None,
    restart: Restart = False,
    plot: Plot = None,
    json: Json = False,
) -> None:
    """Train gates, which say of each token what it will be worth, for a model; policies with gates need such a file.

    The model's own weights stay as they are. Texts are read with the full cache first: about 130 tokens a second for
    SmolLM2-135M on two CPU cores, so that 40 texts of 2,048 tokens take 11 minutes. `--stage utility` is done soon
    after; `--stage both` goes on to distil through the model's output.

    A training that is cut short goes on when the same command is given again. The file's card says what it was trained on,
    with which licences, how long, how far its output is from the full cache's on held-out texts, and what that does not say.
    """
    from mlx_kvprune.cli import output
    from mlx_kvprune.training import fit as training

    plan = plan_of(model, how, text)
    path = expand(out or f"gates-{plan.method}.safetensors")
    if path.is_dir():  # also the empty path
        raise ValueError(f"[out] a folder; got {str(path)!r}; try a file in it")
    path = path if path.suffix == ".safetensors" else path.with_name(f"{path.name}.safetensors")
    training.check_early(plan, path, restart, how.minutes)
    _check_plot(plot, plan)
    if not plan.data:
        output.say("[fit] no --data: training on the example document, which is little; gates will know little else")
    loaded, tokenizer = load(model)
    with watching() as watch:
        found = training.fit(loaded, tokenizer, plan, path, watch, restart=restart, minutes=how.minutes)
    _tell(found, plot, json)


def plan_of(model: ModelOptions, how: HowOptions, text: TextOptions) -> Plan:
    """What the options ask for."""
    from mlx_kvprune.training.plan import Plan

    scope = None if how.uniform is None else "head" if how.uniform else "global"
    given: Fields = {k: v for k, v in vars(how).items() if k not in ("uniform", "minutes", "heat")}
    given |= {"heat": None if how.heat is None else heat_of(how.heat)}
    given |= {"scope": scope, "texts": text.texts, "tokens": text.tokens, "fresh": text.fresh}
    given |= {"recall": text.recall, "answers": text.answers}
    given |= {"data": _names(text.data), "held_out": _names(text.held_out), "memory": int(text.memory * 10**9)}
    return Plan(model=model.model + (f" ({model.dtype})" if model.dtype else ""), **given).checked()


def heat_of(text: str) -> tuple[float, float]:
    """Two temperatures.

    Raises:
        ValueError: something else.
    """
    try:
        first, last = (float(x) for x in text.split(":"))
    except ValueError:
        raise ValueError(f"[heat] not two numbers; got {text!r}; try 0.4:0.15") from None
    return first, last


def _names(paths: list[Path] | None) -> tuple[str, ...]:
    return tuple(str(expand(path)) for path in paths or ())


def _check_plot(plot: Path | None, plan: Plan) -> None:
    from mlx_kvprune.bench import plot as pictures

    pictures.check(plot)
    if plot is not None and "distill" not in plan.stages:
        raise ValueError("[plot] nothing to draw; got a training without distillation; try it without --plot")


@dataclass
class _Screen:
    """A bar on a terminal, and lines; only lines elsewhere."""

    bar: Any
    task: Any
    lines: list[str] = field(default_factory=list)

    def stage(self, what: str, done: float, total: float, note: str = "") -> None:
        self.bar.update(self.task, description=what + note, completed=done, total=total)

    def say(self, text: str) -> None:
        self.bar.console.print(text, highlight=False, markup=False, soft_wrap=True)


@contextmanager
def watching() -> Iterator[_Screen]:
    """Stage, steps, loss and time left on stderr."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        yield _Screen(bar, bar.add_task("reading", total=None))


def _tell(found: Fitted, plot: Path | None, json: bool) -> None:
    from mlx_kvprune.cli import output

    for line in output.aligned(_rows(found)):
        print(line, file=sys.stderr if json else sys.stdout)
    output.say(f"[fit] {found.path}: try --policy {found.card.method} --gates {found.path}")
    if found.adapters:
        output.say(f"[fit] {found.adapters}: what the model learned; the gates belong to it")
    if plot is not None:
        from mlx_kvprune.training.plot import draw

        draw(found.progress, plot, f"{found.card.method}, {found.card.model}")
    if json:
        curves = {"curve": found.progress.curve, "checks": found.progress.checks}
        output.write_json({"out": str(found.path), **vars(found.card), **curves})


def _rows(found: Fitted) -> list[tuple[str, ...]]:
    """Quality as a table."""
    rows = [("held to", "KL from the full cache", "")]
    for row in found.card.quality:
        what = f"{row['budget']}: {row['slots']} slots per head" if "budget" in row else f"threshold {row['threshold']}"
        rows.append((what, f"{row['kl']:.4f}", f"{row['kept']:.1%} kept" if "kept" in row else ""))
    return rows
