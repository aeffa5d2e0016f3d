"""A model's forward pass with bounded caches: in another thread, broken off, with embeddings, with nothing left over."""

from __future__ import annotations

import threading
from collections.abc import Callable
from itertools import islice, product
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import KVCache
from tiny_gates import given_gates
from tiny_models import tiny_model

import mlx_kvprune as kvp

KEPT = {"window": 16, "block": 16}
SETTINGS: dict[str, dict[str, Any]] = {
    "window": {"policy": "window"},
    "knorm": {"policy": "knorm"},
    "knorm, positions in the cache": {"policy": "knorm", "positions": "cache"},
    "knorm, 4 bits, global": {"policy": "knorm", "allocator": "global", "kv_bits": 4, "kv_group_size": 32},
    "tova, ragged": {"policy": "tova", "allocator": "head_adaptive"},
    "h2o, two precisions": {"policy": "h2o", "kv_bits": 4, "kv_group_size": 32, "kv_fine_tokens": 16},
    "snapkv": {"policy": "snapkv"},
    "expected_attention": {"policy": "expected_attention"},
    "surprise": {"policy": "surprise"},
    "probe": {"policy": "probe", "question": (5, 6, 7)},
    "retention": {"policy": "retention"},
    "knorm, where the model attends itself": {"policy": "knorm", "name": "plamo"},
}


def text(n: int, seed: int = 1) -> mx.array:
    return mx.random.randint(0, 128, (1, n), key=mx.random.key(seed))


def attached(budget: int = 120, name: str = "llama", **settings: Any) -> Any:
    model = tiny_model(name)
    mx.eval(model.parameters())
    if settings.get("policy") == "retention":
        given_gates(model, ["retention"])
    kvp.attach(model, budget=budget, quiet=True, **{**KEPT, **settings})
    return model


def step(model: Any, cache: list, tokens: mx.array) -> np.ndarray:
    return np.array(model(tokens, cache=cache)[:, -1])


def elsewhere(fn: Callable[[], Any]) -> Any:
    """What a function gives in a thread of its own."""
    found: list[Any] = []

    def run() -> None:
        try:
            found.append(fn())
        except Exception as error:
            found.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if isinstance(found[0], Exception):
        raise found[0]
    return found[0]


@pytest.mark.parametrize("length", [187, 95, 91])
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
def test_caches_go_on_in_another_thread(settings, length, tmp_path):
    """As mlx-lm's own do: read in one, forked and loaded in a second and third, with slots that have just changed hands."""
    model = attached(**settings)
    cache, expected = model.make_cache(), model.make_cache()
    tokens = mx.concatenate([text(length), text(8, 2)], axis=1)
    mx.eval(tokens)

    def read() -> None:
        step(model, cache, tokens[:, :length])
        for i in range(length, length + 5):
            step(model, cache, tokens[:, i : i + 1])

    step(model, expected, tokens[:, :length])
    for i in range(length, length + 7):
        wanted = step(model, expected, tokens[:, i : i + 1])
    elsewhere(read)
    twin = elsewhere(lambda: kvp.fork(cache))
    kvp.save_cache(tmp_path / "x.safetensors", cache)
    loaded = elsewhere(lambda: kvp.load_cache(tmp_path / "x.safetensors", model))
    for one in (cache, twin, loaded):
        elsewhere(lambda c=one: step(model, c, tokens[:, length + 5 : length + 6]))
        got = elsewhere(lambda c=one: step(model, c, tokens[:, length + 6 : length + 7]))
        np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-4)
    kvp.detach(model)


@pytest.mark.parametrize(
    ("settings", "where"),
    [
        *product(("window", "knorm", "knorm, positions in the cache"), ("rewind", "trim", "fork after drop")),
        *product(("window", "knorm, positions in the cache", "tova, ragged"), ("drop", "drop and close", "embeddings")),
    ],
)
def test_what_was_taken_back_or_dropped_goes_on_in_another_thread(settings, where):
    model = attached(**SETTINGS[settings])
    cache = model.make_cache()
    step(model, cache, text(60))
    if where == "embeddings":
        embedded = model.model.embed_tokens(text(70, 2))
        mx.eval(embedded)
        none = mx.zeros((1, 0), mx.int32)
        elsewhere(lambda: mx.eval(model(none, cache=cache, input_embeddings=embedded)))
    change = {
        "rewind": lambda: kvp.rewind(cache, 7),
        "trim": lambda: [c.trim(7) for c in cache],
        "drop": lambda: kvp.drop(cache, 9, 50),
        "drop and close": lambda: kvp.drop(cache, 9, 50, close=True),
        "fork after drop": lambda: (kvp.drop(cache, 20, 30), cache.__setitem__(slice(None), kvp.fork(cache))),
        "embeddings": lambda: None,
    }
    elsewhere(change[where])
    assert np.isfinite(step(model, cache, text(9, 3))).all()
    kvp.detach(model)


class Interrupted(BaseException):
    """As a Ctrl-C."""


def break_off(model: Any, cache: list, layer: int, patch: pytest.MonkeyPatch) -> None:
    """A pass that ends in the feed-forward part of a layer, after its attention."""
    name = next(name for name in ("mlp", "feed_forward", "ffn") if hasattr(model.layers[layer], name))
    part, left = type(getattr(model.layers[layer], name)), [layer]
    stock = part.__call__

    def broken(self: Any, *args: Any, **kwargs: Any) -> Any:
        left[0] -= 1
        if left[0] < 0:
            raise Interrupted
        return stock(self, *args, **kwargs)

    with patch.context() as patched:
        patched.setattr(part, "__call__", broken)
        with pytest.raises(Interrupted):
            step(model, cache, text(10, 2))


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("settings", ["window", "knorm, 4 bits, global", "surprise"])
def test_a_pass_that_was_broken_off_is_noticed(settings, layer, monkeypatch, tmp_path):
    """Layers before the place have read the tokens, those behind it have not: an answer would be silently wrong."""
    model = attached(**SETTINGS[settings])
    cache = model.make_cache()
    step(model, cache, text(40))
    before = kvp.fork(cache)
    break_off(model, cache, layer, monkeypatch)
    mine = pytest.raises(
        ValueError, match=r"\[cache\] a forward pass was broken off.* to 50 of them; try a fresh cache"
    )
    for use in (
        lambda: step(model, cache, text(10, 2)),
        lambda: kvp.fork(cache),
        lambda: kvp.save_cache(tmp_path / "x.safetensors", cache),
        lambda: kvp.rewind(cache, 1),
        lambda: kvp.drop(cache, 1, 2),
    ):
        with mine:
            use()
    assert np.isfinite(step(model, before, text(10, 2))).all()
    kvp.detach(model)


@pytest.mark.parametrize("name", ["gemma3_text", "gemma3n", "falcon_h1", "qwen3_next"])
def test_a_pass_that_was_broken_off_in_other_layers_is_noticed(name, monkeypatch):
    """Sliding windows, recurrent states and lists of caches, which may be the only ones that read the tokens."""
    model = attached(name=name, policy="window")
    cache = model.make_cache()
    step(model, cache, text(40))
    break_off(model, cache, 0, monkeypatch)
    with pytest.raises(ValueError, match=r"\[cache\] a forward pass was broken off"):
        step(model, cache, text(10, 2))
    kvp.detach(model)


def test_a_call_that_failed_before_anything_was_read_harms_nothing():
    model = attached(policy="surprise")
    cache, expected = model.make_cache(), model.make_cache()
    step(model, cache, text(40))
    step(model, expected, text(40))
    with pytest.raises(ValueError, match="surprise reads tokens"):
        model(mx.zeros((1, 0), mx.int32), cache=cache, input_embeddings=model.model.embed_tokens(text(12)))
    with pytest.raises(TypeError):
        model(text(12), cache=cache, nonsense=1)
    np.testing.assert_array_equal(step(model, cache, text(9, 2)), step(model, expected, text(9, 2)))
    kvp.detach(model)


def test_gradients_through_a_bounded_cache():
    """While nothing is evicted, as through mlx-lm's own cache."""
    model, tokens = attached(policy="knorm", budget=400), text(40)

    def loss(x: mx.array, cache: list) -> mx.array:
        none = mx.zeros((1, 0), mx.int32)
        return model(none, cache=cache, input_embeddings=x).sum()

    embedded = model.model.embed_tokens(tokens)
    found = mx.grad(lambda x: loss(x, model.make_cache()))(embedded)
    expected = mx.grad(lambda x: loss(x, [KVCache() for _ in model.layers]))(embedded)
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4)
    kvp.detach(model)


@pytest.mark.parametrize("settings", ["window", "knorm, 4 bits, global", "probe"])
def test_embeddings_without_tokens(settings):
    """mlx-lm's ``generate_step`` takes embeddings and an empty prompt; policies that are called in steps cut them."""
    model, tokens = attached(**SETTINGS[settings]), text(300)[0]
    first = lambda prompt, **more: [int(t) for t, _ in islice(generate_step(prompt, model, max_tokens=5, **more), 5)]
    embedded = model.model.embed_tokens(tokens)
    assert first(mx.array([], mx.int32), input_embeddings=embedded) == first(tokens)
    kvp.detach(model)


def test_surprise_refuses_embeddings_without_tokens():
    model = attached(policy="surprise")
    with pytest.raises(ValueError, match=r"surprise reads tokens by their ids; got embeddings of 89 without"):
        next(generate_step(mx.array([], mx.int32), model, input_embeddings=model.model.embed_tokens(text(90)[0])))
    kvp.detach(model)


def test_no_logits_stay_behind_tokens():
    """What surprise takes from a token's logits is taken at once: they are many times larger than what a slot holds."""
    vocabulary = 50_000
    model = tiny_model("llama", vocab_size=vocabulary)
    kvp.attach(model, "surprise", 400, quiet=True, window=64, block=64)
    cache = model.make_cache()
    step(model, cache, text(10))
    mx.eval(model(text(1), cache=cache))
    start = mx.get_active_memory()
    for _ in range(40):
        mx.eval(model(text(1), cache=cache))
    assert mx.get_active_memory() - start < 8 * 4 * vocabulary
    kvp.detach(model)
