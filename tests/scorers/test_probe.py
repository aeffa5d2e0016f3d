"""Probe: the question reads what is held after each block, leaves no trace but the scores, and spans are kept."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import mlx.core as mx
import numpy as np
import pytest
import reference
import tiny_models as zoo
from toy import LAYERS, SCALE, VOCAB, Toy

import mlx_kvprune as kvp
from mlx_kvprune import CacheSettings, PrunedKVCache
from mlx_kvprune import forward as steps
from mlx_kvprune.forward import forward
from mlx_kvprune.policy import POLICIES, Policy
from mlx_kvprune.scorers import Probe

SIZES = {"window": 12, "block": 8, "n_sink": 3}
SLOTS = 45
CHUNKS = (2, 50, 7, 33, 64, 1, 20, *[1] * 23)
QUESTION = (7, 3, 44, 3, 21)


def rows_of_question(toy: Toy, layer: int, start: int) -> list[np.ndarray]:
    """Queries and keys ``(H, L, D)`` of the question when it is read at position ``start``."""
    return [x[0].astype(np.float64) for x in toy.rows(layer, np.array([QUESTION]), start)[:2]]


def reference_layers(toy: Toy, span: int, share: str) -> list[reference.ReferenceLayer]:
    """One sequence: layers whose scores look at each other."""
    layers: list[reference.ReferenceLayer] = []
    pasts = lambda: [layer.rows[0].past for layer in layers]
    question, window = partial(rows_of_question, toy), SIZES["window"]
    score = partial(reference.probe, pasts=pasts, question=question, window=window, span=span, share=share)
    layers += [reference.ReferenceLayer(score, slots=SLOTS, scale=SCALE, **SIZES) for _ in range(LAYERS)]
    return layers


def read(layers: list[reference.ReferenceLayer], toy: Toy, tokens: np.ndarray, start: int) -> list[np.ndarray]:
    """Per layer the outputs ``(1, H, L, D)``; all layers take a token before the next one comes."""
    rows = [toy.rows(i, tokens, start) for i in range(LAYERS)]
    steps = [
        [layer.read(*(x[:, :, t : t + 1] for x in row)) for layer, row in zip(layers, rows, strict=True)]
        for t in range(tokens.shape[1])
    ]
    return [np.concatenate(outs, axis=2) for outs in zip(*steps, strict=True)]


@pytest.mark.parametrize(
    ("batch", "span", "share"), [(1, 5, "model"), (2, 1, "model"), (1, 17, "head"), (2, 3, "head")]
)
def test_kept_and_output_follow_the_definition(batch, span, share):
    toy = Toy()
    tokens = np.random.default_rng(1).integers(0, VOCAB, (batch, sum(CHUNKS)))
    settings = CacheSettings("probe", question=QUESTION, options=(("span", span), ("share", share)), **SIZES)
    caches = [PrunedKVCache(settings, SLOTS, layer) for layer in range(LAYERS)]
    rows = [reference_layers(toy, span, share) for _ in range(batch)]
    start = 0
    for n in CHUNKS:
        part = tokens[:, start : start + n]
        forward(toy, mx.array(part), caches)
        expected = [read(layers, toy, part[b : b + 1], start) for b, layers in enumerate(rows)]
        start += n
        for i, cache in enumerate(caches):
            kept = np.concatenate([layers[i].kept() for layers in rows])
            np.testing.assert_array_equal(reference.kept_positions(cache), kept, f"layer {i} after {start} tokens")
            np.testing.assert_allclose(toy.outputs(i), np.concatenate([x[i] for x in expected]), rtol=1e-4, atol=1e-5)


@dataclass(frozen=True)
class Unheeded(Probe):
    """Probes, and keeps the newest all the same."""

    def score(self, held, state):
        return held.positions.astype(mx.float32)


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "jamba"])
def test_probing_leaves_no_trace(name, monkeypatch):
    """Neither in the bounded layers nor in sliding or recurrent ones: unheeded probes give what ``window`` gives."""
    monkeypatch.setitem(POLICIES, "unheeded", Policy("unheeded", Unheeded(), "for this test"))
    model = zoo.tiny_model(name)
    tokens = mx.random.randint(0, zoo.VOCAB, (1, 140), key=mx.random.key(3))
    logits = {}
    for policy in ("window", "unheeded"):
        caches = kvp.make_cache(model, policy, 40, question=QUESTION, **SIZES)
        parts = [model(tokens[:, :130], cache=caches)] + [
            model(tokens[:, i : i + 1], cache=caches) for i in range(130, 140)
        ]
        logits[policy] = np.array(mx.concatenate(parts, axis=1))
    kvp.detach(model)
    np.testing.assert_allclose(logits["unheeded"], logits["window"], rtol=1e-4, atol=1e-4)


def test_spans_are_kept_around_what_the_question_finds():
    """One key in one layer answers the question; its neighbours stay as well, everywhere, and nothing else does."""
    toy, found, loud = Toy(), 30, 49
    tokens = np.random.default_rng(2).integers(0, 40, (1, 120))
    tokens[0, found] = loud
    queries, keys, _ = toy.tables[1]
    queries[list(QUESTION)] = keys[loud][[0, 0, 1, 1]]
    keys[loud] *= 3
    settings = CacheSettings("probe", question=QUESTION, options=(("span", 9),), window=12, block=8, n_sink=0)
    caches = [PrunedKVCache(settings, 20 + 9, layer) for layer in range(LAYERS)]
    toy.rows = lambda layer, tokens, start: [
        table[tokens].swapaxes(1, 2) for table in toy.tables[layer]
    ]  # no positions
    forward(toy, mx.array(tokens), caches)
    for cache in caches:
        pool = reference.kept_positions(cache)[:, :, :9]
        np.testing.assert_array_equal(pool, np.broadcast_to(np.arange(found - 4, found + 5), (1, 2, 9)))


def test_the_question_is_asked_before_any_layer_evicts(monkeypatch):
    """With ``pyramid`` the first layer, which has the most slots, is the last to evict."""
    model, asked, probe = zoo.tiny_model("llama"), [], steps.probe
    more = {"allocator": "pyramid", "question": (3, 5, 8), "window": 16, "block": 32, "n_sink": 4}
    cache = kvp.make_cache(model, "probe", 176, **more)
    monkeypatch.setattr(steps, "probe", lambda *args: (asked.append(None), probe(*args)))
    while not any(c.evicted for c in cache):
        model(mx.random.randint(0, 128, (1, 10), key=mx.random.key(1)), cache=cache)
    assert asked and not cache[0].evicted
    kvp.detach(model)
