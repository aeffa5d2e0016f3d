"""mlx-vlm: image tokens compete with text tokens. A tiny random LLaVA; no real model was tried.

The reference is mlx-vlm's own decoder without a cache, whose attention is given dense masks: who saw whom, by what the
bounded caches held at each token.
"""

from __future__ import annotations

import importlib

import pytest

import mlx_kvprune as kvp

pytest.importorskip("mlx_vlm", reason="needs the extra vlm")

import mlx.core as mx
import numpy as np
from mlx.utils import tree_map
from mlx_vlm.generate.ar import generate_step
from mlx_vlm.models import llava, qwen2_vl
from mlx_vlm.models.cache import KVCache, RotatingKVCache, make_prompt_cache
from tiny_gates import given_gates

from mlx_kvprune.vlm import check_mask

HEADS, KV_HEADS, WIDTH, VOCAB, IMAGE = 4, 2, 64, 96, 95
BEFORE, PATCHES, AFTER = 12, 64, 52
LENGTH = BEFORE + PATCHES + AFTER
SIZES = {"n_sink": 2, "window": 8, "block": 8}
BUDGET = 84  # two pages per head beside the ring
CASES = [
    ("window", "uniform"),
    *((policy, allocator) for policy in ("knorm", "snapkv", "retention") for allocator in ("uniform", "global")),
]


def decoder_config(module, kind: str, **more):
    sizes = {"hidden_size": WIDTH, "intermediate_size": WIDTH, "num_hidden_layers": 2, "vocab_size": VOCAB}
    heads = {"num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS}
    return module.TextConfig(model_type=kind, **sizes, **heads, **more)


@pytest.fixture(scope="module")
def model():
    sizes = {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2}
    vision = llava.VisionConfig("clip_vision_model", image_size=64, patch_size=8, **sizes)
    text = decoder_config(llava, "llama")
    mx.random.seed(3)
    model = llava.Model(llava.ModelConfig(text, vision, "llava", image_token_index=IMAGE, vocab_size=VOCAB))
    grown = lambda x: 2.5 * x if x.ndim == 2 else x  # else random weights tell tokens hardly apart
    model.update(tree_map(grown, model.parameters()))
    return model


@pytest.fixture(autouse=True)
def _detached(model):
    yield
    kvp.detach(model)


def prompt() -> mx.array:
    """Token ids ``(1, LENGTH)``, an image's among them."""
    ids = mx.random.randint(0, IMAGE, (1, LENGTH), key=mx.random.key(1))
    ids[:, BEFORE : BEFORE + PATCHES] = IMAGE
    return ids


def pixels() -> mx.array:
    return mx.random.normal((1, 3, 64, 64), key=mx.random.key(2))


def caches_for(model, policy: str, allocator: str, budget: int = BUDGET) -> list:
    given_gates(model, ("retention",), width=WIDTH)
    options = {"last": 8} if policy == "snapkv" else {}
    return kvp.make_cache(model, policy, budget, allocator=allocator, **SIZES, **options)


def held_by(cache) -> np.ndarray:
    """Which positions each query head sees ``(HEADS, LENGTH)``."""
    seen = np.zeros((KV_HEADS, LENGTH), bool)
    for head, row in enumerate(np.array(cache.held.positions())[0]):
        seen[head, row[row >= 0]] = True
    return seen.repeat(HEADS // KV_HEADS, axis=0)


def read(model, cache: list) -> tuple[mx.array, np.ndarray]:
    """Logits ``(LENGTH, VOCAB)`` of the prompt read token by token, and who saw whom ``(layers, HEADS, LENGTH, LENGTH)``."""
    embeds = model.get_input_embeddings(prompt(), pixels()).inputs_embeds
    logits, seen = [], []
    for t in range(LENGTH):
        out = model.language_model(prompt()[:, t : t + 1], inputs_embeds=embeds[:, t : t + 1], cache=cache)
        mx.eval(out.logits, [c.state for c in cache])
        logits.append(out.logits[0, 0])
        seen.append([held_by(c) for c in cache])
    return mx.stack(logits), np.array(seen).transpose(1, 2, 0, 3)


def with_masks(model, monkeypatch, masks: np.ndarray) -> mx.array:
    """Logits ``(LENGTH, VOCAB)`` of mlx-vlm's own decoder under masks ``(layers, HEADS, LENGTH, LENGTH)``."""
    embeds, layers = model.get_input_embeddings(prompt(), pixels()).inputs_embeds, iter(masks)
    attention = lambda q, k, v, cache, scale, mask: mx.fast.scaled_dot_product_attention(
        q, k, v, scale=scale, mask=mx.array(next(layers))[None]
    )
    with monkeypatch.context() as patch:
        patch.setattr(llava.language, "scaled_dot_product_attention", attention)
        return model.language_model(prompt(), inputs_embeds=embeds).logits[0]


def error(found: mx.array, wanted: mx.array) -> float:
    return (mx.abs(found - wanted).max() / mx.abs(wanted).max()).item()


@pytest.mark.parametrize(("policy", "allocator"), CASES)
def test_image_tokens_compete_within_the_cap(model, monkeypatch, policy: str, allocator: str):
    cache = caches_for(model, policy, allocator)
    logits, seen = read(model, cache)
    assert error(logits, with_masks(model, monkeypatch, seen)) < 1e-4
    assert error(logits, with_masks(model, monkeypatch, np.tril(np.ones_like(seen)))) > 1e-3, "eviction shows"
    assert (seen.sum(axis=(0, 1, 3)) <= 2 * HEADS * BUDGET).all()
    image = seen[:, :, -1, BEFORE : BEFORE + PATCHES]
    assert image.any() and not image.all(), "some image tokens stayed, some went"
    assert kvp.report(cache).slots_held <= BUDGET or allocator == "global"

    _, logprobs = next(generated(model, caches_for(model, policy, allocator)))
    assert error(logprobs, logits[-1] - mx.logsumexp(logits[-1])) < 1e-4, "read in chunks"


def generated(model, cache: list | None, **more):
    """mlx-vlm's own generation, in chunks of 50 tokens: yields tokens and log probabilities."""
    more = {"max_tokens": 4, "temperature": 0.0, "prefill_step_size": 50, **more}
    return generate_step(prompt(), model, pixels(), None, prompt_cache=cache, **more)


@pytest.mark.parametrize(("policy", "allocator"), CASES)
def test_with_room_generation_is_as_with_stock(model, policy: str, allocator: str):
    stock = list(generated(model, None))
    cache = caches_for(model, policy, allocator, budget=2 * LENGTH)
    for (token, logprobs), (expected, theirs) in zip(generated(model, cache), stock, strict=True):
        assert token == expected
        assert error(logprobs, theirs) < 1e-4


def test_attach_serves_generation_and_detach_restores(model):
    before = {name: vars(llava.language)[name] for name in ("scaled_dot_product_attention", "KVCache")}
    kvp.attach(model, "knorm", BUDGET, quiet=True, **SIZES)
    cache = make_prompt_cache(model.language_model)
    assert [type(c) for c in cache] == [kvp.PrunedKVCache] * 2
    ours = [token for token, _ in generated(model, None)]
    assert ours == [token for token, _ in generated(model, cache)]
    assert kvp.report(cache).slots_held <= BUDGET < cache[0].tokens_seen
    kvp.detach(model)
    assert [type(c) for c in make_prompt_cache(model.language_model)] == [KVCache] * 2
    assert {name: vars(llava.language)[name] for name in before} == before


def test_saved_and_loaded_caches_go_on_alike(model, tmp_path):
    cache = caches_for(model, "retention", "global")
    list(generated(model, cache, max_tokens=1))
    kvp.save_cache(tmp_path / "image", cache)
    twin, next_token = kvp.load_cache(tmp_path / "image", model), mx.array([[5]])
    outs = [model.language_model(next_token, cache=c).logits for c in (cache, twin)]
    assert mx.array_equal(*outs)
    with pytest.raises(ValueError, match=r"\[save\] mlx-vlm's own"):
        kvp.save_cache(tmp_path / "mixed", [*cache, RotatingKVCache(8)])


def test_what_mlx_vlm_would_ignore_is_refused(model):
    kvp.attach(model, "knorm", BUDGET, quiet=True, **SIZES)
    for wrong in ({"max_kv_size": 64}, {"kv_bits": 4}):
        with pytest.raises(ValueError, match="a bounded cache"):
            next(generated(model, None, **wrong))
    drafts = importlib.import_module("mlx_vlm.generate.ar").run_speculative_rounds
    with pytest.raises(ValueError, match="speculative"):
        drafts(model, None, model.language_model.make_cache())
    for name in ("mask", "position_ids"):
        with pytest.raises(ValueError, match=rf"\[vlm\].*got {name}"):
            model.language_model(prompt(), cache=model.language_model.make_cache(), **{name: mx.ones((1, LENGTH))})
    cache = kvp.make_cache(model, "knorm", BUDGET, allocator="global", **SIZES)
    with pytest.raises(ValueError, match=r"\[vlm\].*got per_layer_inputs.*allocator uniform"):
        model.language_model(prompt(), cache=cache, per_layer_inputs=mx.ones((1, LENGTH, 2)))
    for policy in ("surprise", "probe"):
        with pytest.raises(ValueError, match=r"\[policy\].*mlx-vlm"):
            kvp.make_cache(model, policy, BUDGET, question=(1, 2), **SIZES)


def test_masks_that_show_later_tokens_are_refused():
    causal = mx.tril(mx.ones((1, 1, 4, 4), mx.bool_))
    whole = causal | (mx.arange(4) < 2)
    for mask in (None, "causal", causal, whole[..., 3:, :], mx.where(causal, 0.0, -mx.inf)):
        check_mask(mask)
    for mask in (whole, mx.where(whole, 0.0, -1e9)):
        with pytest.raises(ValueError, match=r"\[vlm\].*later ones"):
            check_mask(mask)


def test_positions_in_rows_and_columns_are_refused():
    text = decoder_config(
        qwen2_vl, "qwen2_vl", rms_norm_eps=1e-5, rope_scaling={"type": "mrope", "mrope_section": [2, 3, 3]}
    )
    decoder = qwen2_vl.LanguageModel(text, None)
    with pytest.raises(ValueError, match=r"\[attach\] qwen2_vl cannot be bounded.*M-RoPE"):
        kvp.attach(decoder)
