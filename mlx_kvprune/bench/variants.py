"""What is compared: a policy with settings, written in one word; the text; and how numbers are shown."""

from __future__ import annotations

import statistics
import time
from typing import Any

from mlx_kvprune import make_cache

import mlx.core as mx  # isort: skip


def made(model: Any, variant: str, budget: int | str | None) -> list[Any]:
    """Caches for ``knorm``, or ``knorm:kv_bits=4;allocator=head_adaptive``."""
    policy, settings = parsed(variant)
    return make_cache(model, policy, budget, **settings)


def parsed(variant: str) -> tuple[str, dict[str, int | str]]:
    """A variant's policy, and its settings by name.

    Raises:
        ValueError: a setting without a value.
    """
    policy, _, rest = variant.partition(":")
    settings = {}
    for item in filter(None, rest.split(";")):
        name, equals, value = (part.strip() for part in item.partition("="))
        if not (name and equals and value):
            raise ValueError(f"[policies] not a policy with settings; got {variant!r}; try 'knorm:kv_bits=4'")
        settings[name] = int(value) if value.isdigit() else value
    return policy.strip(), settings


def text_of_length(tokenizer: Any, n: int) -> list[int]:
    """``n`` tokens that every candidate reads; each sentence has a number of its own."""
    words = (f"The {i}th house on the road belongs to number {i * 7919 % 10007}." for i in range(n // 8 + 2))
    return list(tokenizer.encode(" ".join(words)))[:n]


def spread_of(values: list[float]) -> list[float]:
    """Median, least, most."""
    return [round(x, 4) for x in (statistics.median(values), min(values), max(values))]


def text_of(spread: list[float], form: str) -> str:
    """``median (least to most)``."""
    median, low, high = (format(x, form) for x in spread)
    return f"{median} ({low.strip()} to {high.strip()})"


def decode_seconds(model: Any, cache: list[Any], n: int) -> float:
    """Seconds for ``n`` tokens in mlx-lm's own loop."""
    return stretch(model, cache, n)[1]


def stretch(model: Any, cache: list[Any], n: int) -> tuple[float, float]:
    """Seconds until mlx-lm's own loop gives a first token, and for ``n`` more; the cache reads one or two beyond."""
    from mlx_lm.generate import generate_step

    start = time.perf_counter()
    steps = generate_step(mx.array([1]), model, max_tokens=n + 1, prompt_cache=cache)
    next(steps)
    first = time.perf_counter()
    for _ in range(n):
        next(steps)
    return first - start, time.perf_counter() - first
