"""What is compared: a policy with settings, written in one word; and how its numbers are shown."""

from __future__ import annotations

import statistics
import time
from typing import Any

from mlx_kvprune import make_cache

import mlx.core as mx  # isort: skip


def made(model: Any, variant: str, budget: int | str | None) -> list[Any]:
    """Caches for ``knorm``, or ``knorm:kv_bits=4;allocator=head_adaptive``."""
    policy, _, rest = variant.partition(":")
    settings = dict(item.split("=", 1) for item in rest.split(";") if item)
    return make_cache(model, policy, budget, **{k: int(v) if v.isdigit() else v for k, v in settings.items()})


def spread_of(values: list[float]) -> list[float]:
    """Median, least, most."""
    return [round(x, 4) for x in (statistics.median(values), min(values), max(values))]


def text_of(spread: list[float], form: str) -> str:
    """``median (least to most)``."""
    median, low, high = (format(x, form) for x in spread)
    return f"{median} ({low.strip()} to {high.strip()})"


def decode_seconds(model: Any, cache: list[Any], n: int) -> float:
    """Seconds for ``n`` tokens in mlx-lm's own loop."""
    from mlx_lm.generate import generate_step

    steps = generate_step(mx.array([1]), model, max_tokens=n + 1, prompt_cache=cache)
    next(steps)
    start = time.perf_counter()
    for _ in range(n):
        next(steps)
    return time.perf_counter() - start
