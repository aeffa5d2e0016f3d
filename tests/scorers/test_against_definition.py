"""Every signal that a layer can compute from its own tensors, against its published definition in NumPy.

The cache is driven as a model would drive it, over uneven chunks and single tokens with many evictions between.
"""

from __future__ import annotations

from functools import partial

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import reference

from mlx_kvprune import CacheSettings, PrunedKVCache
from mlx_kvprune.scorers import Held

WIDTH, LAYER, SCALE = 16, 5, 0.4
SIZES = {"window": 12, "block": 8, "n_sink": 3}
SLOTS = 45  # the pool's share, 25, is not a multiple of the block
CHUNKS = (2, 50, 7, 33, 64, 1, 20, *[1] * 23)
SHAPES = {"one sequence": (1, 2, 1), "batch, one KV head": (2, 1, 3), "batch, GQA": (2, 2, 3)}

POLICIES = {
    "window": {},
    "random": {"seed": 11},
    "knorm": {},
    "keydiff": {},
    "tova": {},
    "h2o": {},
    "snapkv": {"last": 10, "kernel": 5},
    "snapkv, max": {"last": 12, "kernel": 3, "pooling": "max"},
    "expected_attention": {"future": 40},
    "rkv": {"last": 6, "kernel": 7, "mix": 0.1, "threshold": 0.5},
    "rkv, mixed": {"last": 8, "kernel": 3, "mix": 0.5, "threshold": 0.3},
}


def tensors(shape: tuple[int, int, int], length: int, seed: int = 0) -> tuple[np.ndarray, ...]:
    """Random queries, keys and values ``(B, H, length, WIDTH)``; a key is near the one before it."""
    (batch, heads, gqa_factor), rng = shape, np.random.default_rng(seed)
    draw = lambda n: rng.normal(size=(batch, n, length, WIDTH)).astype(np.float32)
    queries, keys, values = draw(heads * gqa_factor), draw(heads), draw(heads)
    for t in range(1, length):
        keys[:, :, t] = 0.6 * keys[:, :, t - 1] + 0.8 * keys[:, :, t]
    keys[:, :, : SIZES["n_sink"]] += 0.5  # sinks that draw attention, some heads more than others
    return queries + 0.5, keys, values


def both(
    policy: str, options: dict, slots: int = SLOTS, **sizes: int
) -> tuple[PrunedKVCache, reference.ReferenceLayer]:
    """The package's cache and the reference, of the same settings."""
    name, sizes = policy.split(",")[0], {**SIZES, **sizes}
    cache = PrunedKVCache(CacheSettings(name, options=tuple(options.items()), **sizes), slots, LAYER)
    extra = {"layer": LAYER} if name == "random" else {}
    score = partial(getattr(reference, name), **options, **extra)
    return cache, reference.ReferenceLayer(score, slots=slots, scale=SCALE, **sizes)


def step(cache: PrunedKVCache, queries, keys, values) -> np.ndarray:
    """What a layer of a model does with its cache."""
    cache.rope = nn.RoPE(WIDTH)
    handle, values = cache.update_and_fetch(mx.array(keys), mx.array(values))
    return np.array(cache.attend(mx.array(queries), handle, SCALE, "causal" if queries.shape[2] > 1 else None))


def check(cache: PrunedKVCache, layer: reference.ReferenceLayer, arrays: tuple, chunks: tuple[int, ...]) -> None:
    """Read ``arrays`` in chunks with both; the outputs and what is kept must agree after each."""
    start = 0
    for length in chunks:
        part = [x[:, :, start : start + length] for x in arrays]
        out, expected = step(cache, *part), layer.read(*part)
        start += length
        kept = reference.kept_positions(cache)
        np.testing.assert_array_equal(kept, layer.kept(), f"after {start} tokens; smallest gap {layer.smallest_gap}")
        np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-5)
    assert cache.evicted


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize(("policy", "options"), POLICIES.items(), ids=POLICIES.keys())
def test_kept_and_output(policy, options, shape):
    check(*both(policy, options), tensors(shape, sum(CHUNKS)), CHUNKS)


def test_tova_of_heads_that_hold_different_tokens():
    """The mean for each token, over the heads that hold it, wherever in their slots it is."""
    cache = PrunedKVCache(CacheSettings("tova", "head_adaptive", **SIZES), 60, LAYER)
    queries, keys, values = tensors((2, 2, 2), 300)
    for t in range(200):
        step(cache, *(x[:, :, t : t + 1] for x in (queries, keys, values)))
    pool = cache.held.last
    rng = np.random.default_rng(0)
    for page in range(pool.used):  # as a competition of all layers leaves them: other tokens, in another order
        gone = rng.random(32) < 0.5
        pool.positions[page] = rng.permutation(np.where(gone, -1, pool.positions[page]))
    pool._lay_out()
    held = cache.everything()
    assert held.memory is not None
    positions, memory = np.array(held.positions), np.array(held.memory)
    scores = np.array(cache.scorer.score(held, cache.signals))
    for row, head, slot in np.argwhere(positions >= 0):
        same = positions[row] == positions[row, head, slot]
        np.testing.assert_allclose(scores[row, head, slot], memory[row][same].mean(), rtol=1e-5)
    assert any(len(set(positions[0, :, slot])) > 1 for slot in range(positions.shape[2]))


@pytest.mark.parametrize(
    ("policy", "options"),
    {
        "snapkv": {"last": 64, "kernel": 5},
        "expected_attention": {"future": 512},
        "rkv": {"last": 8, "kernel": 7, "mix": 0.1, "threshold": 0.5},
    }.items(),
)
def test_defaults_are_the_published_ones(policy, options):
    """Hyper-parameters, window, block and sinks as a user gets them, options only told to the reference."""
    chunks = (130, 1, 99, 40, *[1] * 10)
    cache = PrunedKVCache(CacheSettings(policy), 120)
    score = partial(getattr(reference, policy), **options)
    layer = reference.ReferenceLayer(score, slots=120, window=64, block=32, n_sink=4, scale=SCALE)
    check(cache, layer, tensors((1, 2, 2), sum(chunks)), chunks)


@pytest.mark.parametrize("policy", ["window", "tova", "snapkv", "rkv"])
def test_without_sinks_and_with_one_token_blocks(policy):
    """Block 1 is what the papers do: one token in, one token out."""
    options = {"snapkv": {"last": 5, "kernel": 3}, "rkv": {"last": 5, "kernel": 3, "mix": 0.1, "threshold": 0.5}}
    cache, layer = both(policy, options.get(policy, {}), slots=14, window=5, block=1, n_sink=0)
    chunks = (17, 1, 1, 12, 30)
    check(cache, layer, tensors((1, 2, 2), sum(chunks)), chunks)


@pytest.mark.parametrize("policy", ["snapkv", "rkv"])
def test_more_queries_than_the_window_holds(policy):
    """An old query may find nothing of its time; the scores must stay numbers and the newest tokens in order."""
    cache = PrunedKVCache(CacheSettings(policy, window=4, block=2, n_sink=0), 8)
    arrays = tensors((1, 2, 2), 90)
    for t in range(90):
        out = step(cache, *(x[:, :, t : t + 1] for x in arrays))
        assert np.isfinite(out).all()
    held = cache.everything()
    scores = np.array(cache.scorer.score(held, cache.signals))
    observed = np.array(held.positions) >= 90 - 4
    assert np.isfinite(scores[~observed]).all() and (scores[observed] == np.inf).all()


def test_random_is_uniform_and_differs_between_heads_layers_and_seeds():
    positions = mx.broadcast_to(mx.arange(20_000, dtype=mx.int32), (1, 2, 20_000))
    nothing, draws = mx.zeros((*positions.shape, 0)), []
    for seed, layer in ((0, 0), (0, 1), (1, 0)):
        cache = PrunedKVCache(CacheSettings("random", seed=seed), 200, layer)
        held = Held(nothing, nothing, positions, None, positions.shape[2], cache.layer, 1.0)
        draws.append(np.array(cache.scorer.score(held, {}))[0])
    rows = np.concatenate(draws)
    assert rows.min() >= 0
    assert rows.max() < 1
    np.testing.assert_allclose(
        np.quantile(rows, [0.1, 0.5, 0.9], axis=1), [[x] * 6 for x in (0.1, 0.5, 0.9)], atol=0.02
    )
    correlations = np.corrcoef(rows) - np.eye(len(rows))
    assert np.abs(correlations).max() < 0.03
