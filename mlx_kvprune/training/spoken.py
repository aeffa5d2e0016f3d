"""Conversations that the model itself has about a text, so that gates see its own answers, its template and its questions.

Whoever trains on what people wrote alone never sees a model speak: not its template's tokens, not the question that stands
between a text and a long answer. The model answers with its full cache; tokens are drawn at ``TEMPERATURE``: its likeliest ones
loop.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.cache import make_prompt_cache

from mlx_kvprune.evals.conditions import feed
from mlx_kvprune.evals.turns import rendered

LONGEST = 2048  # tokens of a conversation: a half is the text, and what is said takes a second pass for each token
TURN = 256  # tokens of an answer at most
TEMPERATURE = 0.7  # of sampling
FIRST = (
    "Summarize the text above.",
    "What is this about? Explain it to somebody who has not read it.",
    "List the most important points.",
    "Go through it step by step, and say what each part is for.",
    "Which names and terms occur, and what do they mean here?",
    "Write what comes next.",
)
LATER = (
    "Why?",
    "Go on.",
    "Give an example.",
    "Say the same in simpler words.",
    "What did you leave out?",
    "Think about it again, slowly, and say what follows from it.",
    "Which part do you find hardest, and how would you explain that?",
    "Ask yourself a question about the text, and answer it.",
    "What would somebody say who disagrees?",
)


def spoken(
    model: nn.Module,
    tokenizer: Any,
    document: str,
    length: int,
    seed: Sequence[int],
    first: Sequence[str] = FIRST,
    later: Sequence[str] = LATER,
) -> list[int]:
    """A conversation about a document, in the chat template if there is one: ``length`` tokens.

    Args:
        model: of mlx-lm; it answers with its full cache.
        tokenizer: its tokenizer.
        document: is part of the first question.
        length: after so many tokens it is cut.
        seed: of what is asked and answered.
        first: one of these is asked about the document.
        later: and these after it.
    """
    rng = np.random.default_rng(seed)
    ends: set[int] = set(getattr(tokenizer, "eos_token_ids", ()))
    turns: list[tuple[str, str]] = []
    caches, known = make_prompt_cache(model), []
    while True:
        asked = str(rng.choice(later)) if turns else f"{document}\n\n{rng.choice(first)}"
        prompt = rendered(tokenizer, turns, asked)
        if prompt[: len(known)] != known or len(prompt) <= len(known):  # an answer is not always encoded as it was said
            caches, known = make_prompt_cache(model), []
        feed(model, prompt[len(known) : -1], caches)
        most = min(TURN, length)
        said = _answer(model, prompt[-1], caches, most, ends, rng)
        known = [*prompt, *(said if len(said) < most else said[:-1])]  # the last was read if the end came after it
        turns.append((asked, tokenizer.decode(said)))
        tokens = rendered(tokenizer, turns)
        if len(tokens) >= length:
            return tokens[:length]


def _answer(
    model: Any, token: int, caches: list[Any], most: int, ends: set[int], rng: np.random.Generator
) -> list[int]:
    """Tokens drawn one after the other, up to ``most`` or the end, which is not among them."""
    said: list[int] = []
    while len(said) < most:
        logits = model(mx.array([[token]]), cache=caches)[0, -1].astype(mx.float32)
        drawn: Any = mx.random.categorical(logits / TEMPERATURE, key=mx.random.key(int(rng.integers(2**32))))
        token = int(drawn.item())
        if token in ends:
            break
        said.append(token)
    return said
