"""Multi-value: several values of one key, all of which are asked for (RULER's MV-NIAH; Hsieh et al. 2024, arXiv 2404.06654).

The answer names them in the order of the text. ``all values`` is one answer with all of them; ``each value`` judges one at
a time, the earlier ones given. RULER has four values; two are what a model of 135M parameters can list.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mlx_kvprune.evals import facts, hay, questions
from mlx_kvprune.evals.asking import Ask

VALUES = 2
TOLD = "One of the secret numbers of {name} is {x}."
ASKED = "What are all the secret numbers of {name} mentioned in the text?"
OPENING = "The secret numbers of {name} mentioned in the text are"


def make(rng: np.random.Generator, around: hay.Hay, values: int = VALUES) -> questions.Trial:
    """A trial with ``values`` secrets of one person, spread over the text."""
    text = " ".join(around[0])
    name = str(rng.choice(hay.absent(facts.NAMES, text)))
    drawn: list[str] = []
    for _ in range(values):
        drawn.append(hay.number(rng, 4, text, drawn))
    told = [TOLD.format(name=name, x=x) for x in drawn]
    return questions.Trial(
        hay.strewn(*around, zip(told, hay.spread_depths(rng, values), strict=True)), asks(name, drawn)
    )


def asks(name: str, values: Sequence[str]) -> tuple[Ask, ...]:
    """All values in one answer, and each of them after those before it."""
    question, opening = ASKED.format(name=name), OPENING.format(name=name)
    found = [Ask("all values", question, opening, _listed(values))]
    for value in values:
        before = _listed(values)[: _listed(values).rindex(value)].rstrip()
        found.append(Ask("each value", question, f"{opening} {before}".rstrip(), value))
    return tuple(found)


def _listed(values: Sequence[str]) -> str:
    return " and ".join(filter(None, (", ".join(values[:-1]), values[-1])))


TASK = questions.task("multivalue", "several values of one key, all asked for", make, "capacity")
