"""Excerpts of the user's texts, drawn so that the n-th is always the same."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mlx_kvprune.evals.texts import CHARS_PER_TOKEN, Document, loaded


@dataclass(frozen=True)
class Texts:
    """Documents of several files; each file is drawn as often as the others, each document by its length."""

    tokenizer: Any
    files: tuple[tuple[Document, ...], ...]
    seed: int = 0

    @classmethod
    def of(cls, tokenizer: Any, paths: Sequence[str | Path], seed: int = 0) -> Texts:
        """The documents of ``paths``, as ``evals.texts.loaded`` reads them."""
        return cls(tokenizer, tuple(tuple(loaded([path])) for path in paths), seed)

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
            start = text.find("\n", start) + 1 if start else 0
            tokens = list(self.tokenizer.encode(text[start : start + CHARS_PER_TOKEN * length]))
            if len(tokens) >= length:
                return tokens[:length]
        raise ValueError(
            f"[fit] no texts of {length} tokens; got shorter ones; try --tokens {length // 2}, or more --data"
        )
