"""Regret against brute force: attention weights from the model's own weights, evictions from the rule of the window."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from tiny_gates import LIKE_OTHERS, given_gates
from tiny_models import VOCAB, tiny_model

from mlx_kvprune import detach
from mlx_kvprune.evals import regret
from mlx_kvprune.evals.conditions import FULL, Condition
from mlx_kvprune.policy import POLICIES
from mlx_kvprune.settings import Budget

T = 700
TEXT = np.random.default_rng(0).integers(0, VOCAB, T).tolist()
BUDGET, SINKS, RING, BLOCK = 128, 4, 96, 32
ASKED = np.array([350, 351, 400, 511, 512, 640, 699])


@pytest.fixture(scope="module")
def model():
    made = tiny_model("llama")
    given_gates(made)
    yield made
    detach(made)


def plain_attention(model) -> np.ndarray:
    """Causal attention weights of the stock model, one matrix per layer and head ``(layers, H_q, T, T)``."""
    inner = model.model
    h, found = inner.embed_tokens(mx.array([TEXT])), []
    mask = mx.where(mx.tril(mx.ones((T, T), mx.bool_)), 0.0, -mx.inf)
    for layer in inner.layers:
        attn, x = layer.self_attn, layer.input_layernorm(h)
        split = lambda y, n: y.reshape(1, T, n, -1).transpose(0, 2, 1, 3)
        q, k = attn.rope(split(attn.q_proj(x), 4)), attn.rope(split(attn.k_proj(x), 2))
        v = mx.repeat(split(attn.v_proj(x), 2), 2, axis=1)
        weights = mx.softmax(q @ mx.repeat(k, 2, axis=1).swapaxes(-1, -2) * attn.scale + mask, axis=-1)
        found.append(weights[0])
        h = h + attn.o_proj((weights @ v).transpose(0, 2, 1, 3).reshape(1, T, -1))
        h = h + layer.mlp(layer.post_attention_layernorm(h))
    return np.array(mx.stack(found)).astype(np.float64)


def window_evictions() -> list[int]:
    """When the window policy evicts each position: blocks leave the ring; the pool keeps the newest. Sinks stay."""
    lost, pool, ring = [10**9] * T, [], []
    for t in range(T):
        if len(ring) == RING:
            leaving, ring = ring[:BLOCK], ring[BLOCK:]
            kept = sorted(pool + leaving, reverse=True)[: BUDGET - RING - SINKS]
            for j in set(pool + leaving) - set(kept):
                lost[j] = t
            pool = kept
        if t >= SINKS:
            ring.append(t)
    return lost


def brute_force(weights: np.ndarray, lost: list[int]) -> np.ndarray:
    total = np.zeros((weights.shape[0], 4))
    for layer in range(weights.shape[0]):
        for t in ASKED:
            for j in range(t + 1):
                if lost[j] <= t:
                    age = sum(t - lost[j] >= edge for edge in (32, 128, 512))
                    total[layer, age] += weights[layer, :, t, j].mean()
    return total / len(ASKED)


def test_evictions_of_the_window_are_the_rule(model):
    lost = regret.evictions(model, TEXT, Condition("window", Budget(BUDGET)).caches(model))
    assert lost.shape == (2, 1, 2, T)
    expected = np.minimum(window_evictions(), regret.NEVER)
    expected[expected == 10**9] = regret.NEVER
    np.testing.assert_array_equal(lost, np.broadcast_to(expected, lost.shape))


def test_regret_is_the_brute_force_sum(model):
    lost = regret.evictions(model, TEXT, Condition("window", Budget(BUDGET)).caches(model))
    (got,) = regret.measured(model, TEXT, [lost], ASKED, regret.recording(model), chunk=200)
    expected = brute_force(plain_attention(model), window_evictions())
    assert (expected > 0.01).all()  # every age is there
    np.testing.assert_allclose(got, expected, rtol=1e-3, atol=1e-6)


def test_heads_that_evict_different_tokens(model):
    """Each KV head is charged with what it evicted itself."""
    weights = np.array(np.random.default_rng(1).random((1, 1, 2, 1, 4)))
    lost = np.full((1, 1, 2, 4), regret.NEVER, np.int32)
    lost[0, 0, 0, 1], lost[0, 0, 1, 2] = 3, 4  # the second head evicts after the query at 3
    got = regret.mass(weights, lost, np.array([3]))
    assert got[0] == pytest.approx([weights[0, 0, 0, 0, 1] / 2, 0, 0, 0])


@pytest.mark.parametrize("policy", ["window", "random", "h2o", "surprise"])
def test_a_roomy_cache_and_the_full_one_regret_nothing(model, policy):
    ticks, conditions = [], [FULL, Condition(policy, Budget(1024))]
    full, roomy = regret.run(model, TEXT[:300], conditions, tick=ticks.append)
    assert sum(ticks) == regret.work(300, conditions)
    for row in (full, roomy):
        assert row["regret"] == 0.0
        assert row["by_layer"] == [0.0, 0.0]
        assert row["slots_held"] == 300
    assert full["kv_bytes"] == full["kv_bytes_full"] == roomy["kv_bytes_full"]


def test_a_row_is_the_sum_of_its_parts(model):
    conditions = [Condition(name, Budget(BUDGET)) for name in ("h2o", "random")]
    h2o, random = regret.run(model, TEXT, conditions, samples=64)
    assert 0 < h2o["regret"] != random["regret"] > 0
    for row in (h2o, random):
        assert row["regret"] == pytest.approx(sum(x["regret"] for x in row["by_age"]))
        assert row["regret"] == pytest.approx(np.mean(row["by_layer"]))
        assert row["by_layer"][row["worst_layer"]] == max(row["by_layer"])


@pytest.mark.parametrize("policy", sorted(set(POLICIES) - {"full", "probe", "retention_probe"}))
def test_every_policy_gives_a_table_of_evictions(model, policy):
    more = tuple(LIKE_OTHERS.get(policy, {}).items())
    lost = regret.evictions(model, TEXT[:300], Condition(policy, Budget(BUDGET), more=more).caches(model))
    held = (lost == regret.NEVER).sum(axis=-1)
    assert held.min() >= BUDGET - BLOCK
    assert held.max() <= BUDGET
    assert (lost[..., :SINKS] == regret.NEVER).all()
    assert (lost[..., -64:] == regret.NEVER).all()


def test_sampled_queries_are_of_the_second_half():
    some = regret.sampled(1000, 64, seed=1)
    assert len(set(some)) == 64
    assert (np.diff(some) > 0).all()
    assert some.min() >= 500
    assert len(regret.sampled(100, 64, seed=1)) == 50


def test_a_model_that_keeps_its_queries_is_refused():
    model = tiny_model("gemma2")
    with pytest.raises(ValueError, match=r"\[regret\] needs the queries"):
        regret.recording(model)
    detach(model)
