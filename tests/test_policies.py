"""Policies x budgets x prefill steps through whole models: one result, one cap, and stock's logits where all fits."""

from __future__ import annotations

from functools import cache

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import reference
import tiny_models as zoo
from mlx_lm.generate import generate_step
from tiny_gates import LIKE_OTHERS, given_gates

import mlx_kvprune as kvp
from mlx_kvprune.attach import settings_from
from mlx_kvprune.forward import pruned
from mlx_kvprune.policy import POLICIES

MODELS = ("llama", "gemma3_text")
LENGTH, SHORT, DECODED, WORDS = 700, 230, 40, 1024
ROOMY, BYTES = 2000, "220KB"
STEPS = {"smallest": (7, 64, 500), 150: (64, 500), 300: (500,), BYTES: (7, 500)}  # against 2,048, all in one call
QUESTION = {"question": (3, 77, 12, 9, 100)}
LIKE_RETENTION = {"retention_probe": {**LIKE_OTHERS["retention"], **QUESTION}}
SETTINGS = {"probe": QUESTION, **LIKE_OTHERS, **LIKE_RETENTION}  # as they are made for: tests/gates
BOUNDED = tuple(name for name in POLICIES if name != "full")


@cache
def model_of(name: str) -> nn.Module:
    return zoo.tiny_model(name, vocab_size=WORDS)


@pytest.fixture(autouse=True)
def _with_gates():
    """Random gates, for the policies that ask some; a model loses them when it is detached."""
    for name in MODELS:
        given_gates(model_of(name))


def text(length: int = LENGTH) -> mx.array:
    """Random token ids ``(1, length)``, none twice: gates of the first layer would tell equal ones apart by rounding."""
    return mx.random.permutation(WORDS, key=mx.random.key(9)).astype(mx.int32)[None, :length]


@pytest.fixture(autouse=True)
def _detached():
    yield
    for name in MODELS:
        kvp.detach(model_of(name))


def caches_for(model: nn.Module, policy: str, budget: int | str) -> list:
    extra = SETTINGS.get(policy, {})
    if budget == "smallest":
        budget = settings_from(policy=policy, budget=1, **extra).smallest_budget
    return kvp.make_cache(model, policy, budget, **extra)


def check_cap(caches: list, budget: int | str, seen: int) -> None:
    """What the user named is never exceeded, and what the cache says of itself is what it holds."""
    told = kvp.report(caches)
    assert told.tokens_seen == seen
    assert told.kv_bytes == sum(c.nbytes for c in pruned(caches))
    assert told.kv_bytes <= told.kv_bytes_peak
    if budget == BYTES:
        assert told.kv_bytes_peak <= 220_000
    elif budget == "smallest":
        assert told.slots_held <= pruned(caches)[0].settings.smallest_budget
    else:
        assert told.slots_held <= budget


def read(model: nn.Module, caches: list, tokens: mx.array, step: int, budget: int | str) -> np.ndarray:
    """Logits of the last tokens ``(<= 8, vocab)``; the cap is looked at after every call."""
    parts = []
    for start in range(0, tokens.shape[1], step):
        parts.append(model(tokens[:, start : start + step], cache=caches)[0, -8:])
        check_cap(caches, budget, min(tokens.shape[1], start + step))
    return np.array(mx.concatenate(parts)[-8:])


def close(logits: np.ndarray, expected: np.ndarray, tolerance: float = 1e-4) -> None:
    rows = min(len(logits), len(expected))
    error = np.abs(logits[-rows:] - expected[-rows:]).max() / np.abs(expected).max()
    assert error < tolerance, f"relative error {error:.1e}"


def same_kept(caches: list, others: list) -> None:
    for one, other in zip(pruned(caches), pruned(others), strict=True):
        np.testing.assert_array_equal(reference.kept_positions(one), reference.kept_positions(other))


@pytest.mark.parametrize("budget", STEPS)
@pytest.mark.parametrize("policy", BOUNDED)
@pytest.mark.parametrize("name", MODELS)
def test_the_prefill_step_does_not_matter(name, policy, budget):
    model = model_of(name)
    whole = caches_for(model, policy, budget)
    expected = read(model, whole, text(), 2048, budget)
    assert all(c.evicted for c in pruned(whole))
    for step in STEPS[budget]:
        caches = caches_for(model, policy, budget)
        close(read(model, caches, text(), step, budget), expected)
        same_kept(caches, whole)


@pytest.mark.parametrize("policy", BOUNDED)
@pytest.mark.parametrize("name", MODELS)
def test_one_token_at_a_time_does_not_matter(name, policy):
    model, tokens = model_of(name), text(SHORT)
    whole, single = (caches_for(model, policy, "smallest") for _ in range(2))
    expected = read(model, whole, tokens, 2048, "smallest")
    assert all(c.evicted for c in pruned(whole))
    close(read(model, single, tokens, 1, "smallest"), expected)
    same_kept(single, whole)


@pytest.mark.parametrize("budget", ["smallest", BYTES])
@pytest.mark.parametrize("policy", BOUNDED)
@pytest.mark.parametrize("name", MODELS)
def test_decoding_through_mlx_lm(name, policy, budget):
    """40 tokens from the real ``generate_step``: the cap holds, and the logits are those of reading the same tokens."""
    model, prompt = model_of(name), text(SHORT)
    caches, tokens = caches_for(model, policy, budget), []
    for token, logprobs in generate_step(prompt[0], model, max_tokens=DECODED, prompt_cache=caches):
        tokens.append(int(token))
        last = np.array(logprobs)
        check_cap(caches, budget, kvp.report(caches).tokens_seen)
    assert len(tokens) == DECODED
    again = caches_for(model, policy, budget)
    logits = read(model, again, mx.concatenate([prompt, mx.array([tokens[:-1]])], axis=1), 100, budget)[-1]
    close(last[None], (logits - np.log(np.exp(logits.astype(np.float64)).sum()))[None])


@pytest.mark.parametrize("step", [64, 2048])
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", MODELS)
def test_with_room_for_everything_the_logits_are_stocks(name, policy, step):
    model, expected = model_of(name), stock_logits(name)
    given_gates(model)  # they were lost if stock's had to be made
    caches = caches_for(model, policy, ROOMY)
    parts = [model(text()[:, i : i + step], cache=caches) for i in range(0, LENGTH, step)]
    close(np.array(mx.concatenate(parts, axis=1))[0], expected, 1e-5)
    assert kvp.report(caches).slots_held == LENGTH


@cache
def stock_logits(name: str) -> np.ndarray:
    """What mlx-lm gives without us, in one pass ``(LENGTH, vocab)``."""
    model = model_of(name)
    kvp.detach(model)
    return np.array(model(text(), cache=model.make_cache() if hasattr(model, "make_cache") else None))[0]


def test_full_is_mlx_lms_own_cache():
    model = model_of("llama")
    caches = kvp.make_cache(model, "full", "1MB")
    assert {type(c).__name__ for c in caches} == {"KVCache"}
    model(text(), cache=caches)
    assert kvp.report(caches).slots_held == LENGTH


@pytest.mark.parametrize("policy", BOUNDED)
def test_policies_differ(policy):
    """Each keeps something else than the others: none is another one under a second name."""
    model, kept = model_of("llama"), {}
    for name in {policy, *BOUNDED[:6]}:
        caches = caches_for(model, name, 150)
        model(text(400), cache=caches)
        kept[name] = reference.kept_positions(caches[1])
    for name in set(kept) - {policy}:
        assert not np.array_equal(kept[name], kept[policy]), name


@pytest.mark.parametrize(
    ("policy", "option", "value"),
    [
        ("snapkv", "last", 0),
        ("snapkv", "kernel", 4),
        ("snapkv", "pooling", "sum"),
        ("rkv", "last", -5),
        ("rkv", "mix", 2),
        ("expected_attention", "future", 0),
        ("surprise", "forget", 2),
        ("probe", "span", 0),
        ("probe", "share", "layer"),
    ],
)
def test_options_that_make_no_sense_are_refused(policy, option, value):
    with pytest.raises(ValueError, match=rf"\[policy-option\] {option} makes no sense; got .*; try"):
        settings_from(policy=policy, budget=300, question=(1,), **{option: value})


def test_a_rotation_by_length_is_not_turned_back():
    """Dynamic NTK has another base beyond what the model was made for: queries would be turned back wrongly, in silence."""
    model = zoo.tiny_model("llama", rope_scaling={"rope_type": "dynamic", "factor": 2.0})
    with pytest.raises(
        ValueError, match=r"expected_attention turns queries back.* got DynamicNTKScalingRoPE; try snapkv"
    ):
        kvp.attach(model, "expected_attention", 200, quiet=True)
    for scaling in (
        {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 64},
        {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 64},
    ):
        model = zoo.tiny_model("llama", rope_scaling=scaling)
        kvp.attach(model, "expected_attention", 200, quiet=True)
        kvp.detach(model)
