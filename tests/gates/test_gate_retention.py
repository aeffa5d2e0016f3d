"""What gated policies keep, against brute force; and the full cache's logits where there is room for everything."""

from __future__ import annotations

import numpy as np
import pytest
from gate_helpers import BLOCK, FORM, GATED, Simulated, caches_for, gated_model, given_gates, kept, raw_of, read, text
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

import mlx_kvprune as kvp

ROOM = 0.7, -1.0  # thresholds that part of the tokens pass, for sigmoids and for logarithms
THRESHOLDS = {"spkv": 0.52, "kvzap": 0.0, "fastkvzip": -1.5, "dms": 0.0}


def log_sigmoid(x: np.ndarray) -> np.ndarray:
    return -np.logaddexp(0.0, -x)


SCORES = {
    "retention": lambda raw, at, now: (now + 1 - at) * log_sigmoid(raw),
    "spkv": lambda raw, at, now: 1 / (1 + np.exp(-raw)),
    "kvzap": lambda raw, at, now: raw,
    "fastkvzip": lambda raw, at, now: raw,
    "dms": lambda raw, at, now: -raw,
}


def simulated(heard: list, policy: str, slots: int | None, allocator: str, n: int, **more) -> Simulated:
    """By the same numbers of the gates; near ties would make it a test of rounding."""
    raw = [np.concatenate(parts, axis=1).astype(np.float64) for parts in heard]
    simulation = Simulated(raw, SCORES[policy], slots, allocator, **more)
    simulation.read(n)
    return simulation


@pytest.mark.parametrize("allocator", ["uniform", "head_adaptive", "global"])
@pytest.mark.parametrize("length", [119, 500])
def test_retention_keeps_the_best_by_definition(model, allocator, length):
    """The largest ``(t + 1 - i) log sigmoid(raw_i)`` of pool and leaving tokens, anew at every upkeep."""
    caches = caches_for(model, "retention", 180, allocator=allocator)
    heard = raw_of(caches)
    for at in range(0, length, 50):
        read(model, caches, text(length)[:, at : at + 50])
        seen = min(length, at + 50)
        simulation = simulated(heard, "retention", 180, allocator, seen)
        assert simulation.smallest_gap > 1e-5, "a near tie: choose another seed"
        assert kept(caches) == simulation.kept()
    assert caches[0].evicted == (length == 500)


@hypothesis_settings(deadline=None, max_examples=12)
@given(st.integers(0, 999), st.sampled_from(["uniform", "head_adaptive", "global"]), st.sampled_from(GATED))
def test_any_text_and_gated_policy(seed, allocator, policy):
    """Without thresholds: the budget alone decides, by what the method's number means."""
    made = gated_model("llama")
    given_gates(made, [policy], seed=seed)
    free = {} if policy == "retention" else {"threshold": None}
    caches = caches_for(made, policy, 150, allocator=allocator, **free)
    heard = raw_of(caches)
    read(made, caches, text(330, seed), 100)
    simulation = simulated(heard, policy, 150, allocator, 330)
    if simulation.smallest_gap > 1e-5:
        assert kept(caches) == simulation.kept()
    assert max(c.held.held() for c in caches) <= 2 * 150 or allocator == "global"


@pytest.mark.parametrize("policy", GATED)
def test_with_room_for_everything_logits_are_the_full_caches(model, policy):
    free = {} if policy == "retention" else {"threshold": None}
    expected = read(model, kvp.make_cache(model, "full", None), text(200))
    for more in ({"budget": 600}, {"budget": None}, {"budget": 600, "positions": "cache"}):
        for step in (200, 33):
            got = read(model, caches_for(model, policy, **more, **free), text(200), step)
            np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)


# -- thresholds ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("allocator", ["head_adaptive", "global"])
@pytest.mark.parametrize("budget", [None, 400, 180])
@pytest.mark.parametrize("policy", THRESHOLDS)
def test_what_fails_the_threshold_is_never_held(model, policy, budget, allocator):
    """By definition; at 400 there is room for all that pass, at 180 the larger of them win."""
    caches = caches_for(model, policy, budget, allocator=allocator, threshold=THRESHOLDS[policy])
    heard = raw_of(caches)
    for at in (0, 47, 48, 49, 200, 380):
        stop = {0: 47, 47: 48, 48: 49, 49: 200, 200: 380, 380: 430}[at]
        read(model, caches, text(430)[:, at:stop])
        simulation = simulated(heard, policy, budget, allocator, stop, least=THRESHOLDS[policy])
        assert simulation.smallest_gap > 1e-6, "a near tie: choose another seed"
        assert kept(caches) == simulation.kept()
        if budget is not None:
            assert sum(c.held.held() for c in caches) <= 2 * 2 * budget
    sizes = [len(head) for layer in kept(caches) for head in layer]
    assert budget == 180 or len(set(sizes)) > 1
    if budget is None:
        assert 100 < max(sizes) < 430


def test_sizes_follow_the_text(model):
    """A text of one token that passes or does not, and others: what is held differs, the bytes too."""
    sizes = []
    for seed in range(4):
        caches = caches_for(model, "spkv", None)
        read(model, caches, text(300, seed))
        sizes.append((sum(c.held.held() for c in caches), sum(c.nbytes for c in caches)))
    assert len({held for held, _ in sizes}) > 2
    assert len({nbytes for _, nbytes in sizes}) > 1


@pytest.mark.parametrize("more", [{}, {"positions": "cache"}, {"kv_bits": 4, "kv_group_size": 32}], ids=str)
@pytest.mark.parametrize("allocator", ["head_adaptive", "global"])
def test_heads_may_hold_nothing_beside_the_ring(more, allocator):
    """A threshold that nothing passes, then one that a single head's tokens pass: what is held attends as it should."""
    model = gated_model("llama")
    for start, some in ((-50.0, False), (0.0, True)):
        given_gates(model, ["kvzap"], start=start)
        caches = caches_for(model, "kvzap", 300, allocator=allocator, threshold=0.8 if some else 0.0, **more)
        outs = [read(model, caches, text(400)[:, a:b]) for a, b in ((0, 90), (90, 91), (91, 300), (300, 399))]
        counts = np.array([c.held.last.live_counts() for c in caches])
        assert counts.any() == some
        assert all(np.isfinite(out).all() for out in outs)
        twins = [type(c).from_state(c.state) for c in caches]
        np.testing.assert_array_equal(read(model, twins, text(400)[:, 399:]), read(model, caches, text(400)[:, 399:]))
        for cache in caches:
            cache.drop(10, 370, close=not more.get("kv_bits"))
        assert np.isfinite(read(model, caches, text(60))).all()
    kvp.detach(model)


def test_what_was_dropped_cannot_be_taken_back(model):
    """Tokens since the last exchange can, and reading them again gives what was there; nothing can beyond it."""
    caches = caches_for(model, "spkv", None)
    read(model, caches, text(48))
    assert all(c.is_trimmable() and c.can_rewind(48) for c in caches)
    read(model, caches, text(300)[:, 48:])
    assert caches[0].evicted
    since = caches[0].held.written - caches[0].held.final
    assert 0 < since <= BLOCK
    for cache in caches:
        assert cache.can_rewind(since)
        assert not cache.can_rewind(since + 1)
        assert not cache.is_trimmable()
        with pytest.raises(ValueError, match=r"\[trim\] the newest tokens cannot be taken back"):
            cache.trim(since + 1)
    before = kept(caches)
    for cache in caches:
        cache.trim(since)
    read(model, caches, text(300)[:, 300 - since :])
    assert kept(caches) == before


def test_while_everything_passed_everything_can_be_taken_back(model):
    """And read again, it gives the full cache's logits."""
    given_gates(model, ["spkv"], start=60.0)
    caches = caches_for(model, "spkv", 600)
    read(model, caches, text(250), 90)
    assert not any(c.evicted for c in caches)
    for n in (3, 120, 127):
        for cache in caches:
            assert cache.trim(n) == n
    assert all(c.empty() or c.size() == 0 for c in caches)
    got = read(model, caches, text(200), 60)
    np.testing.assert_allclose(got, read(model, kvp.make_cache(model, "full", None), text(200)), rtol=1e-4, atol=1e-4)
    given_gates(model, ["spkv"])


def test_floors_of_turns_are_stronger_than_the_threshold():
    """Nothing would pass; what is in the ring when a turn ends is kept, the best of it, as many as the floor says."""
    model = gated_model("llama")
    given_gates(model, ["kvzap"])
    caches = caches_for(model, "kvzap", 180, threshold=50.0, turn_floor=0.25)
    heard = raw_of(caches)
    read(model, caches, text(47))
    for cache in caches:
        cache.end_turn()
    read(model, caches, text(300)[:, 47:])
    floor = int(0.25 * (180 - 48 - 4))
    for layer, parts in enumerate(heard):
        raw = np.concatenate(parts, axis=1)
        for head in range(2):
            alive: list[int] = []
            for first in (4, 36):  # blocks that leave the ring; the second reaches beyond the turn
                alive = [p for p in (*alive, *range(first, first + BLOCK)) if p < 47]
                alive = sorted(sorted(alive, key=lambda p: raw[head][p])[-floor:])
            assert [p for p in kept(caches)[layer][head] if 4 <= p < 200] == alive
    kvp.detach(model)


@pytest.mark.parametrize(
    ("more", "got"),
    [
        (
            {"allocator": "uniform"},
            "got allocator uniform; try --allocator head_adaptive or global, or --policy-option",
        ),
        ({"allocator": "pyramid"}, "got allocator pyramid; try"),
        ({"kv_fine_tokens": 32, "kv_bits": 4}, "got 32 fine tokens; try --kv-fine-tokens 0, or"),
        ({"kv_scheme": "page", "kv_bits": 4}, "got pages that are quantized whole; try another --kv-scheme, or"),
    ],
    ids=str,
)
def test_impossible_combinations_are_named(model, more, got):
    with pytest.raises(ValueError, match=r"^\[threshold\] policy 'spkv' drops tokens below 0.5, .*" + got):
        kvp.make_cache(model, "spkv", 400, **more)
    kvp.make_cache(model, "spkv", 700, threshold=None, kv_group_size=32, **more)


def test_a_model_whose_heads_cannot_differ():
    """gemma2 does its own attention; without a threshold the policy is there, shared out uniformly."""
    model = gated_model("gemma2")
    given_gates(model, ["spkv", "retention"])
    with pytest.raises(
        ValueError, match=r"^\[threshold\] policy 'spkv' .*which this model cannot take; .*threshold=null"
    ):
        kvp.make_cache(model, "spkv", 400)
    for policy, more in (("spkv", {"threshold": None}), ("retention", {})):
        caches = caches_for(model, policy, 150, allocator="uniform", **more)
        heard = raw_of(caches)
        read(model, caches, text(300), 77)
        assert kept(caches) == simulated(heard, policy, 150, "uniform", 300).kept()
    kvp.detach(model)


@pytest.mark.parametrize("wrong", ["high", float("nan"), True, 1.5], ids=str)
def test_thresholds_that_make_no_sense(model, wrong):
    with pytest.raises(ValueError, match=r"\[policy-option\] threshold makes no sense"):
        kvp.make_cache(model, "spkv", 400, threshold=wrong)


def test_forms_are_known():
    assert set(FORM) == set(GATED)
