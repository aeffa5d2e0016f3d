"""Questions back to early turns of a conversation, with and without a floor for finished turns: prints one line a setting.

    python tests/turns_table.py [budget]      (about five minutes)

Ten facts are told in the first ten turns, twenty turns of small talk follow (answers are given, not generated), then each
fact is asked of a copy of the cache. SmolLM2-135M rarely says the fact even with the full cache, so what is measured is
how likely it finds it: the negative log-probability of the fact's word, in nats, where the answer reaches it; mean of the
ten, and how often it is below that of a model that was never told.
"""

from __future__ import annotations

import copy
import json
import sys
from typing import Any

import mlx.core as mx
import mlx.nn as nn

import mlx_kvprune as kvp

FACTS = (  # told, asked, the answer up to the word, the word
    ("Anna's cat is called Biscuit.", "What is Anna's cat called?", "Anna's cat is called", " Biscuit"),
    ("Peter lives in Lisbon.", "In which city does Peter live?", "Peter lives in", " Lisbon"),
    ("The picnic is in November.", "In which month is the picnic?", "The picnic is in", " November"),
    ("Maria plays the cello.", "Which instrument does Maria play?", "Maria plays the", " cello"),
    ("The captain's coat is green.", "What colour is the captain's coat?", "The captain's coat is", " green"),
    ("Tom is allergic to peanuts.", "What is Tom allergic to?", "Tom is allergic to", " peanuts"),
    ("Laura works as a plumber.", "What does Laura work as?", "Laura works as a", " plumber"),
    ("The baker lives in house 42.", "In which house does the baker live?", "The baker lives in house", " 42"),
    (
        "The king's favourite dish is lasagne.",
        "What is the king's favourite dish?",
        "The king's favourite dish is",
        " lasagne",
    ),
    (
        "The password of the safe is walrus.",
        "What is the password of the safe?",
        "The password of the safe is",
        " walrus",
    ),
)
TALK = (
    ("What is a glacier?", "A glacier is a slow river of ice that forms where more snow falls than melts."),
    (
        "Why do leaves turn red?",
        "In autumn they lose their green dye, and other colours that were there all along show.",
    ),
    ("How does a kettle know when to stop?", "Steam bends a small strip of two metals, and that opens the switch."),
    ("Who invented the printing press?", "In Europe it was Johannes Gutenberg, in the fifteenth century, in Mainz."),
    ("What is the capital of Peru?", "The capital of Peru is Lima, a city of about ten million people on the coast."),
) * 4
SETTINGS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("full", {}),
    ("window", {"turn_floor": 0.0}),
    ("window", {"turn_floor": 0.5}),
    ("snapkv", {"turn_floor": 0.0}),
    ("snapkv", {"turn_floor": 0.5}),
    ("h2o", {"turn_floor": 0.0}),
    ("h2o", {"turn_floor": 0.5}),
    ("knorm", {"turn_floor": 0.0}),
    ("knorm", {"turn_floor": 0.5}),
)


def read(model: Any, tokens: list[int], cache: list[Any]) -> None:
    model(mx.array(tokens)[None], cache=cache)
    mx.eval([c.state for c in cache])


def told(model: Any, tokenizer: Any, cache: list[Any]) -> list[dict[str, str]]:
    """Read the whole conversation turn by turn; returns its messages."""
    messages: list[dict[str, str]] = []
    for text, answer in (*((fact, "Thank you, I will remember that.") for fact, *_ in FACTS), *TALK):
        before = rendered(tokenizer, messages)
        messages += [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]
        read(model, rendered(tokenizer, messages)[len(before) :], cache)
        kvp.end_turn(cache)
    return messages


def rendered(tokenizer: Any, messages: list[dict[str, str]], ask: bool = False) -> list[int]:
    return list(tokenizer.apply_chat_template(messages, add_generation_prompt=ask)) if messages else []


def surprise(model: Any, tokenizer: Any, asked: list[int], prefix: str, word: str, cache: list[Any] | None) -> float:
    """Negative log-probability of ``word`` after a question and the start of its answer, in nats."""
    start, end = (tokenizer.encode(text, add_special_tokens=False) for text in (prefix, word))
    tokens = mx.array([*asked, *start, *end])[None]
    logits = model(tokens, cache=cache)[0, -len(end) - 1 : -1].astype(mx.float32)
    return nn.losses.cross_entropy(logits, tokens[0, -len(end) :]).sum().item()


def main() -> None:
    budget = int(sys.argv[1]) if len(sys.argv) > 1 else 384
    model, tokenizer = kvp.load("smollm2-135m")
    ask = lambda before, fact: rendered(tokenizer, [*before, {"role": "user", "content": fact[1]}], ask=True)
    never_told = [surprise(model, tokenizer, ask([], fact), *fact[2:], None) for fact in FACTS]
    print(json.dumps({"policy": "never told", "nats": round(sum(never_told) / len(FACTS), 3)}), flush=True)
    kvp.attach(model, quiet=True)
    for policy, floor in SETTINGS:
        more = {"budget": budget, **floor} if floor else {}
        cache = kvp.make_cache(model, policy, **more)
        messages = told(model, tokenizer, cache)
        n = len(rendered(tokenizer, messages))
        nats = [surprise(model, tokenizer, ask(messages, fact)[n:], *fact[2:], copy.deepcopy(cache)) for fact in FACTS]
        found = sum(x < never for x, never in zip(nats, never_told, strict=True))
        row = {"policy": policy, **more, "tokens": n, "nats": round(sum(nats) / len(nats), 3), "helped": found}
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
