"""Surprise: the hook writes the model's own surprisal beside each slot, however the text is cut."""

from __future__ import annotations

from functools import partial

import mlx.core as mx
import numpy as np
import pytest
import reference
import tiny_models as zoo
from toy import LAYERS, SCALE, VOCAB, Toy

import mlx_kvprune as kvp
from mlx_kvprune import CacheSettings, PrunedKVCache
from mlx_kvprune.forward import forward

SIZES = {"window": 12, "block": 8, "n_sink": 3}
OPTIONS = {"momentum": 0.6, "forget": 1 / 64}
SLOTS = 45
CHUNKS = (2, 50, 7, 33, 64, 1, 20, *[1] * 23)


def remembered(cache: PrunedKVCache) -> dict[tuple[int, int, int], float]:
    """What is remembered of each slot, by row, KV head and position."""
    held = cache.everything()
    positions, memory = np.array(held.positions), np.array(held.memory)
    return {(*index[:2], int(positions[index])): float(memory[index]) for index in np.ndindex(positions.shape)}


@pytest.mark.parametrize("chunks", [CHUNKS, (1, 1, 1, 60, 140)], ids=["long first", "one token first"])
@pytest.mark.parametrize("batch", [1, 2])
def test_kept_and_output_follow_the_definition(batch, chunks):
    toy, length = Toy(), sum(chunks)
    tokens = np.random.default_rng(1).integers(0, VOCAB, (batch, length))
    settings = CacheSettings("surprise", options=tuple(OPTIONS.items()), **SIZES)
    caches = [PrunedKVCache(settings, SLOTS, layer) for layer in range(LAYERS)]
    scores = [partial(reference.surprise, surprisal=toy.surprisal(row), **OPTIONS) for row in tokens]
    layers = [[reference.ReferenceLayer(x, slots=SLOTS, scale=SCALE, **SIZES) for x in scores] for _ in range(LAYERS)]
    start = 0
    for n in chunks:
        forward(toy, mx.array(tokens[:, start : start + n]), caches)
        for i, (cache, rows) in enumerate(zip(caches, layers, strict=True)):
            arrays = toy.rows(i, tokens[:, start : start + n], start)
            expected = np.concatenate([row.read(*(x[b : b + 1] for x in arrays)) for b, row in enumerate(rows)])
            np.testing.assert_allclose(toy.outputs(i), expected, rtol=1e-4, atol=1e-5)
            kept = np.concatenate([row.kept() for row in rows])
            np.testing.assert_array_equal(reference.kept_positions(cache), kept, f"after {start + n} tokens")
        start += n


def test_surprisal_is_read_off_a_real_model():
    """The logits that a bounded tiny llama gave for its text are the ones that its memory was written from."""
    model = zoo.tiny_model("llama")
    tokens = mx.random.randint(0, zoo.VOCAB, (1, 160), key=mx.random.key(3))
    caches = kvp.make_cache(model, "surprise", 60, momentum=0.0, **SIZES)
    logits = [model(tokens[:, span], cache=caches) for span in (slice(0, 90), slice(90, 159), slice(159, 160))]
    logits = np.array(mx.concatenate(logits, axis=1))[0].astype(np.float64)
    kvp.detach(model)
    expected = [0.0] + [-np.log(reference.softmax(logits[i - 1])[int(tokens[0, i])]) for i in range(1, 160)]
    for cache in caches:
        assert cache.evicted
        for (_, _, position), value in remembered(cache).items():
            np.testing.assert_allclose(value, expected[position], rtol=1e-4, atol=1e-4)
