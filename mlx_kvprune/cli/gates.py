"""``gates``: show a gate file's card, and bring gate files to the hub and from it."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from mlx_kvprune.cli.options import Json, spread
from mlx_kvprune.places import expand

EPILOG = """Examples:

  mlx-kvprune gates show smollm2-135m

  mlx-kvprune gates show gates-retention.safetensors

  mlx-kvprune gates pull OWNER/NAME

  mlx-kvprune gates push gates-retention.safetensors OWNER/NAME
"""

app = typer.Typer(help="Learned gates: look at them, and share them over the Hugging Face hub.", epilog=EPILOG)
Where = Annotated[
    str,
    typer.Argument(
        metavar="FILE|MODEL|REPO",
        help="A gate file, a folder of them, a model that `models` lists, or OWNER/NAME on the hub.",
    ),
]
File = Annotated[Path, typer.Argument(metavar="FILE", help="A gate file, as `fit` writes it.")]
Repo = Annotated[str, typer.Argument(metavar="OWNER/NAME", help="A repository on the hub.")]
Private = Annotated[bool, typer.Option("--private", help="If the repository is new, only its owner sees it.")]
BaseModel = Annotated[
    str, typer.Option("--base-model", metavar="REPO", help="The model's own repository, which the README links to.")
]


@spread
def show(where: Where, json: Json = False) -> None:
    """Show what gate files say of themselves: method, training, thresholds, measurements, limits."""
    from mlx_kvprune.cli import output

    cards = cards_at(where)
    if json:
        output.write_json({"gates": [{"path": str(path), **asdict(card), "cost": _cost(path)} for path, card in cards]})
        return
    for i, (path, card) in enumerate(cards):
        output.write("\n" if i else "")
        _show(path, card)


@spread
def pull(repo: Repo, json: Json = False) -> None:
    """Fetch gate files from the hub; prints their folder. What is cached already also serves without a network."""
    from mlx_kvprune.cli import output
    from mlx_kvprune.gates import hub

    path = hub.pull(repo)
    found = _in_folder(path, repo)
    if json:
        output.write_json({"repo": repo, "path": str(path), "gates": [str(p) for p, _ in found]})
    else:
        output.write(f"{path}\n")


@spread
def push(file: File, repo: Repo, private: Private = False, base_model: BaseModel = "", json: Json = False) -> None:
    """Upload a gate file, with a README made of its card, to a repository of yours; prints its address."""
    from mlx_kvprune.cli import output
    from mlx_kvprune.gates import hub

    url = hub.push(file, repo, private, model=base_model)
    if json:
        output.write_json({"repo": repo, "url": url, "file": hub.hub_name(file)})
    else:
        output.write(f"{url}\n")


for verb in (show, pull, push):
    app.command(verb.__name__)(verb)


def cards_at(where: str) -> list[tuple[Path, Any]]:
    """Gate files that a user names (a file, a folder, a known model, a hub repository), and their cards.

    Raises:
        ValueError: there are none.
    """
    from mlx_kvprune import models
    from mlx_kvprune.gates import hub
    from mlx_kvprune.gates.files import read_card

    path = expand(where)
    if not path.exists() and where in {card.name for card in models.known_models()}:
        path = models.models_dir() / where
    if path.is_file():
        return [(path, read_card(path))]
    if not path.is_dir() and (
        where.count("/") != 1 or where.startswith((".", "~", "/")) or path.suffix == ".safetensors"
    ):
        raise ValueError(f"[gates] no such file or repository; got {where!r}; try a path, or owner/name on the hub")
    return _in_folder(path if path.is_dir() else hub.pull(where), where)


def _in_folder(folder: Path, where: str) -> list[tuple[Path, Any]]:
    from mlx_kvprune.gates.files import gate_files_in, read_card

    found = [(path, read_card(path)) for path in gate_files_in(folder)]
    if not found:
        raise ValueError(f"[gates] no gate files there; got {where!r}; try a file that `mlx-kvprune fit` wrote")
    return found


def _cost(path: Path) -> dict[str, int]:
    """What gates cost beside their model."""
    from mlx_kvprune.gates.files import load

    gates = load(path)[0]
    return {"numbers": gates.numbers, "bytes": gates.nbytes, "flops": gates.flops}


def _show(path: Path, card: Any) -> None:
    from mlx_kvprune.cli import output
    from mlx_kvprune.gates import hub

    output.write(f"{path}\n")
    cost = "{numbers:,} numbers, {bytes:,} bytes in memory, {flops:,} FLOP a token".format(**_cost(path))
    for term, fact in [*hub.facts(card), ("cost", cost), *([("limits", card.limits)] if card.limits else [])]:
        output.write(f"  {term:<11}{fact}\n")
    for share, value in card.thresholds.items():
        output.write(f"  threshold  {value:g} keeps {share}\n")
    if card.quality:
        lines = output.aligned([tuple(row) for row in hub.table(card.quality)])
        output.write("".join(f"  {line}\n" for line in lines))
