"""Local layers: sinks and ring alone, and what they leave free is the others'; against sums by hand, and through models."""

from __future__ import annotations

from itertools import product

import mlx.core as mx
import numpy as np
import pytest
from test_allocators import ALLOCATORS, STORES, filled, layer_settings
from tiny_models import tiny_model

import mlx_kvprune as kvp
from mlx_kvprune import CacheSettings, PrunedKVCache
from mlx_kvprune.allocators import slots_per_layer
from mlx_kvprune.attach import settings_from, use_gates
from mlx_kvprune.gates import Gates, GateShape
from mlx_kvprune.settings import PAGE
from mlx_kvprune.storage import LayerShape, layer_nbytes

SHAPE = LayerShape(n_heads=4, n_kv_heads=2, key_dim=32, value_dim=32, itemsize=4)
HEADS = (1, 3, 2, 1, 2)
SHAPES = [LayerShape(n_heads=6, n_kv_heads=n, key_dim=32, value_dim=32, itemsize=4) for n in HEADS]


def given(settings: CacheSettings, shapes=(SHAPE,) * 5, memory=False) -> list[int]:
    slots = slots_per_layer(shapes, settings, memory, [0] * len(shapes))
    assert slots is not None
    return slots


# -- how they are written ------------------------------------------------------------------------------------------------


def test_lists_have_one_form():
    forms = {"": "", " auto ": "auto", "3": "3", "2,0,1": "0-2", "0, 5-7 ,6": "0,5-7", "4-4": "4"}
    assert {text: CacheSettings(local_layers=text).local_layers for text in forms} == forms
    assert CacheSettings(local_layers=[7, 5, 6, 0]) == CacheSettings(local_layers="0,5-7")
    assert CacheSettings(local_layers=()).local_layers == ""
    assert CacheSettings(local_layers="0,5-7").local == {0, 5, 6, 7}
    assert CacheSettings(local_layers="auto").local == frozenset()


@pytest.mark.parametrize("text", ["x", "1,", "3-1", "-1", "1.5", [1.5], 3, None])
def test_what_is_no_list_is_refused(text):
    with pytest.raises(ValueError, match=r"\[local-layers\] not a list of layers; got .*; try 0,1,5-7"):
        CacheSettings(local_layers=text)


def test_settings_go_there_and_back():
    settings = CacheSettings(local_layers="0,5-7")
    assert CacheSettings.from_json(settings.to_json()) == settings
    assert "local layers 0,5-7" in settings.described()
    old = settings.to_json().replace('"local_layers": "0,5-7", ', "")
    assert "local" not in old
    assert CacheSettings.from_json(old) == CacheSettings()


# -- before the first token ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("allocator", ALLOCATORS)
@pytest.mark.parametrize("local", ["0", "1,3", "0-3"])
def test_tokens_that_are_freed_go_to_the_others(allocator, local):
    settings = layer_settings(allocator, "as they are", budget=201, local_layers=local)
    slots, fixed = given(settings), 16 + 32 + 4
    others = [n for i, n in enumerate(slots) if i not in settings.local]
    assert [slots[i] for i in settings.local] == [fixed] * len(settings.local)
    rest = 5 * 201 - fixed * len(settings.local)
    left = rest - sum(others)
    assert 0 <= left < len(others) if settings.ragged else left == 0
    if allocator != "pyramid":
        assert max(others) - min(others) <= 1
        assert not settings.ragged or len(set(others)) == 1, "pages of all layers are full at one time"
    else:
        assert others[0] >= others[-1]


@pytest.mark.parametrize("allocator", [a for a in ALLOCATORS if a != "pyramid"])
@pytest.mark.parametrize("local", [c for n in (1, 2, 4) for c in ("0,2", "1", "1-4", "0,3-4")[n - 1 : n]])
def test_layers_with_different_numbers_of_heads(allocator, local):
    """The sum over all heads is the budget's, whoever has how many."""
    settings = layer_settings(allocator, "as they are", budget=150, local_layers=local)
    slots = given(settings, SHAPES)
    held, budget = sum(n * s for n, s in zip(HEADS, slots, strict=True)), 150 * sum(HEADS)
    others = [n for i, n in enumerate(HEADS) if i not in settings.local]
    assert budget - sum(others) < held <= budget
    assert min(n for i, n in enumerate(slots) if i not in settings.local) >= 150


@pytest.mark.parametrize("positions", ["text", "cache"])
@pytest.mark.parametrize(("allocator", "store"), list(product(ALLOCATORS, STORES)))
def test_bytes_of_filled_caches_are_the_budget(allocator, store, positions):
    settings = layer_settings(allocator, store, positions, local_layers="0,2")
    budget = 200_000
    slots = given(settings.but(budget=f"{budget}B"), [SHAPE] * 4)
    more = given(settings.but(budget=f"{budget}B", local_layers=""), [SHAPE] * 4)
    assert slots[1] + slots[3] > more[1] + more[3]
    caches = [PrunedKVCache(settings, n, layer) for layer, n in enumerate(slots)]
    for cache in caches:
        filled(cache)
        assert cache.evicted
    for cache in caches[::2]:
        positions = np.array(cache.held.positions())
        assert cache.local and cache.held.pools == []
        assert positions.shape[2] <= 16 + 32 + 4
        newest = cache.tokens_seen - (positions.shape[2] - 4)
        assert (positions == [*range(4), *range(newest, cache.tokens_seen)]).all()
    assert sum(c.nbytes for c in caches) <= sum(c.nbytes_peak for c in caches) <= budget
    room = lambda tokens: sum(
        layer_nbytes(SHAPE, settings, n if i in (0, 2) else n + tokens, False, 0) for i, n in enumerate(slots)
    )
    assert room(0) <= budget < room(1 if allocator != "pyramid" else 2 * PAGE)


def test_combinations_that_cannot_be():
    wanted = layer_settings("uniform", "as they are", budget=200)
    with pytest.raises(ValueError, match=r"\[local-layers\] all 5 layers would be local.* got 0-4; try"):
        given(wanted.but(local_layers="0-4"))
    with pytest.raises(ValueError, match=r"\[local-layers\] no such layer; got 5,7-8 of 5 bounded layers; try .* to 4"):
        given(wanted.but(local_layers="0,5,7-8"))
    with pytest.raises(ValueError, match=r"\[budget\] too small"):
        given(wanted.but(local_layers="0", budget=52))


# -- through a model -----------------------------------------------------------------------------------------------------


def text(n: int) -> mx.array:
    return mx.random.randint(0, 128, (1, n), key=mx.random.key(1))


def made(policy="knorm", budget: int | str = 224, name="llama", **more):
    model = tiny_model(name, 0, **({"num_hidden_layers": 4} if name == "llama" else {}))
    return model, kvp.make_cache(model, policy, budget, window=32, block=32, local_layers="0,2", **more)


def read(model, cache, tokens, step):
    for start in range(0, tokens.shape[1], step):
        logits = model(tokens[:, start : start + step], cache=cache)[:, -1]
        mx.eval(logits, [c.state for c in cache])
        assert all(c.size() <= 32 + 32 + 4 for c in cache if c.local)
        assert sum(c.held.held() for c in cache) <= sum(2 * c.slots for c in cache) <= 2 * 4 * 224
    return np.array(logits)


CASES = [
    ("knorm", {"allocator": a, **more})
    for a in ALLOCATORS
    for more in ({}, {"kv_bits": 4, "kv_group_size": 32}, {"positions": "cache"})
] + [
    ("h2o", {"allocator": "global"}),
    ("snapkv", {"kv_bits": 4, "kv_group_size": 32, "kv_fine_tokens": 16}),
    ("surprise", {}),
    ("probe", {"question": (1, 2, 3)}),
    ("window", {}),
]


@pytest.mark.parametrize(("policy", "more"), CASES, ids=str)
def test_steps_of_prefill_do_not_matter(policy, more):
    model, _ = made()
    outs, held = [], []
    for step in (600, 53):
        cache = kvp.make_cache(model, policy, 224, window=32, block=32, local_layers="0,2", **more)
        outs.append(read(model, cache, text(600), step))
        held.append([np.sort(np.array(c.held.positions()), axis=2) for c in cache])
        assert sum(c.evicted for c in cache) >= 3
    exact = "kv_bits" not in more
    for a, b in zip(*(h[: None if exact else 1] for h in held), strict=True):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_allclose(*outs, rtol=1e-3, atol=2e-3 if exact else 5e-2)
    kvp.detach(model)


def test_a_model_that_does_its_own_attention():
    model = tiny_model("deepseek_v3", num_hidden_layers=3)
    with pytest.raises(
        ValueError, match=r"\[local-layers\] layers would hold differently many slots.*; try it without"
    ):
        kvp.make_cache(model, "knorm", 160, window=16, block=32, local_layers="1")
    kvp.detach(model)


@pytest.mark.parametrize("allocator", ["uniform", "global"])
def test_saved_forked_and_rewound(allocator, tmp_path):
    model, cache = made(allocator=allocator)
    read(model, cache, text(500), 100)
    kvp.save_cache(tmp_path / "a.safetensors", cache)
    back = kvp.load_cache(tmp_path / "a.safetensors", model)
    assert [c.local for c in back] == [c.local for c in cache] == [True, False] * 2
    outs = [np.array(model(text(9), cache=c)[:, -1]) for c in (kvp.fork(cache), back, cache)]
    np.testing.assert_array_equal(outs[0], outs[2])
    np.testing.assert_allclose(outs[1], outs[2], rtol=1e-4, atol=1e-5)
    kvp.detach(model)


def test_rewind_is_exact_or_refused():
    model, cache = made()
    read(model, cache, text(60), 60)
    first = read(model, kvp.fork(cache), text(5), 5)
    model(text(4), cache=cache)
    kvp.rewind(cache, 4)
    np.testing.assert_allclose(read(model, cache, text(5), 5), first, rtol=1e-4, atol=1e-5)
    read(model, cache, text(64), 64)  # local layers have dropped tokens, the others nothing
    assert [c.evicted for c in cache] == [True, False] * 2
    with pytest.raises(ValueError, match=r"\[rewind\]"):
        kvp.rewind(cache, 80)
    kvp.drop(cache, 70, 100, close=False)
    read(model, cache, text(300), 50)
    kvp.detach(model)


def test_a_batch_gives_what_each_text_gives_alone():
    model, _ = made()
    kvp.attach(model, "knorm", 224, quiet=True, window=32, block=32, local_layers="0,2", allocator="head_adaptive")
    alone = [model.make_cache() for _ in range(2)]
    for cache, n in zip(alone, (300, 211), strict=True):
        read(model, cache, text(n), 64)
    batch = [type(rows[0]).merge.fget(rows[0])(list(rows)) for rows in zip(*alone, strict=True)]
    together = np.array(model(mx.concatenate([text(3)] * 2), cache=batch)[:, -1])
    for i, cache in enumerate(alone):
        np.testing.assert_allclose(together[i], read(model, cache, text(3), 3)[0], rtol=1e-3, atol=1e-4)
    kvp.detach(model)


def test_without_a_bound_the_others_hold_everything():
    model = tiny_model("llama", num_hidden_layers=3)
    cache = kvp.make_cache(model, "window", None, window=16, block=32, local_layers="1")
    for start in range(0, 300, 100):
        model(text(300)[:, start : start + 100], cache=cache)
    assert [c.size() for c in cache][::2] == [300, 300]
    assert cache[1].size() <= 52
    kvp.detach(model)


# -- auto ----------------------------------------------------------------------------------------------------------------


def test_auto_reads_the_gates():
    model = tiny_model("llama", num_hidden_layers=3)
    kvp.make_cache(model)
    gates = Gates(GateShape("mlp", (128,) * 3, (2,) * 3, hidden=8))
    use_gates(model, "retention", gates)
    with pytest.raises(ValueError, match=r"\[local-layers\] auto .* got gates that name none; try"):
        kvp.make_cache(model, "retention", 224, local_layers="auto")
    gates.local = "0,2"
    cache = kvp.make_cache(model, "retention", 480, local_layers="auto")
    assert [c.local for c in cache] == [True, False, True]
    assert cache[0].settings.local_layers == "0,2", "saved with the caches"
    for start in range(0, 1500, 100):
        model(text(1500)[:, start : start + 100], cache=cache)
    assert all(c.evicted for c in cache)
    gates.local = ""
    assert not any(c.local for c in kvp.make_cache(model, "retention", 480, local_layers="auto"))
    with pytest.raises(ValueError, match=r"\[local-layers\] auto .* got policy 'knorm', which has none; try"):
        kvp.attach(model, "knorm", 224, local_layers="auto", quiet=True)
    with pytest.raises(ValueError, match=r"\[local-layers\] policy full is mlx-lm's own cache; got auto"):
        kvp.make_cache(model, "full", local_layers="auto")
    kvp.detach(model)


def test_settings_from_takes_lists():
    assert settings_from(policy="knorm", budget=512, local_layers=[1, 2]).local_layers == "1-2"
