"""Needles: one sentence in a haystack of natural text, and a question after it.

    ... The secret number of Marta is 48213. ...    What is the secret number of Marta?

Secrets have 4 or 5 digits; depths run evenly from the start to the end of the text. The question is asked in the
needle's own words (``verbatim``) and in others (``paraphrased``): what leans on likeness loses the second first.

The haystack is read without knowing the question. Then the answer's opening words and the answer are forced: it is an
exact match if every token of the answer is the model's first choice, which is when greedy decoding would have said it.
A wording counts only where the full cache answers 80% of the trials: below, the model is judged, not the cache.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_kvprune.evals.conditions import FULL, Condition, feed, held
from mlx_kvprune.evals.fidelity import Tick
from mlx_kvprune.evals.texts import sentences

Hay = tuple[list[str], list[int]]  # sentences, and their lengths in tokens
Outcome = dict[str, Any]
COUNTS_FROM = 0.8  # of the trials must be solved by the full cache
NAMES = ("Marta", "Boris", "Celia", "Dmitri", "Elena", "Farid", "Greta", "Hugo", "Ingrid", "Jorge", "Keiko", "Lionel")


@dataclass(frozen=True)
class Wording:
    """How a question is put; ``{name}`` is whose secret it is."""

    name: str
    question: str
    opening: str  # of the answer


NEEDLE = "The secret number of {name} is {secret}."
WORDINGS = (
    Wording("verbatim", "What is the secret number of {name}?", "The secret number of {name} is"),
    Wording(
        "paraphrased", "Which number does {name} keep hidden from others?", "The number that {name} keeps hidden is"
    ),
)


@dataclass(frozen=True)
class Trial:
    """One haystack with its needle.

    Attributes:
        text: the haystack.
        depth: the needle's place, 0 (start) to 1 (end).
        name: whose secret it is.
        secret: the answer.
    """

    text: str
    depth: float
    name: str
    secret: str

    def fill(self, pattern: str) -> str:
        return pattern.format(name=self.name, secret=self.secret)


# -- making ----------------------------------------------------------------------------------------------------------


def trials(tokenizer: Any, texts: Sequence[str], n: int, n_tokens: int, seed: int = 0) -> list[Trial]:
    """``n`` trials whose haystacks have about ``n_tokens`` tokens; the same ones for the same seed.

    Raises:
        ValueError: the texts are too short.
    """
    found = sentences(texts, most_chars=400_000)
    lengths = [len(tokenizer.encode(" " + s, add_special_tokens=False)) for s in found]
    if sum(lengths) < n_tokens:
        raise ValueError(
            f"[needles] no text of {n_tokens} tokens; got {sum(lengths)}; try fewer --tokens or other --data"
        )
    rng = np.random.default_rng(seed)
    depths = rng.permutation((np.arange(n) + 0.5) / n)
    return [_trial(rng, i, float(depth), _window(rng, found, lengths, n_tokens)) for i, depth in enumerate(depths)]


def _window(rng: np.random.Generator, found: list[str], lengths: list[int], n_tokens: int) -> Hay:
    """Sentences in a row from a random one on (after the last comes the first), and their lengths in tokens."""
    first, total, picked = int(rng.integers(len(found))), 0, []
    while total < n_tokens:
        picked.append((first + len(picked)) % len(found))
        total += lengths[picked[-1]]
    return [found[i] for i in picked], [lengths[i] for i in picked]


def _trial(rng: np.random.Generator, i: int, depth: float, hay: Hay) -> Trial:
    digits = 4 + i % 2
    secret = str(rng.integers(10 ** (digits - 1), 10**digits))
    made = Trial("", depth, str(rng.choice(NAMES)), secret)
    return replace(made, text=hidden(*hay, made.fill(NEEDLE), depth))


def hidden(found: Sequence[str], lengths: Sequence[int], needle: str, depth: float) -> str:
    """The sentences with ``needle`` between two of them, where ``depth`` of the tokens lie before it."""
    ends = np.array([0, *accumulate(lengths)])
    at = int(np.abs(ends - depth * ends[-1]).argmin())
    return " ".join([*found[:at], needle, *found[at:]])


def prompt(tokenizer: Any, text: str, question: str, opening: str) -> list[int]:
    """Token ids of text, question and the answer's opening, in the chat template if there is one."""
    asked = f"{text}\n\n{question}"
    if not getattr(tokenizer, "chat_template", None):
        return list(tokenizer.encode(f"{asked}\n{opening}"))
    messages = [{"role": "user", "content": asked}]
    start = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    return list(tokenizer.encode(start + opening, add_special_tokens=False))


# -- asking ----------------------------------------------------------------------------------------------------------


def run(
    model: nn.Module,
    tokenizer: Any,
    texts: Sequence[str],
    conditions: Sequence[Condition],
    *,
    n_trials: int = 10,
    n_tokens: int = 1024,
    seed: int = 0,
    tick: Tick | None = None,
) -> list[Outcome]:
    """One row per condition and wording: exact matches, the answer's mean log-probability, each trial."""
    conditions = list(dict.fromkeys((FULL, *conditions)))
    done: dict[tuple[Condition, str], list[Outcome]] = {(c, w.name): [] for c in conditions for w in WORDINGS}
    for trial in trials(tokenizer, texts, n_trials, n_tokens, seed):
        for condition in conditions:
            for wording, outcome in zip(WORDINGS, ask(model, tokenizer, trial, condition), strict=True):
                done[condition, wording.name].append(outcome)
            if tick:
                tick(n_tokens * (len(WORDINGS) if condition.needs_question else 1))
    return [_row(condition, name, outcomes, done[FULL, name]) for (condition, name), outcomes in done.items()]


def work(n_trials: int, n_tokens: int, conditions: Sequence[Condition]) -> int:
    """How many tokens ``run`` sends through the model."""
    reads = sum(len(WORDINGS) if c.needs_question else 1 for c in {FULL, *conditions})
    return n_trials * n_tokens * reads


def ask(model: nn.Module, tokenizer: Any, trial: Trial, condition: Condition) -> list[Outcome]:
    """The outcome of every wording."""
    encode = lambda text: list(tokenizer.encode(text, add_special_tokens=False))
    questions = [trial.fill(w.question) for w in WORDINGS]
    openings = [trial.fill(w.opening) for w in WORDINGS]
    prompts = [prompt(tokenizer, trial.text, *both) for both in zip(questions, openings, strict=True)]
    reads = _reads(model, condition, prompts, [encode(q) for q in questions])
    answer, about = encode(" " + trial.secret), {"depth": trial.depth, "secret": trial.secret}
    return [
        {**about, "prompt_tokens": len(ids), **forced(model, ids[n:], answer, caches), **held(caches)}
        for ids, (caches, n) in zip(prompts, reads, strict=True)
    ]


def _reads(
    model: nn.Module, condition: Condition, prompts: list[list[int]], questions: list[list[int]]
) -> list[tuple[list[Any], int]]:
    """Caches for each prompt, and how many of its tokens they have read.

    What all prompts share is read once, unless the policy knows the question.
    """
    if condition.needs_question:
        return [(condition.caches(model, question), 0) for question in questions]
    shared, caches = _shared(prompts), condition.caches(model)
    feed(model, prompts[0][:shared], caches)
    return [(copy.deepcopy(caches), shared) for _ in prompts]


def _shared(prompts: Sequence[Sequence[int]]) -> int:
    """Length of the longest common start that leaves at least one token of each."""
    most = min(map(len, prompts)) - 1
    return next((i for i in range(most) if len({ids[i] for ids in prompts}) > 1), most)


def forced(model: nn.Module, ids: Sequence[int], answer: Sequence[int], caches: list[Any]) -> dict[str, Any]:
    """Read ``ids``, then the answer; ``exact`` and ``logprob`` of the answer."""
    feed(model, ids[:-1], caches)
    logits = model(mx.array([[ids[-1], *answer[:-1]]]), cache=caches)[0]
    return score(logits, answer)


def score(logits: mx.array, answer: Sequence[int]) -> dict[str, Any]:
    """Judge an answer by the logits ``(len(answer), vocab)`` that foretold its tokens.

    Returns:
        ``exact``: every token is the first choice; ``right``: how many are, from the start on; ``logprob``: their sum.
    """
    targets = mx.array(list(answer))
    logits = logits.astype(mx.float32)
    picked = mx.take_along_axis(logits, targets[:, None], axis=-1)[:, 0] - mx.logsumexp(logits, axis=-1)
    hits = (np.array(logits.argmax(axis=-1)) == np.array(answer)).tolist()
    return {"exact": all(hits), "right": (*hits, False).index(False), "logprob": picked.sum().item()}


def _row(condition: Condition, wording: str, outcomes: list[Outcome], full: list[Outcome]) -> dict[str, Any]:
    sizes = ("slots_held", "kv_bytes", "kv_bytes_peak", "kv_bytes_full")
    solved, solved_full = (sum(x["exact"] for x in some) for some in (outcomes, full))
    return {
        "task": "needles",
        **condition.describe(),
        "wording": wording,
        "trials": len(outcomes),
        "exact": solved,
        "exact_full": solved_full,
        "counts": solved_full >= COUNTS_FROM * len(full),
        "logprob": float(np.mean([x["logprob"] for x in outcomes])),
        "prompt_tokens": max(x["prompt_tokens"] for x in outcomes),
        **{name: max(x[name] for x in outcomes) for name in sizes},
        "outcomes": [{k: v for k, v in x.items() if k not in sizes} for x in outcomes],
    }
