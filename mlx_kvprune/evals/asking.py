"""Questions about a text: read it, ask, judge the answer by what the model would have said.

The answer's opening words and the answer are forced: it is an exact match if every token of the answer is the model's
first choice, which is when greedy decoding would have said it. A question counts only where the full cache answers 80%
of the trials: below, the model is judged, not the cache.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_kvprune.evals.conditions import Condition, feed, held

Outcome = dict[str, Any]
COUNTS_FROM = 0.8  # of the trials must be solved by the full cache


@dataclass(frozen=True)
class Ask:
    """A question, the opening words of its answer, and the answer; ``wording`` names the kind, one row of a table each."""

    wording: str
    question: str
    opening: str
    answer: str


def prompt(tokenizer: Any, text: str, question: str, opening: str) -> list[int]:
    """Token ids of text, question and the answer's opening, in the chat template if there is one."""
    asked = f"{text}\n\n{question}"
    if not getattr(tokenizer, "chat_template", None):
        return list(tokenizer.encode(f"{asked}\n{opening}"))
    messages = [{"role": "user", "content": asked}]
    start = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    return list(tokenizer.encode(start + opening, add_special_tokens=False))


def outcomes(model: nn.Module, tokenizer: Any, text: str, asks: Sequence[Ask], condition: Condition) -> list[Outcome]:
    """The outcome of every question; what their prompts share is read once, unless the policy knows the question."""
    alike = lambda ask: ask.question if condition.needs_question else ""
    done: dict[Ask, Outcome] = {}
    for which in dict.fromkeys(map(alike, asks)):
        some = [ask for ask in asks if alike(ask) == which]
        done |= zip(some, _together(model, tokenizer, text, some, condition), strict=True)
    return [done[ask] for ask in asks]


def _together(model: nn.Module, tokenizer: Any, text: str, asks: Sequence[Ask], condition: Condition) -> list[Outcome]:
    prompts = [prompt(tokenizer, text, ask.question, ask.opening) for ask in asks]
    caches = condition.caches(model, encode(tokenizer, asks[0].question))
    n = shared(prompts)
    feed(model, prompts[0][:n], caches)
    found = []
    for ask, ids in zip(asks, prompts, strict=True):
        mine = copy.deepcopy(caches) if ask is not asks[-1] else caches
        outcome = forced(model, ids[n:], following(tokenizer, ask.opening, ask.answer), mine)
        found.append({"wording": ask.wording, "prompt_tokens": len(ids), **outcome, **held(mine)})
    return found


def encode(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a part of a text."""
    return list(tokenizer.encode(text, add_special_tokens=False))


def following(tokenizer: Any, opening: str, answer: str) -> list[int]:
    """Token ids of an answer after its opening and a space, as they are in a text: some tokenizers begin whatever they are
    given with a space of their own.
    """
    before, both = encode(tokenizer, opening), encode(tokenizer, f"{opening} {answer}")
    fits = len(both) > len(before) and both[: len(before)] == before
    return both[len(before) :] if fits else encode(tokenizer, f" {answer}")


def shared(prompts: Sequence[Sequence[int]]) -> int:
    """Length of the longest common start that leaves at least one token of each."""
    most = min(map(len, prompts)) - 1
    return next((i for i in range(most) if len({ids[i] for ids in prompts}) > 1), most)


def reads(asks: Sequence[Ask], condition: Condition) -> int:
    """How many times ``outcomes`` reads the text."""
    return len({ask.question for ask in asks}) if condition.needs_question else 1


def forced(model: nn.Module, ids: Sequence[int], answer: Sequence[int], caches: list[Any]) -> Outcome:
    """Read ``ids``, then the answer; ``exact`` and ``logprob`` of the answer."""
    feed(model, ids[:-1], caches)
    logits = model(mx.array([[ids[-1], *answer[:-1]]]), cache=caches)[0]
    return score(logits, answer)


def score(logits: mx.array, answer: Sequence[int]) -> Outcome:
    """Judge an answer by the logits ``(len(answer), vocab)`` that foretold its tokens.

    Returns:
        ``exact``: every token is the first choice; ``right``: how many are, from the start on; ``logprob``: their sum.
    """
    targets = mx.array(list(answer))
    logits = logits.astype(mx.float32)
    picked = mx.take_along_axis(logits, targets[:, None], axis=-1)[:, 0] - mx.logsumexp(logits, axis=-1)
    hits = (np.array(logits.argmax(axis=-1)) == np.array(answer)).tolist()
    return {"exact": all(hits), "right": (*hits, False).index(False), "logprob": picked.sum().item()}
