"""Haystacks: sentences of natural text in a row, and others put between them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from itertools import accumulate
from typing import Any

import numpy as np

from mlx_kvprune.evals.texts import sentences

Hay = tuple[list[str], list[int]]  # sentences, and their lengths in tokens
MOST_CHARS = 400_000
LONGEST = 256  # tokens of a sentence: what is longer is a table or a log, and is cut


def measured(tokenizer: Any, texts: Sequence[str], n_tokens: int) -> Hay:
    """The sentences of the texts with their lengths in tokens; of ``LONGEST`` at most.

    Raises:
        ValueError: they are fewer than ``n_tokens`` in all.
    """
    found = [part for s in sentences(texts, most_chars=MOST_CHARS) for part in _cut(tokenizer, s)]
    lengths = [_length(tokenizer, s) for s in found]
    if sum(lengths) < n_tokens:
        raise ValueError(
            f"[haystack] no text of {n_tokens} tokens; got {sum(lengths)}; try --haystack {sum(lengths)} or other --data"
        )
    return found, lengths


def _length(tokenizer: Any, text: str) -> int:
    return len(tokenizer.encode(" " + text, add_special_tokens=False))


def _cut(tokenizer: Any, sentence: str) -> list[str]:
    """A sentence, or halves of its words (or characters) until they are short enough."""
    n, words = _length(tokenizer, sentence), sentence.split(" ")
    if n <= LONGEST or len(sentence) == 1:
        return [sentence]
    parts, between = (words, " ") if len(words) > 1 else (list(sentence), "")
    half = len(parts) // 2
    return [x for part in (parts[:half], parts[half:]) for x in _cut(tokenizer, between.join(part))]


def window(rng: np.random.Generator, hay: Hay, n_tokens: int) -> Hay:
    """Sentences in a row from a random one on (after the last comes the first), and their lengths in tokens."""
    found, lengths = hay
    first, total, picked = int(rng.integers(len(found))), 0, []
    while total < n_tokens:
        picked.append((first + len(picked)) % len(found))
        total += lengths[picked[-1]]
    return [found[i] for i in picked], [lengths[i] for i in picked]


def hidden(found: Sequence[str], lengths: Sequence[int], needle: str, depth: float) -> str:
    """The sentences with ``needle`` between two of them, where ``depth`` of the tokens lie before it."""
    return strewn(found, lengths, [(needle, depth)])


def strewn(found: Sequence[str], lengths: Sequence[int], needles: Iterable[tuple[str, float]]) -> str:
    """The sentences with each needle between two of them, where its depth's share of the tokens lie before it."""
    ends = np.array([0, *accumulate(lengths)])
    places: dict[int, list[str]] = {}
    for needle, depth in needles:
        places.setdefault(int(np.abs(ends - depth * ends[-1]).argmin()), []).append(needle)
    parts = [(*places.get(i, ()), *found[i : i + 1]) for i in range(len(found) + 1)]
    return " ".join(part for some in parts for part in some)


def spread_depths(rng: np.random.Generator, n: int) -> list[float]:
    """``n`` depths, one drawn in each n-th of the text, in the order of the text."""
    return [float(x) for x in (np.arange(n) + rng.uniform(size=n)) / n]


def absent(words: Iterable[str], text: str) -> list[str]:
    """The words that do not stand in a text, whatever their case: answers that nothing else can give."""
    present = set(re.findall(r"[\w']+", text.lower()))
    return [word for word in words if not present.issuperset(re.findall(r"[\w']+", word.lower()))]


def number(rng: np.random.Generator, digits: int, text: str, taken: Iterable[str] = ()) -> str:
    """A number of so many digits that neither stands in the text nor is taken."""
    while True:
        drawn = str(rng.integers(10 ** (digits - 1), 10**digits))
        if drawn not in text and drawn not in taken:
            return drawn
