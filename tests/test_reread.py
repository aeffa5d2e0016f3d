"""What a cache kept, read again: which tokens that is, and that the answer is a full cache's to those tokens alone."""

import copy
import gc
import weakref

import mlx.core as mx
import numpy as np
import pytest
import tiny_models as zoo
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

import mlx_kvprune as kvp
from mlx_kvprune import reread
from mlx_kvprune.attach import settings_from
from mlx_kvprune.documents import read_into_cache
from mlx_kvprune.forward import listen, pruned
from mlx_kvprune.reread import LEAST, Reread, best_that_fit, places, read_again, strung

WORDS = 97
DOCUMENT, QUESTION = " ".join(f"{i * i % 89}" for i in range(260)), "3 5 8"
KEPT = {"n_sink": 4, "window": 16, "block": 16}


class Numbers:
    """A tokenizer of one token per word, words being numbers, and others told apart by their letters."""

    def encode(self, text, add_special_tokens=True):
        gap = [WORDS - 1] if text == "\n" else []
        return gap or [int(w) if w.isdigit() else sum(map(ord, w)) % WORDS for w in text.split()]


@pytest.fixture(scope="module", name="model")
def _model():
    made = zoo.tiny_model("llama", vocab_size=WORDS)
    kvp.attach(made, "window", None, quiet=True)
    yield made
    kvp.detach(made)


def reading_of(model, policy: str, budget=120, **more):
    wanted = settings_from(policy=policy, budget=budget, **{**KEPT, **more})
    return read_into_cache(model, Numbers(), DOCUMENT, QUESTION, wanted, pinned=False, max_tokens=8)


def after(model, cache: list, tokens: list[int]) -> np.ndarray:
    logits = model(mx.array([tokens]), cache=cache)
    return np.array(logits[0].astype(mx.float32))


@pytest.mark.parametrize(
    ("policy", "more"),
    [
        ("probe", {}),
        ("probe", {"budget": 111}),
        ("probe", {"budget": 119, "block": 32}),
        ("probe", {"budget": 70}),
        ("probe", {"positions": "cache"}),
        ("knorm", {"kv_bits": 8, "kv_group_size": 32, "kv_fine_tokens": 32, "kv_fine_bits": None, "budget": 200}),
        ("window", {}),
        ("snapkv", {"allocator": "head_adaptive", "budget": 200}),
        ("tova", {"allocator": "global", "budget": 200}),
        ("h2o", {}),
        ("knorm", {"kv_bits": 8, "kv_group_size": 32, "budget": 200}),
    ],
)
def test_the_answer_is_a_full_caches_to_what_was_read_again(model, policy, more):
    reading = reading_of(model, policy, **more)
    tokens = reading.prompt.before + reading.prompt.document
    again = read_again(model, Numbers(), reading, max_tokens=8)
    assert isinstance(again, Reread)
    kept, whole = again.positions, again.prompt.before + again.prompt.document
    assert kept == sorted(set(kept))
    assert kept[0] >= len(again.prompt.before)
    assert [t for t in again.prompt.document if t != WORDS - 1] == [tokens[i] for i in kept if tokens[i] != WORDS - 1]
    got = after(model, copy.deepcopy(again.cache), again.prompt.after)
    expected = after(model, kvp.make_cache(model, "full", None), whole + again.prompt.after)[len(whole) :]
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=0.05 if "kv_bits" in more else 1e-4)
    assert not any(c.evicted for c in pruned(again.cache)), "it fits beside the question"


@pytest.mark.parametrize("policy", ["snapkv", "rkv"])
def test_the_end_of_the_document_is_read_again(model, policy):
    """Tokens whose own queries decide have no score of their own; they are the last that would be evicted."""
    reading = reading_of(model, policy)
    last = len(reading.prompt.before) + len(reading.prompt.document)
    again = read_again(model, Numbers(), reading, max_tokens=8)
    assert isinstance(again, Reread)
    assert set(range(last - 8, last)) <= set(again.positions)


@pytest.mark.parametrize("more", [{"allocator": "pyramid", "budget": 160}, {"local_layers": "0"}])
def test_layers_that_hold_less_evict_as_ever(model, more):
    again = read_again(model, Numbers(), reading_of(model, "knorm", **more), max_tokens=8)
    assert isinstance(again, Reread)
    after(model, again.cache, again.prompt.after)
    assert {c.evicted for c in pruned(again.cache)} == {False, True}


@pytest.mark.parametrize("bits", [8, 4])
def test_few_bits_and_what_is_reported(model, bits):
    reading = reading_of(model, "probe", kv_bits=bits, kv_group_size=32)
    first, tokens = kvp.report(reading.cache), reading.prompt.before + reading.prompt.document
    again = read_again(model, Numbers(), reading)
    assert isinstance(again, Reread)
    assert reading.cache == [], "one cache lives at a time"
    after(model, again.cache, again.prompt.after)
    found = again.report(again.cache)
    assert found.tokens_seen == len(tokens) + len(again.prompt.after)
    assert found.kv_bytes_peak == max(first.kv_bytes_peak, kvp.report(again.cache).kv_bytes_peak)
    assert found.kv_bytes_full == first.kv_bytes_full // len(tokens) * found.tokens_seen
    assert found.slots_held <= 120


@pytest.mark.parametrize("policy", ["probe", "snapkv"])
def test_one_cache_lives_at_a_time(model, policy, monkeypatch):
    """Without the garbage collector: nothing that a question heard may hold the first cache."""
    reading, made = reading_of(model, policy), reread.make_from_settings
    first = [weakref.ref(c) for c in pruned(reading.cache)]
    monkeypatch.setattr(
        reread, "make_from_settings", lambda *given: made(*given) if not alive(first) else pytest.fail("two")
    )
    gc.disable()
    try:
        assert isinstance(read_again(model, Numbers(), reading), Reread)
    finally:
        gc.enable()


def alive(some: list) -> int:
    return sum(x() is not None for x in some)


def test_what_holds_everything_is_left_as_it_is(model):
    for policy, budget in (("probe", 600), ("full", None), ("window", None)):
        reading = reading_of(model, policy, budget)
        assert read_again(model, Numbers(), reading) is reading
        assert reading.cache


def test_too_little_room_is_left_as_it_is(model):
    reading = reading_of(model, "window", 64)
    reading.prompt.after.extend(range(40))
    assert read_again(model, Numbers(), reading) is reading
    assert pruned(reading.cache)[0].size() > LEAST


def test_listening_changes_nothing_that_is_held(model):
    reading = reading_of(model, "probe")
    before = [np.array(c.held.positions()) for c in pruned(reading.cache)]
    twin = copy.deepcopy(reading.cache)
    listen(model, reading.cache)
    for cache, positions in zip(pruned(reading.cache), before, strict=True):
        np.testing.assert_array_equal(np.array(cache.held.positions()), positions)
    np.testing.assert_array_equal(after(model, reading.cache, [1, 2, 3]), after(model, twin, [1, 2, 3]))


def test_the_newest_tokens_are_heard_too(model):
    cache = reading_of(model, "probe").cache
    listen(model, cache)
    heard = places(cache)
    written, window = len(heard), KEPT["window"]
    assert heard[written - window :].min() > 0
    assert len(np.unique(heard[written - window :])) > 1, "the window's tokens have places of their own"


def test_places_by_brute_force(model):
    cache = reading_of(model, "knorm").cache
    expected = np.zeros(pruned(cache)[0].held.written)
    heads = 0
    for one in pruned(cache):
        scores, positions = np.array(one.scorer.score(one.everything(), one.signals)), np.array(one.held.positions())
        for score, at in zip(scores[0], positions[0], strict=True):
            held = [(s, p) for s, p in zip(score, at, strict=True) if p >= 0]
            for s, p in held:
                expected[p] += sum((x, y) <= (s, p) for x, y in held) / len(held)
            heads += 1
    np.testing.assert_allclose(places(cache), expected / heads, rtol=1e-12)


@hypothesis_settings(deadline=None)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=60), st.integers(0, 8), st.integers(-3, 70), st.integers(0, 3))
def test_the_best_that_fit_are_best_that_fit(merit, start, room, gap):
    found = best_that_fit(np.array(merit, float), start, room, gap)
    assert found == sorted(set(found))
    assert all(i >= start and merit[i] > 0 for i in found)
    assert len(strung(found, found, [-1] * gap)) <= max(room, 0)
    left = [merit[i] for i in range(start, len(merit)) if i not in found]
    assert not found or not left or min(merit[i] for i in found) >= max(left)
    possible = sum(m > 0 for m in merit[start:])
    assert gap or len(found) == max(0, min(room, possible)), "without gaps every place is used"


def test_a_gap_stands_where_something_is_left_out():
    assert strung([5, 6, 7, 8], [1, 2, 9, 10], [0, 0]) == [5, 6, 0, 0, 7, 8]
    assert strung([], [], [0]) == []
