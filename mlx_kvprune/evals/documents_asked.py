"""Documents asked as ``mlx-kvprune ask`` asks them: is it worth knowing the question, and what is left of full's answers?

``aware``: a few facts in a text, each asked twice: of a cache that was read without the question (``question after``), and of
one that was read with the question in front, pinned, which policies that probe also probe with (``question before and after``).

``ask``: the claim of question-aware reading. Facts of several kinds in documents, each asked of what the cache holds
(``as held``) and after that was read again (``read again``), as the command does it. Policies that probe read each
document once per question, all others once; ``kept`` is the share of what the full cache answers.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from mlx_kvprune.documents import Prompt, Reading, prompt_for
from mlx_kvprune.evals import facts, hay, judge, questions
from mlx_kvprune.evals.asking import Ask, Outcome, encode, following, forced
from mlx_kvprune.evals.conditions import CHUNK, Condition, feed, sizes
from mlx_kvprune.evals.job import Job, Measured, Task, Tick
from mlx_kvprune.evals.questions import Trial
from mlx_kvprune.forward import pruned
from mlx_kvprune.report import CacheReport, report
from mlx_kvprune.reread import read_again

# How a condition reads: its name, or empty where outcomes say it; how; and whether for each question anew.
Reader = Callable[[Job, Trial, Condition], Iterator[Outcome]]
Ways = Callable[[Condition], list[tuple[str, Reader, bool]]]
FACTS_AWARE, FACTS_ASK = 2, 5  # to a document
# What SmolLM2-135M finds with the full cache in 4,000 tokens: 6 of 6, against 1 of 4 for pets and instruments.
KINDS = tuple(kind for kind in facts.KINDS if kind.name in ("city", "trade", "code"))
AFTER, BOTH = "question after", "question before and after"
AS_HELD, AGAIN = "as held", "read again"
ANSWER = 32  # tokens of an answer that reading again leaves room for
N_SINK, SPARE = 4, 4  # sinks without a question; tokens that a question may be longer than the longest in letters


def make(rng: np.random.Generator, around: hay.Hay, n_facts: int = FACTS_ASK) -> Trial:
    """A document with ``n_facts`` facts of the kinds in turn, spread over it, and a question about each."""
    kinds = [KINDS[i] for i in rng.permutation(len(KINDS))]
    some = facts.drawn(rng, n_facts, " ".join(around[0]), kinds)
    text = hay.strewn(*around, zip([fact.told for fact in some], hay.spread_depths(rng, n_facts), strict=True))
    return Trial(text, tuple(fact.ask(wording=fact.kind.name) for fact in some))


def read_once(job: Job, trial: Trial, condition: Condition) -> Iterator[Outcome]:
    """Read without the question, then ask each of a copy."""
    prompts = [prompt_for(job.tokenizer, trial.text, ask.question, pinned=False) for ask in trial.asks]
    caches = condition.caches(job.model)
    feed(job.model, prompts[0].before + prompts[0].document, caches)
    for ask, prompt in zip(trial.asks, prompts, strict=True):
        yield _outcome(job, ask, prompt.after, prompt.n_tokens, copy.deepcopy(caches))


def read_for_each(job: Job, trial: Trial, condition: Condition) -> Iterator[Outcome]:
    """Read with the question in front, once for each question."""
    for ask in trial.asks:
        prompt = prompt_for(job.tokenizer, trial.text, ask.question, pinned=True)
        caches = _caches(job, prompt, condition)
        feed(job.model, prompt.before + prompt.document, caches)
        yield _outcome(job, ask, prompt.after, prompt.n_tokens, caches)


def _outcome(
    job: Job,
    ask: Ask,
    after: list[int],
    n_tokens: int,
    caches: list[Any],
    told: Callable[[list[Any]], CacheReport] = report,
) -> Outcome:
    ids = [*after, *encode(job.tokenizer, ask.opening)]
    judged = forced(job.model, ids, following(job.tokenizer, ask.opening, ask.answer), caches)
    return {"kind": ask.wording, "prompt_tokens": n_tokens, **judged, **sizes(told(caches))}


def read_as_asked(job: Job, trial: Trial, condition: Condition) -> Iterator[Outcome]:
    """Read as ``ask`` does: what stands before the document pinned, the question known to policies that probe.

    What is read before anything is evicted is the same whatever is asked, and is read once.
    """
    prompts = [prompt_for(job.tokenizer, trial.text, ask.question, pinned=False) for ask in trial.asks]
    shared, done = _started(job, prompts[0], condition)
    readings: list[Reading] = []
    for ask, prompt in zip(trial.asks, prompts, strict=True):
        if condition.needs_question or not readings:
            caches = copy.deepcopy(shared)
            for cache in pruned(caches) if condition.needs_question else ():
                cache.settings = cache.settings.but(question=tuple(prompt.after))
            feed(job.model, (prompt.before + prompt.document)[done:], caches)
            first = Reading(prompt, copy.deepcopy(caches), 0.0)
            readings = [first, read_again(job.model, job.tokenizer, Reading(prompt, caches, 0.0), max_tokens=ANSWER)]
        for wording, reading in zip((AS_HELD, AGAIN), readings, strict=True):
            cache = copy.deepcopy(reading.cache)
            yield {"wording": wording, **_outcome(job, ask, prompt.after, prompt.n_tokens, cache, reading.report)}


def _caches(job: Job, prompt: Prompt, condition: Condition) -> list[Any]:
    """Fresh ones, in which what stands before the document is pinned."""
    pins = {} if condition.is_full else {"n_sink": max(N_SINK, len(prompt.before))}
    return condition.caches(job.model, prompt.after, **pins)


def _started(job: Job, prompt: Prompt, condition: Condition) -> tuple[list[Any], int]:
    """A cache that read what it can before it evicts, and how many tokens that is."""
    caches, done, tokens = _caches(job, prompt, condition), 0, prompt.before + prompt.document
    while done < len(tokens):
        more = copy.deepcopy(caches)
        feed(job.model, tokens[done : done + CHUNK], more)
        if any(cache.evicted for cache in pruned(more)):
            break
        caches, done = more, done + CHUNK
    return caches, done


def fits(ways: Ways, job: Job, condition: Condition) -> None:
    """Refuse a condition that has no room for what is pinned in front of the document.

    Raises:
        ValueError: it has not.
    """
    if not condition.is_full and any(reader is not read_once for _, reader, _ in ways(condition)):
        longest = max(KINDS, key=lambda kind: len(kind.verbatim[0])).verbatim[0].format(name=max(facts.NAMES, key=len))
        pinned = any(reader is read_for_each for _, reader, _ in ways(condition))
        before = prompt_for(job.tokenizer, "", longest, pinned=pinned).before
        condition.caches(job.model, (0,), n_sink=max(N_SINK, len(before) + SPARE))


def both_ways(condition: Condition) -> list[tuple[str, Reader, bool]]:
    """How ``aware`` reads."""
    known = (BOTH, read_for_each, True)
    return [known] if condition.needs_question else [(AFTER, read_once, False), known]


def as_asked(condition: Condition) -> list[tuple[str, Reader, bool]]:
    """How ``ask`` reads."""
    return [("", read_as_asked, condition.needs_question)]


def _measure(ways: Ways, job: Job, trial: Trial, conditions: Sequence[Condition], tick: Tick) -> Measured:
    for condition in conditions:
        found = []
        for wording, read, anew in ways(condition):
            found += [{"wording": wording, **outcome} for outcome in read(job, trial, condition)]
            tick(job.haystack * (len(trial.asks) if anew else 1))
        yield condition, {"outcomes": found}


def _work(ways: Ways, job: Job, trial: Trial, conditions: Sequence[Condition]) -> int:
    passes = [len(trial.asks) if anew else 1 for condition in conditions for *_, anew in ways(condition)]
    return job.haystack * sum(passes)


def _task(name: str, about: str, n_facts: int, ways: Ways) -> Task:
    generate = functools.partial(make, n_facts=n_facts)
    documents = lambda job: max(1, job.trials // n_facts)
    items = lambda job: questions.trials(generate, job.tokenizer, job.plain, documents(job), job.haystack, job.seed)
    measure, work = functools.partial(_measure, ways), functools.partial(_work, ways)
    rows, room = functools.partial(judge.rows, name), functools.partial(fits, ways)
    return Task(name, about, items, measure, work, rows, bound="dilution", fits=room)


AWARE = _task("aware", "the same questions known before reading and not", FACTS_AWARE, both_ways)
ASK = _task("ask", "questions about documents, as `ask` reads them", FACTS_ASK, as_asked)
