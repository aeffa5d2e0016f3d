"""Variable tracking: a chain of assignments strewn over the text (RULER's VT; Hsieh et al. 2024, arXiv 2404.06654).

    VAR KQX = 48213.   ...   VAR MZP = VAR KQX.   ...   VAR BTL = VAR MZP.

RULER's own question is which variables have the value (``names``); what value a variable has after so many hops
(``value, 0 hops``) is the part of it that a small model can do, if any.
"""

from __future__ import annotations

import numpy as np

from mlx_kvprune.evals import hay, questions
from mlx_kvprune.evals.asking import Ask

HOPS = 2  # RULER has four
LETTERS = tuple("BCDFGHJKLMNPQRSTVWXZ")


def make(rng: np.random.Generator, around: hay.Hay, hops: int = HOPS) -> questions.Trial:
    """A trial with a chain of ``hops`` assignments after the first, in the order of the text."""
    text = " ".join(around[0])
    names, value = _names(rng, hops + 1, text), hay.number(rng, 5, text)
    sources = [value, *(f"VAR {name}" for name in names[:-1])]
    told = [f"VAR {name} = {source}." for name, source in zip(names, sources, strict=True)]
    made = hay.strewn(*around, zip(told, hay.spread_depths(rng, hops + 1), strict=True))
    return questions.Trial(made, asks(names, value))


def asks(names: list[str], value: str) -> tuple[Ask, ...]:
    """RULER's question, and the value of each variable."""
    listed = " and ".join((", ".join(names[:-1]), names[-1]))
    found = [
        Ask(
            "names",
            f"Find all variables that are assigned the value {value} in the text above.",
            f"The variables that are assigned the value {value} are",
            listed,
        )
    ]
    for hops, name in enumerate(names):
        found.append(
            Ask(f"value, {hops} hops", f"What is the value of VAR {name}?", f"The value of VAR {name} is", value)
        )
    return tuple(found)


def _names(rng: np.random.Generator, n: int, text: str) -> list[str]:
    found: list[str] = []
    while len(found) < n:
        name = "".join(rng.choice(LETTERS, size=3))
        if name not in text and name not in found:
            found.append(name)
    return found


TASK = questions.task("tracking", "chains of variable assignments", make, "capacity")
