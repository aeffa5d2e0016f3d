"""Multi-key: several needles of one form, any of which may be asked for (RULER's MK-NIAH; Hsieh et al. 2024, arXiv 2404.06654).

Each is asked of a copy of the same cache: all of them must be held at once.
"""

from __future__ import annotations

import numpy as np

from mlx_kvprune.evals import facts, hay, questions

KEYS = 4  # RULER's default
CODE = next(kind for kind in facts.KINDS if kind.name == "code")


def make(rng: np.random.Generator, around: hay.Hay, keys: int = KEYS) -> questions.Trial:
    """A trial with ``keys`` secrets of different people, spread over the text; each is asked for."""
    some = facts.drawn(rng, keys, " ".join(around[0]), [CODE])
    text = hay.strewn(*around, zip([fact.told for fact in some], hay.spread_depths(rng, keys), strict=True))
    return questions.Trial(text, tuple(fact.ask(wording=f"one of {keys} keys") for fact in some))


TASK = questions.task("multikey", "several needles at once, each asked for", make, "capacity")
