"""The gates that come along with SmolLM2, on a text that they were not trained on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import mlx_kvprune as kvp

pytestmark = pytest.mark.model
DOCUMENT = Path(__file__).parents[2] / "examples" / "documents" / "aesop-fables.txt"
TOKENS, CHUNK, LAST = 1024, 128, 256


@pytest.fixture(scope="module")
def smollm2():
    return kvp.load("smollm2-135m", dtype="float32")


def log_probabilities(model: Any, tokens: mx.array, cache: Any) -> np.ndarray:
    """Of the last tokens, read in pieces with a cache ``(LAST, vocab)``."""
    parts = []
    for start in range(0, TOKENS, CHUNK):
        logits = model(tokens[:, start : start + CHUNK], cache=cache)[0]
        parts.append(logits - mx.logsumexp(logits, axis=-1, keepdims=True))
        mx.eval(parts[-1], [c.state for c in cache])
    return np.array(mx.concatenate(parts[-LAST // CHUNK :]).astype(mx.float32))


@pytest.mark.parametrize(
    ("policy", "settings", "bytes_at_most"),
    [("retention", {"budget": 256}, 1 / 3.9), ("spkv", {"budget": 1000}, 1 / 2)],  # spkv holds what it finds worth it
)
def test_nearer_to_the_full_cache_than_recency_is(smollm2, policy, settings, bytes_at_most):
    """At the same bytes, and by three tenths at least."""
    model, tokenizer = smollm2
    tokens = mx.array([tokenizer.encode(DOCUMENT.read_text()[20_000:30_000])[:TOKENS]])
    full = log_probabilities(model, tokens, kvp.make_cache(model, "full"))
    kl = lambda found: float((np.exp(full) * (full - found)).sum(axis=-1).mean())
    caches = kvp.make_cache(model, policy, **settings)
    gated = kl(log_probabilities(model, tokens, caches))
    held = kvp.report(caches)
    assert held.kv_bytes < bytes_at_most * held.kv_bytes_full
    recent = kvp.make_cache(model, "window", budget=f"{held.kv_bytes_peak / 1e6:.2f}MB")
    assert gated < 0.7 * kl(log_probabilities(model, tokens, recent))
