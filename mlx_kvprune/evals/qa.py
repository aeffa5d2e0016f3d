"""The questions that the data themselves ask (``--data`` with a benchmark's JSONL), judged by forcing the answers.

An answer is right if one of the possible ones is what the model would have said; its log-probability is the best
one's. RULER's ``outputs`` are all wanted, but those of its question answering: there each is asked for with those before it
given, and the worst one counts. Texts that are too long are cut in the middle, as
LongBench does (Bai et al. 2023, arXiv 2308.14508).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from mlx_kvprune.evals import judge
from mlx_kvprune.evals.asking import Ask, encode, outcomes
from mlx_kvprune.evals.conditions import Condition
from mlx_kvprune.evals.job import Job, Measured, Task, Tick
from mlx_kvprune.evals.texts import Document

OPENING = "Answer:"


def items(job: Job) -> list[Document]:
    """The first documents with a question and an answer, ``trials`` of them at most.

    Raises:
        ValueError: none has.
    """
    found = [document for document in job.documents if document.question and document.answers]
    if not found:
        raise ValueError(
            "[qa] no questions in the data; got texts alone; try a JSONL file with context, input and answers"
        )
    return found[: job.trials]


def middle_cut(tokenizer: Any, text: str, n_tokens: int) -> str:
    """The text, or its first and last halves of ``n_tokens``."""
    tokens = encode(tokenizer, text)
    if len(tokens) <= n_tokens:
        return text
    half = n_tokens // 2
    return tokenizer.decode(tokens[:half]) + tokenizer.decode(tokens[-half:])


def notes(job: Job) -> list[str]:
    """That texts are cut, if some are: what the answer stands in may be in the middle."""
    some = items(job)
    longer = sum(len(encode(job.tokenizer, document.text)) > job.haystack for document in some)
    if not longer:
        return []
    return [f"qa: {longer} of {len(some)} texts are longer than --haystack {job.haystack} and are cut in the middle"]


def measure(job: Job, document: Document, conditions: Sequence[Condition], tick: Tick) -> Measured:
    """The best answer's outcome for each condition."""
    text = middle_cut(job.tokenizer, document.text, job.haystack)
    asks = asked(document)
    for condition in conditions:
        found = outcomes(job.model, job.tokenizer, text, asks, condition)
        tick(work(job, document, [condition]))
        decides = min if document.every else max
        yield condition, {"outcomes": [decides(found, key=lambda x: (x["exact"], x["logprob"]))]}


def asked(document: Document) -> list[Ask]:
    """A question for each answer; if all are wanted, after those before it."""
    given = lambda i: "".join(f" {answer}," for answer in document.answers[:i]) if document.every else ""
    return [
        Ask(document.name, document.question, OPENING + given(i), answer) for i, answer in enumerate(document.answers)
    ]


def work(job: Job, document: Document, conditions: Sequence[Condition]) -> int:
    """How many tokens ``measure`` sends through the model, at most."""
    return job.haystack * len(conditions)


TASK = Task("qa", "the data's own questions", items, measure, work, functools.partial(judge.rows, "qa"), notes=notes)
