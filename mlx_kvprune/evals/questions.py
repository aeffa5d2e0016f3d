"""What tasks that ask about a text share: trials made by a generator, read, asked and judged."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mlx_kvprune.evals import hay, judge
from mlx_kvprune.evals.asking import Ask, outcomes, reads
from mlx_kvprune.evals.conditions import Condition
from mlx_kvprune.evals.job import Job, Measured, Task, Tick


@dataclass(frozen=True)
class Trial:
    """A text and what is asked about it; ``about`` goes into each outcome."""

    text: str
    asks: tuple[Ask, ...]
    about: dict[str, Any] = field(default_factory=dict, compare=False)


Make = Callable[[np.random.Generator, hay.Hay], Trial]  # a trial out of sentences in a row


def trials(make: Make, tokenizer: Any, texts: Sequence[str], n: int, n_tokens: int, seed: int = 0) -> list[Trial]:
    """``n`` trials of about ``n_tokens`` tokens; each depends on its number and the seed alone.

    Raises:
        ValueError: the texts are too short, or hold all the words that answers could be.
    """
    found = hay.measured(tokenizer, texts, n_tokens)
    rngs = [np.random.default_rng([seed, number]) for number in range(n)]
    return [make(rng, hay.window(rng, found, n_tokens)) for rng in rngs]


def measure(job: Job, trial: Any, conditions: Sequence[Condition], tick: Tick) -> Measured:
    """The outcomes of a trial's questions, for each condition."""
    for condition in conditions:
        found = outcomes(job.model, job.tokenizer, trial.text, trial.asks, condition)
        tick(work(job, trial, [condition]))
        yield condition, {"outcomes": [{**trial.about, **outcome} for outcome in found]}


def work(job: Job, trial: Any, conditions: Sequence[Condition]) -> int:
    """How many tokens ``measure`` sends through the model."""
    return job.haystack * sum(reads(trial.asks, condition) for condition in conditions)


def task(name: str, about: str, make: Make, bound: str) -> Task:
    """A task whose trials ``make`` makes."""
    items = lambda job: trials(make, job.tokenizer, job.plain, job.trials, job.haystack, job.seed)
    return Task(name, about, items, measure, work, functools.partial(judge.rows, name), bound=bound)
