"""The table of tasks. A new one joins by one file and one line."""

from __future__ import annotations

import functools

from mlx_kvprune.evals import (
    density,
    documents_asked,
    fidelity,
    generation,
    judge,
    multikey,
    multivalue,
    needles,
    paraphrase,
    qa,
    questions,
    regret,
    texts,
    tracking,
    turns,
)
from mlx_kvprune.evals.job import Job, Task, which_texts


def _excerpts(job: Job) -> list[list[int]]:
    return texts.excerpts(job.tokenizer, job.plain, job.tokens, job.texts, job.seed)


def _tokens(job: Job) -> int:
    return job.tokens


FIDELITY = Task(
    "fidelity",
    "predictions against the full cache's",
    _excerpts,
    fidelity.measure,
    lambda job, tokens, some: fidelity.work(len(tokens), some, fidelity.GROUP),
    fidelity.rows,
    length=_tokens,
    question=False,
    own=which_texts,
)
REGRET = Task(
    "regret",
    "attention that is wanted again",
    _excerpts,
    regret.measure,
    lambda job, tokens, some: regret.work(len(tokens), some, fidelity.GROUP),
    regret.rows,
    length=_tokens,
    question=False,
    check=lambda job: regret.recording(job.model),
    own=which_texts,
)
NEEDLES = Task(
    "needles",
    "a number to be found again, asked in its own words and in others",
    lambda job: needles.trials(job.tokenizer, job.plain, job.trials, job.haystack, job.seed),
    questions.measure,
    questions.work,
    functools.partial(judge.rows, "needles"),
    bound="dilution",
    alone=False,
)
TASKS = {
    task.name: task
    for task in (
        FIDELITY,
        NEEDLES,
        REGRET,
        paraphrase.TASK,
        multikey.TASK,
        multivalue.TASK,
        tracking.TASK,
        turns.TASK,
        documents_asked.AWARE,
        documents_asked.ASK,
        generation.TASK,
        density.TASK,
        qa.TASK,
    )
}


def named(names: list[str]) -> list[Task]:
    """The tasks of those names.

    Raises:
        ValueError: an unknown one, or none.
    """
    if not names or set(names) - set(TASKS):
        raise ValueError(f"[tasks] not a list of tasks; got {','.join(names)!r}; try some of: {','.join(TASKS)}")
    return [TASKS[name] for name in names]
