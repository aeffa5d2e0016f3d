"""``models`` and ``pull``: the models that have names, and how they come here."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from mlx_kvprune.cli.options import Dtype, Json, spread

MODELS_EPILOG = """Examples:

  mlx-kvprune models

  mlx-kvprune models --json | tail -1
"""
PULL_EPILOG = """Examples:

  mlx-kvprune pull smollm2-135m

  mlx-kvprune pull smollm2-135m --dtype 4bit

  mlx-kvprune pull mlx-community/Qwen3-0.6B-4bit
"""
Name = Annotated[
    str, typer.Argument(metavar="NAME", help="A name that `models` lists, a .gguf file, or a Hugging Face repo.")
]


@spread
def models(json: Json = False) -> None:
    """List the models that have a name of their own, their size and licence, and which are on disk."""
    from mlx_kvprune.cli import output
    from mlx_kvprune.models import known_models

    cards = known_models()
    if json:
        output.write_json({"models": [_fields_of(card) for card in cards]})
        return
    rows = [("NAME", "WHAT", "CONTEXT", "DOWNLOAD", "LICENCE", "ON DISK")]
    rows += [_row_of(card) for card in cards]
    output.table(rows)
    output.say("\nA directory, a .gguf file or a Hugging Face repo serves as well. `pull NAME` fetches one.", "dim")


def _fields_of(card: Any) -> dict[str, Any]:
    names = ("name", "title", "original", "licence", "architecture", "context", "download_bytes")
    return {**{name: getattr(card, name) for name in names}, "on_disk": list(card.on_disk)}


def _row_of(card: Any) -> tuple[str, ...]:
    from mlx_kvprune.cli.output import megabytes

    here = ", ".join(card.on_disk) or "no"
    return (card.name, card.title, f"{card.context:,}", megabytes(card.download_bytes), card.licence, here)


@spread
def pull(name: Name, dtype: Dtype = None, json: Json = False) -> None:
    """Fetch a model and convert it, checking SHA-256 sums; prints the directory, which stock mlx-lm opens as well."""
    from mlx_kvprune import models
    from mlx_kvprune.cli import output

    path = models.pull(name, dtype=dtype)
    if json:
        output.write_json({"model": name, "path": str(path)})
    else:
        output.write(f"{path}\n")
