"""Gate files on the Hugging Face hub: ordinary repositories with ``gates*.safetensors`` and a README made of the card."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mlx_kvprune.gates.files import SUFFIX, Card, is_gate_file, read_card
from mlx_kvprune.places import expand
from mlx_kvprune.reasons import of_hub

FILES = (f"gates*{SUFFIX}", "README.md")
MARK = "<!-- written by `mlx-kvprune gates push` -->"  # a README without it is somebody's own
TAGS = ("mlx", "mlx-kvprune", "kv-cache", "gates")


def pull(repo: str) -> Path:
    """Fetch a repository's gate files and README; what is cached is not fetched again, and serves without a network.

    Returns:
        The folder that they are in.

    Raises:
        ValueError: no such repository, or no network and nothing cached.
    """
    from huggingface_hub import snapshot_download

    _check(repo)
    with _errors("fetch", repo, "a network, the repository's name (OWNER/NAME), or a file"):
        return Path(snapshot_download(repo, allow_patterns=list(FILES)))


def push(path: str | Path, repo: str, private: bool = False, *, model: str = "") -> str:
    """Upload a gate file and a README made of its card; the repository is made if it is not there.

    A README that somebody else wrote there stays as it is.

    Args:
        path: of the gate file.
        repo: ``OWNER/NAME``.
        private: whether a repository that is made now can be seen by its owner alone.
        model: the hub repository of the model that the gates are for, for the README's ``base_model``.

    Returns:
        The address of the repository.

    Raises:
        ValueError: not a gate file, or the hub refuses.
    """
    from huggingface_hub import HfApi

    path = expand(path)
    card, api, name = read_card(path), HfApi(), hub_name(path)
    _check(repo)
    with _errors("push to", repo, "`hf auth login` first, and a repository of your own"):
        url = str(api.create_repo(repo, private=private, exist_ok=True))
        about = _readme_there(api, repo, name, card, model)
        api.upload_file(path_or_fileobj=str(path), path_in_repo=name, repo_id=repo)
        if about is not None:
            api.upload_file(path_or_fileobj=about.encode(), path_in_repo="README.md", repo_id=repo)
    return url


def hub_name(path: Path) -> str:
    """Under which name a file is uploaded: ``gates*.safetensors``."""
    name = path.name if path.name.endswith(SUFFIX) else path.name + SUFFIX
    return name if name.startswith("gates") else f"gates-{name}"


def _readme_there(api: Any, repo: str, name: str, card: Card, model: str) -> str | None:
    """The README of what the repository will hold: this gate file, and its other ones; None if it has one of its own."""
    there = api.list_repo_files(repo)
    if "README.md" in there and MARK not in Path(api.hf_hub_download(repo, "README.md")).read_text(encoding="utf-8"):
        return None
    others = [x for x in there if x.startswith("gates") and x.endswith(SUFFIX) and x != name]
    paths = [(x, Path(api.hf_hub_download(repo, x))) for x in sorted(others)]
    cards = [(x, read_card(path)) for x, path in paths if is_gate_file(path)]
    return readme(repo, [(name, card), *cards], model)


def readme(repo: str, cards: Sequence[tuple[str, Card]], model: str = "") -> str:
    """A README in the hub's form: front matter, how to use them, and a section for each gate file.

    Args:
        repo: ``OWNER/NAME``.
        cards: names of the gate files, and what they say of themselves.
        model: hub repository of the model; else what the first card says, if that looks like one.
    """
    first = cards[0][1]
    return "\n".join(
        [*_front(first, model), *_usage(repo, first), *(line for x in cards for line in _section(*x)), MARK, ""]
    )


def _front(card: Card, model: str) -> list[str]:
    """YAML; strings as JSON, which YAML reads."""
    named = card.model.count("/") == 1 and " " not in card.model and not expand(card.model).exists()
    base = model or (card.model if named else "")
    lines = ["---", "library_name: mlx"]
    lines += [f"license: {json.dumps(card.licence.lower())}"] if card.licence else []
    lines += [f"base_model: {json.dumps(base)}"] if base else []
    return [*lines, "tags:", *(f"- {tag}" for tag in TAGS), "---", ""]


def _usage(repo: str, card: Card) -> list[str]:
    model = f" for {card.model}" if card.model else ""
    command = f"mlx-kvprune generate --policy {card.method} --gates {repo} --budget 512 --prompt ..."
    return [
        f"# {repo.partition('/')[2]}",
        "",
        f"Learned gates{model}: they decide which tokens a bounded KV cache of mlx-kvprune keeps.",
        "The model itself is not here, and is not changed.",
        "",
        "```",
        command,
        "```",
        "",
    ]


def _section(name: str, card: Card) -> list[str]:
    lines = [f"## {name}", "", "| | |", "|---|---|"]
    lines += [f"| {_cell(term)} | {_cell(fact)} |" for term, fact in facts(card)]
    if card.thresholds:
        lines += ["", "| share kept | threshold |", "|---|---|"]
        lines += [f"| {_cell(share)} | {value:g} |" for share, value in card.thresholds.items()]
    if card.quality:
        lines += ["", *_markdown(table(card.quality))]
    return [*lines, "", *(["Limits: " + card.limits, ""] if card.limits else [])]


def facts(card: Card) -> list[tuple[str, str]]:
    """What a card says in single lines: what it leaves open is left out."""
    found = [
        ("method", card.method),
        ("model", card.model),
        ("trained by", card.stage),
        ("data", "; ".join(card.data)),
        ("tokens", f"{card.tokens:,}" if card.tokens else ""),
        ("minutes", card.minutes),
        ("budget", card.budget),
        ("licence", card.licence),
        ("settings", ", ".join(f"{k}={v}" for k, v in card.settings.items())),
    ]
    return [(term, str(fact)) for term, fact in found if fact]


def table(rows: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Rows of measurements under the names of their columns, in the order in which they first come."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    return [names, *([_number(row.get(name, "")) for name in names] for row in rows)]


def _number(x: Any) -> str:
    return f"{x:.4g}" if isinstance(x, float) else str(x)


def _markdown(rows: list[list[str]]) -> list[str]:
    lines = [f"| {' | '.join(map(_cell, row))} |" for row in rows]
    return [lines[0], "|" + "---|" * len(rows[0]), *lines[1:]]


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _check(repo: str) -> None:
    owner, slash, name = repo.partition("/")
    if not (owner.strip(".~") and slash and name) or "/" in name or name.endswith(SUFFIX):
        raise ValueError(f"[gates] not a repository on the hub; got {repo!r}; try OWNER/NAME")


@contextmanager
def _errors(what: str, repo: str, hint: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if str(error).startswith("[gates]"):
            raise
        raise ValueError(f"[gates] cannot {what} {repo}; got {of_hub(error)}; try {hint}") from error
