"""Paraphrase: facts of several kinds, asked in their own words and in others, none of which stands in the sentence.

Two facts to a trial, one answered by a word and one by a number. Only kinds whose other words SmolLM2-135M
understands (8 and 7 of 8 at full cache in 1,000 tokens; not trades, pets and instruments: 1, 1 and 4 of 8).
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from mlx_kvprune.evals import facts, hay, questions

KINDS = tuple(kind for kind in facts.KINDS if kind.name in ("city", "code"))


def make(rng: np.random.Generator, around: hay.Hay) -> questions.Trial:
    """A trial with one fact of each kind; wordings are named after the kind."""
    some = facts.drawn(rng, len(KINDS), " ".join(around[0]), KINDS)
    depths = [float(x) for x in rng.uniform(size=len(some))]
    text = hay.strewn(*around, zip([fact.told for fact in some], depths, strict=True))
    asks = [fact.ask(other) for fact in some for other in (False, True)]
    named = [
        replace(ask, wording=f"{fact.kind.name}, {ask.wording}") for fact, ask in zip(_twice(some), asks, strict=True)
    ]
    return questions.Trial(text, tuple(named))


def _twice(some: list[facts.Fact]) -> list[facts.Fact]:
    return [fact for fact in some for _ in range(2)]


TASK = questions.task("paraphrase", "facts asked in their own words and in others", make, "dilution")
