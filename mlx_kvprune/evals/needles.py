"""Needles: one sentence in a haystack of natural text, and a question after it.

    ... The secret number of Marta is 48213. ...    What is the secret number of Marta?

Secrets have 4 or 5 digits; depths run evenly from the start to the end of the text. The question is asked in the
needle's own words (``verbatim``) and in others (``paraphrased``): what leans on likeness loses the second first.

The haystack is read without knowing the question; ``asking`` says how answers are judged.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from mlx_kvprune.evals import hay
from mlx_kvprune.evals.asking import Ask

NAMES = ("Marta", "Boris", "Celia", "Dmitri", "Elena", "Farid", "Greta", "Hugo", "Ingrid", "Jorge", "Keiko", "Lionel")


@dataclass(frozen=True)
class Wording:
    """How a question is put; ``{name}`` is whose secret it is."""

    name: str
    question: str
    opening: str  # of the answer


NEEDLE = "The secret number of {name} is {secret}."
WORDINGS = (
    Wording("verbatim", "What is the secret number of {name}?", "The secret number of {name} is"),
    Wording(
        "paraphrased", "Which number does {name} keep hidden from others?", "The number that {name} keeps hidden is"
    ),
)


@dataclass(frozen=True)
class Trial:
    """One haystack with its needle.

    Attributes:
        text: the haystack.
        depth: the needle's place, 0 (start) to 1 (end).
        name: whose secret it is.
        secret: the answer.
    """

    text: str
    depth: float
    name: str
    secret: str

    def fill(self, pattern: str) -> str:
        return pattern.format(name=self.name, secret=self.secret)

    @property
    def asks(self) -> tuple[Ask, ...]:
        """The question in every wording."""
        return tuple(Ask(w.name, self.fill(w.question), self.fill(w.opening), self.secret) for w in WORDINGS)

    @property
    def about(self) -> dict[str, Any]:
        return {"depth": self.depth, "secret": self.secret}


def trials(tokenizer: Any, texts: Sequence[str], n: int, n_tokens: int, seed: int = 0) -> list[Trial]:
    """``n`` trials whose haystacks have about ``n_tokens`` tokens; the same ones for the same seed.

    Raises:
        ValueError: the texts are too short.
    """
    found = hay.measured(tokenizer, texts, n_tokens)
    rng = np.random.default_rng(seed)
    depths = rng.permutation((np.arange(n) + 0.5) / n)
    return [_trial(rng, i, float(depth), hay.window(rng, found, n_tokens)) for i, depth in enumerate(depths)]


def _trial(rng: np.random.Generator, i: int, depth: float, around: hay.Hay) -> Trial:
    secret = hay.number(rng, 4 + i % 2, " ".join(around[0]))
    made = Trial("", depth, str(rng.choice(NAMES)), secret)
    return replace(made, text=hay.hidden(*around, made.fill(NEEDLE), depth))
