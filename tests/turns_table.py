"""Questions back to early turns of a conversation, with and without a floor for finished turns: prints one line a setting.

    python tests/turns_table.py [budget]      (about five minutes)

Ten facts are told in the first ten turns, twenty turns of small talk follow (answers are given, not generated), then each
fact is asked of a copy of the cache. An answer is right if it contains the fact's word.
"""

from __future__ import annotations

import copy
import json
import sys
from typing import Any

import mlx.core as mx
from mlx_lm import generate

import mlx_kvprune as kvp

FACTS = (
    ("My cat is called Biscuit.", "What is my cat called?", "biscuit"),
    ("My sister lives in Lisbon.", "In which city does my sister live?", "lisbon"),
    ("I was born in November.", "In which month was I born?", "november"),
    ("I play the cello.", "Which instrument do I play?", "cello"),
    ("My car is green.", "What colour is my car?", "green"),
    ("I am allergic to peanuts.", "What am I allergic to?", "peanut"),
    ("My brother is a plumber.", "What does my brother do for a living?", "plumber"),
    ("I live in house number 42.", "What is the number of my house?", "42"),
    ("My favourite dish is lasagne.", "What is my favourite dish?", "lasagn"),
    ("On Tuesdays I go swimming.", "What do I do on Tuesdays?", "swim"),
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
SETTINGS = (
    ("snapkv", 0.0),
    ("snapkv", 0.5),
    ("full", None),
    ("window", 0.0),
    ("window", 0.5),
    ("h2o", 0.0),
    ("h2o", 0.5),
)


def read(model: Any, tokens: list[int], cache: list[Any]) -> None:
    model(mx.array(tokens)[None], cache=cache)
    mx.eval([c.state for c in cache])


def told(model: Any, tokenizer: Any, cache: list[Any]) -> list[dict[str, str]]:
    """Read the whole conversation turn by turn; returns its messages."""
    messages: list[dict[str, str]] = []
    for text, answer in (*((fact, "Thank you, I will remember that.") for fact, _, _ in FACTS), *TALK):
        before = rendered(tokenizer, messages)
        messages += [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]
        read(model, rendered(tokenizer, messages)[len(before) :], cache)
        kvp.end_turn(cache)
    return messages


def rendered(tokenizer: Any, messages: list[dict[str, str]], ask: bool = False) -> list[int]:
    return list(tokenizer.apply_chat_template(messages, add_generation_prompt=ask)) if messages else []


def main() -> None:
    budget = int(sys.argv[1]) if len(sys.argv) > 1 else 384
    model, tokenizer = kvp.load("smollm2-135m")
    kvp.attach(model, quiet=True)
    for policy, floor in SETTINGS:
        more = {} if floor is None else {"budget": budget, "turn_floor": floor}
        cache = kvp.make_cache(model, policy, **more)
        messages = told(model, tokenizer, cache)
        n, right = len(rendered(tokenizer, messages)), []
        for _, question, word in FACTS:
            asked = rendered(tokenizer, [*messages, {"role": "user", "content": question}], ask=True)[n:]
            said = generate(model, tokenizer, asked, max_tokens=24, prompt_cache=copy.deepcopy(cache))
            right.append(word in said.lower())
        row = {"policy": policy, "turn_floor": floor, "budget": more.get("budget"), "tokens": n}
        print(json.dumps({**row, "right": sum(right), "first_five": sum(right[:5])}), flush=True)


if __name__ == "__main__":
    main()
