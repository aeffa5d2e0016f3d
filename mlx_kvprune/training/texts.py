"""Excerpts of the user's texts, drawn so that the n-th is always the same."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from mlx_kvprune.evals.texts import CHARS_PER_TOKEN, Document, content, loaded, shipped
from mlx_kvprune.places import expand
from mlx_kvprune.training.recall import woven

MANY = 10  # documents of a file, from which on whole ones are held out
LINE = 400  # characters within which an excerpt begins with a line
TAIL = 0.15  # share of a document that is held out where there are fewer


@dataclass(frozen=True)
class Texts:
    """Documents of several files; each file is drawn as often as the others, each document by its length."""

    tokenizer: Any
    files: tuple[tuple[Document, ...], ...]
    seed: int = 0
    recall: float = 0.0  # share of the excerpts that have facts woven in
    what: str = "--data"  # in messages

    @classmethod
    def of(cls, tokenizer: Any, paths: Sequence[str | Path], seed: int = 0, recall: float = 0.0) -> Texts:
        """The documents of ``paths``, as ``evals.texts.loaded`` reads them; none for the one that the repository ships."""
        paths = list(paths) or [shipped()]
        return cls(tokenizer, tuple(tuple(loaded([path])) for path in paths), seed, recall)

    def split(self, length: int) -> tuple[Texts, Texts]:
        """What to train on, and what to hold out: every tenth document of a file, or the ends of its few documents."""
        halves = [_split(file, length) for file in self.files]
        train, held = tuple(a for a, _ in halves), tuple(b for _, b in halves)
        return replace(self, files=train), replace(self, files=held, seed=self.seed + 1, what="what is held out")

    def excerpt(self, n: int, length: int) -> list[int]:
        """The ``n``-th excerpt, of ``length`` tokens.

        Raises:
            ValueError: no text is as long.
        """
        rng = np.random.default_rng((self.seed, n))
        for _ in range(100):
            file = self.files[int(rng.integers(len(self.files)))]
            sizes = np.array([len(d.text) for d in file], float)
            text = file[int(rng.choice(len(file), p=sizes / sizes.sum()))].text
            start = int(rng.integers(max(1, len(text) - CHARS_PER_TOKEN * length // 2)))
            start = _beginning(text, start)
            piece = text[start : start + CHARS_PER_TOKEN * length]
            if rng.random() < self.recall:
                piece = woven(rng, piece, length, len(piece) / max(1, len(self.tokenizer.encode(piece))))
            tokens = list(self.tokenizer.encode(piece))
            if len(tokens) >= length:
                return tokens[:length]
        hint = f"--tokens {max(512, length // 512 * 256)}, or longer texts" if length > 512 else "longer texts"
        raise ValueError(f"[fit] no text of {length} tokens in {self.what}; got shorter ones; try {hint}")


def _beginning(text: str, start: int) -> int:
    """Where a line begins after ``start``; a word, where lines are long."""
    if not start:
        return 0
    line = text.find("\n", start, start + LINE)
    word = re.compile(r"\s").search(text, start, start + LINE)
    return line + 1 if line >= 0 else word.end() if word else start


def _split(file: tuple[Document, ...], length: int) -> tuple[tuple[Document, ...], tuple[Document, ...]]:
    if len(file) >= MANY:
        return tuple(d for i, d in enumerate(file) if i % MANY), file[::MANY]
    cuts = [len(d.text) - min(max(int(TAIL * len(d.text)), CHARS_PER_TOKEN * length), len(d.text) // 2) for d in file]
    parts = list(zip(file, cuts, strict=True))
    return tuple(replace(d, text=d.text[:at]) for d, at in parts), tuple(
        replace(d, text=d.text[at:]) for d, at in parts
    )


def plain(tokenizer: Any, tokens: Sequence[int]) -> str:
    """The text of an excerpt, without the token that begins a text."""
    begins = getattr(tokenizer, "bos_token_id", None)
    return tokenizer.decode(tokens[1:] if tokens and tokens[0] == begins else tokens)


def credits(paths: Sequence[str | Path]) -> tuple[str, ...]:
    """Files by name, with the licences that their lines name; the shipped document if there are none."""
    if not paths:
        return (f"{shipped().name} (public domain)",)
    return tuple(dict.fromkeys(f"{Path(path).name} ({licence_of(expand(path))})" for path in paths))


def licence_of(path: Path) -> str:
    """The licences in a JSONL file's ``licence`` fields."""
    if not path.name.removesuffix(".gz").endswith(".jsonl"):
        return "licence not known"
    found = [json.loads(line) for line in content(path).split("\n") if line.strip()]
    named = dict.fromkeys(str(x.get("licence") or x.get("license") or "licence not known") for x in found)
    return ", ".join(named)
