"""Small traces for the tests: a tiny model, a random text, and what can be asked of a cache."""

from __future__ import annotations

from typing import Any

import numpy as np
from tiny_models import VOCAB

from mlx_kvprune import make_cache
from mlx_kvprune.report import CacheReport
from mlx_kvprune.report.trace import Trace
from mlx_kvprune.settings import Budget, CacheSettings

T = 420
TEXT = np.random.default_rng(0).integers(0, VOCAB, T).tolist()
BUDGET = 160
CASES: list[tuple[str, dict[str, Any]]] = [
    ("window", {}),
    ("random", {"kv_bits": 4}),
    ("knorm", {"positions": "cache"}),
    ("keydiff", {"kv_bits": 4, "kv_fine_tokens": 16}),
    ("tova", {"allocator": "global"}),
    ("h2o", {"allocator": "head_adaptive", "kv_bits": 8}),
    ("snapkv", {"allocator": "head_adaptive", "kv_bits": 4, "positions": "cache"}),
    ("expected_attention", {"allocator": "pyramid"}),
    ("rkv", {}),
    ("surprise", {"kv_bits": 3}),
    ("probe", {"question": (1, 2, 3), "allocator": "global"}),
]
NAMES = [f"{policy} {' '.join(f'{k}={v}' for k, v in more.items())}".strip() for policy, more in CASES]


def caches(model: Any, case: tuple[str, dict[str, Any]], budget: int = BUDGET) -> list[Any]:
    policy, more = case
    return make_cache(model, policy, budget, **more)


def synthetic(n_tokens: int, policy: str = "snapkv", n_layers: int = 30, n_heads: int = 3, seed: int = 0) -> Trace:
    """A trace of random lives, scores and ranks, as large as one likes; nothing in it deflates well."""
    rng, rows, budget, block = np.random.default_rng(seed), n_layers * n_heads, 512, 32
    starts = np.array([0, *range(500, n_tokens, block)], np.uint32)
    ends = np.arange(n_tokens) + rng.exponential(600, (rows, n_tokens)) + 64
    ends[rng.random(ends.shape) < 0.03] = np.inf
    stops = np.append(starts[1:], n_tokens).astype(np.int64)
    held = np.minimum(stops, budget)[:, None].repeat(rows, axis=1)
    scores = rng.random((rows, n_tokens), np.float32)
    full, nbytes = stops * 46_080, np.minimum(stops, budget) * 46_080
    about = CacheReport(
        policy, "uniform", str(budget), n_tokens, budget, int(nbytes[-1]), int(nbytes.max()), int(full[-1]), 0, n_layers,
        "fused", "",
    )  # fmt: skip
    return Trace(
        settings=CacheSettings(policy=policy, budget=Budget(budget), window=64, block=block),
        rows=np.array([(i, j) for i in range(n_layers) for j in range(n_heads)], np.uint16),
        caps=np.full(rows, budget, np.uint32),
        starts=starts,
        n_tokens=n_tokens,
        gone=np.where(ends >= n_tokens, len(starts), np.searchsorted(starts, ends)).astype(np.uint16),
        held=held.astype(np.uint32),
        nbytes=nbytes,
        nbytes_full=full,
        scores=scores,
        ranks=(scores * 254).astype(np.uint8),
        report=about,
    )
