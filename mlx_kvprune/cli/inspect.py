"""``inspect``: an HTML page that shows what a bounded cache kept of a text."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mlx_kvprune.cli.cache_options import Budget, CacheOptions, settings_of, side_by_side
from mlx_kvprune.cli.options import Json, ModelOptions, Seed, load, spread
from mlx_kvprune.places import check_file
from mlx_kvprune.settings import CacheSettings

if TYPE_CHECKING:
    from mlx_kvprune.documents import Prompt
    from mlx_kvprune.report.trace import Trace

EPILOG = """Examples:

  mlx-kvprune inspect chapter.txt --policies snapkv,window --budget 512 --open

  mlx-kvprune inspect report.pdf -q "Who signed the contract?" --out contract.html
"""
WITHOUT_QUESTION, WITH_QUESTION = "snapkv", "probe"  # the defaults
LONGEST_NAME = 80  # characters of a page's own name

File = Annotated[str, typer.Argument(metavar="FILE", help="Text, Markdown or PDF; `-` is standard input.")]
Question = Annotated[
    str | None,
    typer.Option("--question", "-q", metavar="TEXT", help="Read the text with this question in mind, as `ask` does."),
]
Out = Annotated[
    Path | None,
    typer.Option("--out", "-o", metavar="FILE", help="The page. Default: the text's and the policies' names, here."),
]
Tokens = Annotated[
    int | None, typer.Option("--tokens", metavar="N", min=1, help="Read the first N tokens of the text alone.")
]
Open = Annotated[bool, typer.Option("--open", help="Show the page in the browser.")]

Policies = Annotated[
    str | None,
    typer.Option(
        "--policy",
        "--policies",
        metavar="NAMES",
        help="What is kept when the cache is full; several, with commas between them, are shown side by side. "
        f"Default: {WITHOUT_QUESTION}, or {WITH_QUESTION} with a question.",
        rich_help_panel="Cache",
    ),
]


@dataclass(frozen=True)
class InspectCache(CacheOptions):
    """As elsewhere, but several policies can be compared."""

    policy: Policies = None  # type: ignore[assignment]
    budget: Budget = "512"


@spread
def inspect(
    model: ModelOptions,
    cache: InspectCache,
    file: File,
    question: Question = None,
    tokens: Tokens = None,
    out: Out = None,
    open: Open = False,
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """Write an HTML page that shows what a bounded cache kept of a text: which tokens, for how long, in which heads.

    The page is one file that loads nothing from anywhere. Its path goes to standard output.
    """
    from mlx_kvprune.cli import output
    from mlx_kvprune.policy import knows_question

    names = policies_named(cache.policy, question)
    settings = [settings_of(each, seed) for each in side_by_side(cache, names)]
    place = place_of(out, file, names)
    text = _read(file)
    loaded, tokenizer = load(model)
    prompt = prompt_of(tokenizer, text, question, tokens, pinned=not any(map(knows_question, names)))
    traces = _traces(loaded, prompt, settings)
    _write(place, tokenizer, prompt, file, question or "", model.model, traces)
    for trace in traces:
        output.say(_line(trace), "dim")
    if open:
        _open(place)
    if json:
        output.write_json(
            {"path": str(place), "bytes": place.stat().st_size, "model": model.model, **_figures(traces, prompt)}
        )
    else:
        output.write(f"{place}\n")


def policies_named(given: str | None, question: str | None) -> list[str]:
    """The policies to compare.

    Raises:
        ValueError: none, an unknown one, one that keeps everything, or one that needs a question where none is asked.
    """
    from mlx_kvprune.policy import find

    if question is not None and not question.strip():
        raise ValueError("[inspect] an empty question; got ''; try -q 'What is ...?', or none")
    given = given if given is not None else WITH_QUESTION if question else WITHOUT_QUESTION
    names = list(dict.fromkeys(name.strip() for name in given.split(",") if name.strip()))
    if not names:
        raise ValueError(f"[inspect] no policy; got {given!r}; try --policy {WITHOUT_QUESTION}")
    for name in names:
        scorer = find(name).scorer
        if scorer is None:
            raise ValueError(f"[inspect] keeps everything, so that there is nothing to see; got {name!r}; try window")
        if "question" in scorer.needs and not question:
            raise ValueError(f"[inspect] policy {name} needs a question; got none; try -q 'What is ...?'")
    return names


def place_of(out: Path | None, file: str, names: list[str]) -> Path:
    """Where the page goes.

    Raises:
        ValueError: a folder, or a file in a folder that is not there or may not be written to.
    """
    stem = "text" if file == "-" else re.sub(r"[^\w.-]+", "-", Path(file).stem).strip("-.") or "text"
    place = out or Path(f"{stem[:LONGEST_NAME]}.{'-'.join(names)[:LONGEST_NAME]}.html")
    check_file(place, "out", renamed=True)
    return place.absolute()


def _read(file: str) -> str:
    from mlx_kvprune.documents import read

    try:
        return read(file)
    except ValueError as error:
        raise ValueError(str(error).replace("[ask]", "[inspect]", 1)) from error


def prompt_of(tokenizer: Any, text: str, question: str | None, tokens: int | None, pinned: bool) -> Prompt:
    """What is read: the text, and before it what `ask` puts there, if there is a question."""
    from mlx_kvprune.documents import Prompt, prompt_for

    asked = prompt_for(tokenizer, text, question, pinned=pinned) if question else None
    prompt = asked or Prompt([], list(tokenizer.encode(text)), [])
    return replace(prompt, document=prompt.document[:tokens])


def _traces(model: Any, prompt: Prompt, settings: list[CacheSettings]) -> list[Trace]:
    """Read the prompt once for each policy; what cannot be done is said before the first one is read."""
    from mlx_kvprune import attach, documents
    from mlx_kvprune.attach import attachment_of, make_from_settings
    from mlx_kvprune.progress import Bar

    if attachment_of(model) is None:
        attach(model, policy="window", budget=None, quiet=True)
    chosen = [documents.settings_to_read(model, s, prompt, 0, "inspect") for s in settings]
    caches = [make_from_settings(model, s) for s in chosen]
    with Bar() as bar:
        return [_follow(model, prompt, caches.pop(0), s.policy, bar, (i, len(chosen))) for i, s in enumerate(chosen)]


def _follow(
    model: Any, prompt: Prompt, cache: list[Any], policy: str, bar: Callable[..., None], run: tuple[int, int]
) -> Trace:
    from mlx_kvprune.report.trace import follow

    def show(done: int, total: int) -> None:
        bar(f"reading under {policy}", run[0] * total + done, run[1] * total)

    return follow(model, prompt.before + prompt.document, cache, progress=show)


def _write(
    place: Path, tokenizer: Any, prompt: Prompt, file: str, question: str, model: str, traces: list[Trace]
) -> None:
    from mlx_kvprune.report import page
    from mlx_kvprune.report.pieces import pieces

    name = "standard input" if file == "-" else Path(file).name
    read = page.Text(name, pieces(tokenizer, prompt.before + prompt.document), len(prompt.before), question)
    page.write(place, page.page(read, model, traces))


def _line(trace: Trace) -> str:
    from mlx_kvprune.cli.output import bytes_line

    share, local = trace.is_held().mean(), trace.could_be_local
    note = f"; layers {local} hold their floor alone: try --local-layers {local}" if local else ""
    line = f"{trace.settings.policy}: each head holds {share:.1%} of {trace.n_tokens:,} tokens; "
    return line + bytes_line(trace.report) + note


def _figures(traces: list[Trace], prompt: Prompt) -> dict[str, Any]:
    """Fields of ``--json``: a text's length, and of each policy what its cache holds."""
    names = ("policy", "allocator", "budget", "tokens_seen", "slots_held", "kv_bytes", "kv_bytes_peak", "kv_bytes_full")
    runs = []
    for trace in traces:
        found = {name: getattr(trace.report, name) for name in names}
        share = round(float(trace.is_held().mean()), 6)
        runs.append({**found, "held_share": share, "heads": len(trace.rows), "could_be_local": trace.could_be_local})
    return {"prompt_tokens": len(prompt.before) + len(prompt.document), "runs": runs}


def _open(place: Path) -> None:
    import webbrowser

    from mlx_kvprune.cli import output

    if not webbrowser.open(place.as_uri()):
        output.say("[open] found no browser here")
