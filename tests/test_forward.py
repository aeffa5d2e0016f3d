"""A model's forward pass with bounded caches: in another thread, broken off, with embeddings, with nothing left over."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.generate import generate_step
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


class Interrupted(BaseException):
    """As a Ctrl-C."""


@pytest.mark.parametrize("settings", ["window", "knorm, 4 bits, global", "surprise"])
def test_a_pass_that_was_broken_off_is_noticed(settings, monkeypatch):
    """Layers before the place have read the tokens, those behind it have not: an answer would be silently wrong."""
    model = attached(**SETTINGS[settings])
    cache = model.make_cache()
    step(model, cache, text(40))
    before = kvp.fork(cache)

    def broken(self: Any, x: mx.array) -> mx.array:
        raise Interrupted

    with monkeypatch.context() as patch:  # in the first layer, after its attention
        patch.setattr(type(model.layers[0].mlp), "__call__", broken)
        with pytest.raises(Interrupted):
            step(model, cache, text(10, 2))
    with pytest.raises(ValueError, match=r"\[cache\] a forward pass was broken off.* got 40 to 50; try a fresh"):
        step(model, cache, text(10, 2))
    assert np.isfinite(step(model, before, text(10, 2))).all()
    kvp.detach(model)


@pytest.mark.parametrize("settings", ["window", "knorm, 4 bits, global", "probe"])
def test_embeddings_without_tokens(settings):
    """mlx-lm's ``generate_step`` takes embeddings and an empty prompt; policies that are called in steps cut them."""
    model, tokens = attached(**SETTINGS[settings]), text(300)[0]
    first = lambda prompt, **more: [
        int(t) for t, _ in itertools.islice(generate_step(prompt, model, max_tokens=5, **more), 5)
    ]
    embedded = model.model.embed_tokens(tokens)
    assert first(mx.array([], mx.int32), input_embeddings=embedded) == first(tokens)
    kvp.detach(model)


def test_surprise_refuses_embeddings_without_tokens():
    model = attached(policy="surprise")
    with pytest.raises(ValueError, match=r"surprise reads tokens by their ids; got embeddings of 32 without"):
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
