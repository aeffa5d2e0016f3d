"""Conversations that a model has about a text: its own words, however they were computed."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
import tiny_models as zoo

from mlx_kvprune.evals import generation
from mlx_kvprune.training import spoken

DOCUMENT = "What the old crab said to her son. " * 3


class Letters:
    """A token a letter; of a conversation ``U`` and ``A`` begin the turns. Answers end early, and often."""

    chat_template: str | None = "yes"

    def __init__(self, ends=range(0, zoo.VOCAB, 9)):
        self.eos_token_ids = set(ends)

    def encode(self, text, add_special_tokens=True):
        return [ord(c) % zoo.VOCAB for c in text]

    def decode(self, tokens):
        return "".join(chr(t) for t in tokens)

    def apply_chat_template(self, messages, add_generation_prompt):
        text = "".join(f"{m['role'][0].upper()}{m['content']}\n" for m in messages)
        return self.encode(text + "A" * add_generation_prompt)


class Plain(Letters):
    chat_template = None


class Odd(Letters):
    """Does not encode what was said as it was said."""

    def decode(self, tokens):
        return super().decode(tokens)[::-1]


def slowly(model, tokenizer, length, seed):
    """Without a cache: the whole conversation runs through the model for every token."""
    rng, turns, lengths = np.random.default_rng(seed), [], []
    while True:
        asked = str(rng.choice(spoken.LATER)) if turns else f"{DOCUMENT}\n\n{rng.choice(spoken.FIRST)}"
        tokens = spoken.rendered(tokenizer, turns, asked)
        said = []
        while len(said) < min(spoken.TURN, length):
            logits = model(mx.array([[*tokens, *said]]))[0, -1]
            key = mx.random.key(int(rng.integers(2**32)))
            token = int(mx.random.categorical(logits / spoken.TEMPERATURE, key=key).item())
            if token in tokenizer.eos_token_ids:
                break
            said.append(token)
        turns.append((asked, tokenizer.decode(said)))
        lengths.append(len(said))
        if len(found := spoken.rendered(tokenizer, turns)) >= length:
            return found[:length], lengths


@pytest.mark.parametrize("tokenizer", [Letters(), Plain(), Odd(), Letters({7})], ids=lambda t: type(t).__name__)
@pytest.mark.parametrize("seed", [0, 1])
def test_it_is_what_the_model_says_without_a_cache(model, tokenizer, seed, monkeypatch):
    monkeypatch.setattr(spoken, "TURN", 24)
    expected, lengths = slowly(model, tokenizer, 320, (3, seed))
    found = spoken.spoken(model, tokenizer, DOCUMENT, 320, (3, seed))
    assert found == expected and len(found) == 320 and len(lengths) > 2
    assert any(0 < n < 24 for n in lengths) or len(tokenizer.eos_token_ids) == 1
    assert found != spoken.spoken(model, tokenizer, DOCUMENT, 320, (3, seed + 2))


def test_a_model_that_says_nothing_is_asked_on(model):
    assert len(spoken.spoken(model, Letters(range(zoo.VOCAB)), DOCUMENT, 400, (0,))) == 400


def test_nothing_of_the_evaluation_is_asked():
    assert generation.QUESTION not in (*spoken.FIRST, *spoken.LATER)
