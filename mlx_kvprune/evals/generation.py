"""Generation: a greedy continuation against the full cache's: how long, whether it loops, where it leaves the other.

Eviction and quantization lengthen answers and make loops (ThinKV reports up to five times the length; arXiv 2510.01290);
scores that force the answer do not see it. Small models loop by themselves, and another token at the start gives another
answer: so the full cache also reads what was said, and ``own_kl`` and ``own_agreement`` tell what it would have said instead.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_kvprune.evals.asking import prompt
from mlx_kvprune.evals.conditions import FULL, SIZES, Condition, feed, held
from mlx_kvprune.evals.fidelity import compare
from mlx_kvprune.evals.job import Job, Measured, Task, Tick, which_texts
from mlx_kvprune.evals.store import Unit, by_condition, named
from mlx_kvprune.evals.texts import excerpts

LONGEST_PERIOD, REPEATS = 32, 3
UNNAMED = 96  # tokens of an answer, where stored results do not say how many
QUESTION = "Tell in a few sentences what happens in this text."


def items(job: Job) -> list[str]:
    """Texts to be summed up."""
    some = excerpts(job.tokenizer, job.plain, job.haystack, job.texts, job.seed)
    return [job.tokenizer.decode(tokens) for tokens in some]


def measure(job: Job, text: str, conditions: Sequence[Condition], tick: Tick) -> Measured:
    """What each condition says."""
    ids = prompt(job.tokenizer, text, QUESTION, "")
    ends: set[int] = set(getattr(job.tokenizer, "eos_token_ids", ()))
    prompted = FULL.caches(job.model)
    feed(job.model, ids[:-1], prompted)
    tick(job.haystack)
    for condition in conditions:
        if condition.is_full:
            caches = copy.deepcopy(prompted)
        else:
            caches = condition.caches(job.model)
            feed(job.model, ids[:-1], caches)
        said, logits = greedy(job.model, ids[-1], caches, job.answer_tokens, ends)
        own = own_words(job.model, copy.deepcopy(prompted), [ids[-1], *said], logits)
        tick(job.haystack + job.answer_tokens)
        answer = {"said": said, "most": job.answer_tokens, "prompt_tokens": len(ids)}
        yield condition, {**answer, **own, **held(caches)}


def greedy(model: Any, token: int, caches: list[Any], most: int, ends: set[int]) -> tuple[list[int], mx.array]:
    """The likeliest tokens after ``token``, up to ``most`` or the end, which is not among them; and the logits of each, and of
    the end ``(L, vocab)``.
    """
    said, logits = [], []
    while len(said) < most:
        logits.append(model(mx.array([[token]]), cache=caches)[0, -1])
        token = int(logits[-1].argmax().item())
        if token in ends:
            break
        said.append(token)
    return said, mx.stack(logits)


def own_words(model: Any, prompted: list[Any], words: Sequence[int], logits: mx.array) -> dict[str, float]:
    """What the full cache thinks of an answer, given the answer so far: KL from its predictions in nats, and how often it would
    have said the same.

    Args:
        prompted: full caches of the prompt without its last token; they are written to.
        words: the prompt's last token, and the answer.
        logits: what was predicted after each of them ``(L, vocab)``; after all but the last, if the answer was cut.
    """
    full = model(mx.array([words[: len(logits)]]), cache=prompted)[0]
    kl, _, _, agrees = compare(full, logits, logits.argmax(axis=-1))
    return {"own_kl": float(kl.mean()), "own_agreement": float(agrees.mean())}


def work(job: Job, text: str, conditions: Sequence[Condition]) -> int:
    """How many tokens ``measure`` sends through the model."""
    return job.haystack + (job.haystack + job.answer_tokens) * len(conditions)


def loops(said: Sequence[int], longest: int = LONGEST_PERIOD, repeats: int = REPEATS) -> bool:
    """Whether the end is one piece of at most ``longest`` tokens, said ``repeats`` times or more."""
    return any(
        len(said) >= repeats * period
        and all(said[-i] == said[-i - period] for i in range(1, (repeats - 1) * period + 1))
        for period in range(1, longest + 1)
    )


def diverges(said: Sequence[int], full: Sequence[int]) -> int:
    """How many tokens are the same from the start on."""
    return next((i for i, (a, b) in enumerate(zip(said, full, strict=False)) if a != b), min(len(said), len(full)))


def rows(units: Sequence[Unit]) -> list[dict[str, Any]]:
    """One row per condition: means over the texts. Lengths are compared where the full cache came to an end; where the limit
    cut the other answer, ``inflation`` is a lower bound (``cut_ended`` of them).
    """
    full = {unit["item"]: unit["result"] for unit in units if unit["policy"] == "full"}
    return [_row(some, full) for some in by_condition(units)]


def _row(units: Sequence[Unit], full: dict[int, dict[str, Any]]) -> dict[str, Any]:
    pairs: list[tuple[Any, Any]] = [(unit["result"], full.get(unit["item"], unit["result"])) for unit in units]
    ended = [(a, b) for a, b in pairs if len(b["said"]) < b["most"] and b["said"]]
    longer = [len(a["said"]) / len(b["said"]) for a, b in ended]
    return {
        "task": "generation",
        **named(units[0]),
        "texts": len(pairs),
        "length": float(np.mean([len(a["said"]) for a, _ in pairs])),
        "inflation": float(np.mean(longer)) if longer else None,
        "ended_full": len(ended),
        "cut_ended": sum(len(a["said"]) == a["most"] for a, _ in ended),
        "cut": sum(len(a["said"]) == a["most"] for a, _ in pairs),
        "loops": sum(loops(a["said"]) for a, _ in pairs),
        "same": float(np.mean([diverges(a["said"], b["said"]) for a, b in pairs])),
        **{name: _mean([a.get(name) for a, _ in pairs]) for name in ("own_kl", "own_agreement")},
        "prompt_tokens": max(a["prompt_tokens"] for a, _ in pairs),
        **{name: max(a[name] for a, _ in pairs) for name in SIZES},
    }


def _mean(values: Sequence[float | None]) -> float | None:
    """None where results are from before it was measured."""
    known = [x for x in values if x is not None]
    return float(np.mean(known)) if len(known) == len(values) else None


def _own(job: Job) -> dict[str, int]:
    longer = {"answer_tokens": job.answer_tokens} if job.answer_tokens != UNNAMED else {}
    return longer | which_texts(job)


TASK = Task(
    "generation",
    "length, loops and the first other token of a greedy answer",
    items,
    measure,
    work,
    rows,
    question=False,
    own=_own,
)
