"""Turns: facts told in the first half of a conversation, small talk after them, then questions back to each fact.

Answers are given, not generated, and ``end_turn`` marks the turns, as ``chat`` does. Small models rarely say such a fact even
with the full cache, so that what counts is how likely it is: a question is ``exact`` if the model finds the fact's
word likelier than the full cache does after the same conversation without that fact. (``first`` is whether it would have
said it.)
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from mlx_kvprune.evals import facts, judge
from mlx_kvprune.evals.asking import Ask, encode, following, forced
from mlx_kvprune.evals.conditions import FULL, Condition, feed, held
from mlx_kvprune.evals.job import Job, Measured, Task, Tick
from mlx_kvprune.session import end_turn
from mlx_kvprune.template import after_answer

TOLD, TURNS = 10, 20
NEXT = "And now?"
THANKS = "Thank you, I will remember that."
TALK = (
    ("What is a glacier?", "A glacier is a slow river of ice that forms where more snow falls than melts."),
    (
        "Why do leaves turn red?",
        "In autumn they lose their green dye, and other colours that were there all along show.",
    ),
    ("How does a kettle know when to stop?", "Steam bends a small strip of two metals, and that opens the switch."),
    ("Who invented the printing press?", "In Europe it was Johannes Gutenberg, in the fifteenth century, in Mainz."),
    ("What is the highest mountain?", "Mount Everest, on the border of two countries, is the highest above the sea."),
    ("Why is the sky blue?", "Air scatters short waves of light more than long ones, and blue light has short waves."),
    ("What do bees eat?", "Bees eat nectar for its sugar and pollen for its protein, and store honey for the winter."),
    ("How old is the Earth?", "About four and a half billion years, as the oldest rocks and meteorites tell us."),
    ("What is bread made of?", "Flour, water, salt and yeast; the yeast makes a gas that lets the dough rise."),
    ("Why do ships float?", "A ship pushes aside water that weighs as much as the ship does, and the water bears it."),
)


@dataclass(frozen=True)
class Conversation:
    """Turns of a user and an assistant, and what is asked afterwards."""

    turns: tuple[tuple[str, str], ...]
    asks: tuple[Ask, ...]


def items(job: Job) -> list[Conversation]:
    """A conversation for every ten trials, one at least."""
    return [make(np.random.default_rng([job.seed, i])) for i in range(max(1, job.trials // TOLD))]


def make(rng: np.random.Generator) -> Conversation:
    """``TOLD`` facts in as many turns, then small talk up to ``TURNS``."""
    talk = [TALK[i] for i in rng.permutation(len(TALK))]
    some = facts.drawn(rng, TOLD, " ".join(" ".join(turn) for turn in TALK))
    told = [(fact.told, THANKS) for fact in some]
    return Conversation((*told, *talk[: TURNS - TOLD]), tuple(fact.ask(wording="early turns") for fact in some))


def rendered(tokenizer: Any, turns: Sequence[tuple[str, str]], ask: str = "") -> list[int]:
    """Token ids of a conversation, up to where the assistant answers ``ask`` if there is one."""
    if getattr(tokenizer, "chat_template", None):
        roles = [
            {"role": role, "content": text}
            for turn in turns
            for role, text in zip(("user", "assistant"), turn, strict=True)
        ]
        roles += [{"role": "user", "content": ask}] if ask else []
        return list(tokenizer.apply_chat_template(roles, add_generation_prompt=bool(ask))) if roles else []
    text = "".join(f"User: {asked}\nAssistant: {answer}\n" for asked, answer in turns)
    return list(tokenizer.encode(text + (f"User: {ask}\nAssistant:" if ask else "")))


def steps(tokenizer: Any, turns: Sequence[tuple[str, str]], ask: str = "") -> list[list[int]]:
    """The token ids that each turn adds, and last those of ``ask`` up to where it is answered.

    They are what the whole conversation's are cut into; where a template writes earlier answers in another way than the last
    one, what it would have put after each.
    """
    known = [rendered(tokenizer, turns[:i]) for i in range(1, len(turns) + 1)]
    known += [rendered(tokenizer, turns, ask)] if ask else []
    if all(after[: len(before)] == before for before, after in pairwise(known)):
        return [*known[:1], *(after[len(before) :] for before, after in pairwise(known))]
    found, messages = [], []
    for asked, answer in [*turns, *([(ask, "")] if ask else [])]:
        message = {"role": "user", "content": asked}
        start = (
            encode(tokenizer, after_answer(tokenizer, messages[:-1], asked))
            if messages
            else list(tokenizer.apply_chat_template([message], add_generation_prompt=True))
        )
        found.append([*start, *encode(tokenizer, answer)])
        messages += [message, {"role": "assistant", "content": answer}]
    return found


def read(job: Job, turns: Sequence[tuple[str, str]], caches: list[Any]) -> int:
    """Read a conversation turn by turn; returns how many tokens it has."""
    n = 0
    for tokens in steps(job.tokenizer, turns, NEXT)[:-1]:  # cut as they are where something is asked
        feed(job.model, tokens, caches)
        end_turn(caches)
        n += len(tokens)
    return n


def measure(job: Job, item: Conversation, conditions: Sequence[Condition], tick: Tick) -> Measured:
    """The outcome of every question, for each condition."""
    never = [_never_told(job, item, number, tick) for number in range(len(item.asks))]
    for condition in conditions:
        caches = condition.caches(job.model)
        n = read(job, item.turns, caches)
        found = []
        for ask, alone in zip(item.asks, never, strict=True):
            outcome = _asked(job, item.turns, ask, n, copy.deepcopy(caches))
            found.append(
                {**outcome, "first": outcome["exact"], "exact": outcome["logprob"] > alone, "never_told": alone}
            )
        tick(length(job))
        yield condition, {"outcomes": found}


def _never_told(job: Job, item: Conversation, number: int, tick: Tick) -> float:
    """Log-probability of a fact's word with the full cache after a conversation that has all turns but that one."""
    turns = (*item.turns[:number], *item.turns[number + 1 :])
    caches = FULL.caches(job.model)
    outcome = _asked(job, turns, item.asks[number], read(job, turns, caches), caches)
    tick(length(job))
    return outcome["logprob"]


def _asked(job: Job, turns: Sequence[tuple[str, str]], ask: Ask, n: int, caches: list[Any]) -> dict[str, Any]:
    ids = [*steps(job.tokenizer, turns, ask.question)[-1], *encode(job.tokenizer, _start(job, ask))]
    judged = forced(job.model, ids, following(job.tokenizer, ask.opening, ask.answer), caches)
    return {"wording": ask.wording, "prompt_tokens": n + len(ids), **judged, **held(caches)}


def _start(job: Job, ask: Ask) -> str:
    return ask.opening if getattr(job.tokenizer, "chat_template", None) else " " + ask.opening


def length(job: Job) -> int:
    """Tokens of the first conversation."""
    return sum(map(len, steps(job.tokenizer, items(job)[0].turns, NEXT)[:-1]))


def work(job: Job, item: Conversation, conditions: Sequence[Condition]) -> int:
    """How many tokens ``measure`` sends through the model, without the questions."""
    return length(job) * (len(conditions) + len(item.asks))


TASK = Task(
    "turns",
    "20 turns, then questions back to the early ones",
    items,
    measure,
    work,
    functools.partial(judge.rows, "turns"),
    length=length,
    question=False,
    bound="capacity",
    own=lambda job: {"never_told": "all turns but that one"},
)
