"""The gates that come along with SmolLM2, on a text that they were not trained on."""

from __future__ import annotations

from pathlib import Path

import pytest

import mlx_kvprune as kvp
from mlx_kvprune.evals.conditions import Condition
from mlx_kvprune.evals.fidelity import trace
from mlx_kvprune.settings import Budget

pytestmark = pytest.mark.model
DOCUMENT = Path(__file__).parents[2] / "examples" / "documents" / "aesop-fables.txt"
TOKENS, LAST = 1024, 256


@pytest.fixture(scope="module")
def smollm2():
    return kvp.load("smollm2-135m", dtype="float32")


@pytest.mark.parametrize(
    ("policy", "budget", "bytes_at_most"),
    [("retention", 256, 1 / 3.9), ("spkv", 1000, 1 / 2)],  # spkv holds what it finds worth it
)
def test_nearer_to_the_full_cache_than_recency_is(smollm2, policy, budget, bytes_at_most):
    """At the same bytes, and by three tenths at least."""
    model, tokenizer = smollm2
    tokens = tokenizer.encode(DOCUMENT.read_text()[20_000:30_000])[:TOKENS]
    kl = lambda found: found.kl[-LAST:].mean()
    gates = Condition(policy, Budget(budget))
    gated = trace(model, tokens, [gates])[gates]
    assert gated.held["kv_bytes"] < bytes_at_most * gated.held["kv_bytes_full"]
    recency = Condition("window", Budget(nbytes=gated.held["kv_bytes_peak"]))
    assert kl(gated) < 0.7 * kl(trace(model, tokens, [recency])[recency])
