"""The formulas of training, each against its definition."""

from __future__ import annotations

import math

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_kvprune.settings import PAGE
from mlx_kvprune.training import objective
from mlx_kvprune.training.objective import Bounds, budget_biases, decay_biases, divergence, held_by_decay, thresholds
from mlx_kvprune.training.objectives import Level, dms, spkv
from mlx_kvprune.training.objectives.retention import level
from mlx_kvprune.training.reading import most_likely
from mlx_kvprune.training.recipe import Example, Recipe
from mlx_kvprune.training.utility import exposure

START, LENGTH = 128, 64
BOUNDS = Bounds(60, window=12, block=16, n_sink=4)


def drawn(seed: int, heads: tuple[int, ...] = (3, 2), slots: int = START + LENGTH) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.normal(0, 2, (h, slots)).astype(np.float32) for h in heads]


def log_sigmoid(x):
    return -np.logaddexp(0, -x.astype(np.float64))


def brute_levels(scores: np.ndarray, bounds: Bounds) -> np.ndarray:
    """Which of ``(heads, n)`` stay: floors first, then the best of what is left, one by one."""
    heads, n = scores.shape
    stay = np.zeros((heads, n), bool)
    floor = min(bounds.pool, PAGE * math.ceil(bounds.head_floor * bounds.pool / PAGE))
    floor = bounds.pool if bounds.scope == "head" else floor
    for h in range(heads):
        stay[h, np.argsort(-scores[h])[:floor]] = True
    for flat in np.argsort(-scores, axis=None):
        if stay.sum() < heads * bounds.pool:
            stay[np.unravel_index(flat, scores.shape)] = True
    return stay


@pytest.mark.parametrize("scope", ["global", "layer", "head"])
@pytest.mark.parametrize("ageing", [True, False])
@pytest.mark.parametrize("seed", range(3))
def test_hard_budget_is_brute_force_top_k(scope, ageing, seed):
    scores = drawn(seed)
    bounds = Bounds(60, window=12, block=16, n_sink=4, scope=scope, ageing=ageing, head_floor=0.3)
    biases = budget_biases([mx.array(x) for x in scores], START, LENGTH, bounds, 0.0)
    now = START + LENGTH // 2  # one block of queries shares a threshold, taken at its middle
    of = np.arange(bounds.n_sink, now - bounds.window)
    older = np.log(now - of) if ageing else 0.0
    groups = [np.concatenate(scores)] if scope == "global" else scores
    expected = np.concatenate([brute_levels(some[:, of] - older, bounds) for some in groups])
    held = np.concatenate([np.array(b.full()) for b in biases])[
        :, now - START
    ]  # (heads, slots), of the query in the middle
    assert (held[:, of] == 0).tolist() == expected.tolist()
    assert (held[:, of] == 0).sum() == len(held) * bounds.pool
    assert (held[:, :4] == 0).all() and (held[:, now - 11 : now + 1] == 0).all()
    assert np.isneginf(held[:, now + 1 :]).all()


def test_cold_budget_is_the_hard_one():
    scores = [mx.array(x) for x in drawn(5)]
    hard, cold = (budget_biases(scores, START, LENGTH, BOUNDS, heat) for heat in (0.0, 1e-5))
    for a, b in zip(hard, cold, strict=True):
        assert ((np.array(a.full()) > -0.5) == (np.array(b.full()) > -0.71)).all()  # the last that stays has log(1/2)


def test_everything_is_held_while_there_is_room():
    biases = budget_biases([mx.array(x[:, :32]) for x in drawn(1)], 0, 32, BOUNDS, 0.3)
    causal = np.where(np.tril(np.ones((32, 32))) > 0, 0.0, -np.inf)
    assert all((np.array(b.full()) == causal).all() for b in biases)


def test_every_head_keeps_its_floor():
    scores = drawn(2)
    scores[0][0] -= 100  # would hold nothing
    taus = thresholds([mx.array(x) for x in scores], START, LENGTH, Bounds(96, 12, 16, head_floor=0.3))
    now = START + LENGTH // 2
    of = np.arange(4, now - 12)
    assert (scores[0][0, of] - np.log(now - of) >= taus[0, 0] - 1e-4).sum() == PAGE


def test_decay_is_the_papers_formula_outside_the_ring():
    raws = drawn(3)
    for raw, bias in zip(raws, decay_biases([mx.array(x) for x in raws], START, LENGTH, BOUNDS), strict=True):
        t = np.arange(START, START + LENGTH)[:, None]
        i = np.arange(START + LENGTH)[None]
        expected = np.where((i < 4) | (t - i < 12 + 8), 0.0, (t - i) * log_sigmoid(raw)[:, None])
        expected = np.where(i > t, -np.inf, expected)
        np.testing.assert_allclose(np.array(bias.full()), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scope", ["global", "head"])
def test_capacity_is_the_papers_formula_with_a_whole_ring(scope):
    raws = [x + 6 for x in drawn(4)]  # they hold more than the budget
    bounds = Bounds(40, scope=scope)
    found = held_by_decay([mx.array(x) for x in raws], START, LENGTH, bounds).item()
    t = START + LENGTH - 1  # times are a block apart
    beta = np.exp(log_sigmoid(np.concatenate(raws)))
    age = t - np.arange(START + LENGTH)
    sums = np.where((age < 16 + 64) | (np.arange(START + LENGTH) < 4), 1.0, beta**age).sum(axis=1)
    sums = np.array([sums.mean()]) if scope == "global" else sums
    assert found == pytest.approx(np.maximum(sums - 40, 0).mean() / (t - 40), rel=1e-4)
    assert found > 0.01


def exact(p: np.ndarray, q: np.ndarray) -> float:
    logp = p - np.log(np.exp(p).sum(axis=1, keepdims=True))
    logq = q - np.log(np.exp(q).sum(axis=1, keepdims=True))
    return float((np.exp(logp) * (logp - logq)).sum(axis=1).mean())


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.floats(0.1, 4.0), st.integers(65, 200))
def test_divergence_is_a_lower_bound_of_the_exact_one(seed, scale, vocab):
    rng = np.random.default_rng(seed)
    p, q = rng.normal(0, scale, (2, 5, vocab))
    found = divergence(mx.array(q, mx.float32), *most_likely(mx.array(p, mx.float32))).item()
    assert -1e-4 <= found <= exact(p, q) + 1e-4
    own = divergence(mx.array(p, mx.float32), *most_likely(mx.array(p, mx.float32))).item()
    assert own == pytest.approx(0, abs=1e-4)


def test_divergence_is_exact_where_all_tokens_count():
    rng = np.random.default_rng(0)
    p, q = rng.normal(0, 2, (2, 7, 64))
    found = divergence(mx.array(q, mx.float32), *most_likely(mx.array(p, mx.float32))).item()
    assert found == pytest.approx(exact(p, q), abs=1e-4)


def test_losses_in_pieces_are_those_of_the_whole(monkeypatch):
    rng = np.random.default_rng(1)
    p, q = (mx.array(x, mx.float32) for x in rng.normal(0, 2, (2, 9, 100)))
    targets = mx.array(rng.integers(0, 100, 9))
    top, ids = most_likely(p)
    whole = divergence(q, top, ids).item(), objective.surprisal(q, targets).item()
    monkeypatch.setattr("mlx_kvprune.training.reading.PIECE", 250)  # two rows
    pieced = divergence(q, top, ids).item(), objective.surprisal(q, targets).item()
    assert pieced == pytest.approx(whole, rel=1e-5)
    assert sorted(np.array(most_likely(p)[1])[3].tolist()) == sorted(np.array(ids)[3].tolist())


@pytest.mark.parametrize(("length", "window"), [(40, 1), (40, 16), (10, 16)])
def test_exposure_is_the_sum_over_later_times(length, window):
    expected = [sum(1 / (t - i) for t in range(i + window, length)) for i in range(length)]
    np.testing.assert_allclose(exposure(length, window), expected, atol=1e-12)


@pytest.mark.parametrize(("step", "share"), [(0, 0.0), (40, 1 - 1 / 8.5), (80, 1 - 1 / 16), (100, 1 - 1 / 16)])
def test_dms_is_led_along_its_compression(step, share):
    example, recipe = Example(None, START, BOUNDS), Recipe("dms", steps=100)  # type: ignore[arg-type]
    kept, gone = (dms.held_beyond([mx.full((2, 192), x)], example, recipe, step).item() for x in (-1e3, 1e3))
    assert kept == pytest.approx(share, abs=1e-6) and gone == 0


@pytest.mark.parametrize(("step", "allowed"), [(0, 1.0), (25, 1 - 7 / 16), (50, 1 / 8), (100, 1 / 8)])
def test_spkv_is_led_to_its_density(step, allowed):
    example, recipe = Example(None, START, BOUNDS), Recipe("spkv", steps=100)  # type: ignore[arg-type]
    written, dropped = (spkv.written_beyond([mx.full((2, 192), x)], example, recipe, step).item() for x in (1e3, -1e3))
    assert written == pytest.approx(1 - allowed, abs=1e-6) and dropped == 0


@pytest.mark.parametrize("step", [0, 50])
def test_spkv_pays_for_all_that_is_written_where_a_quality_is_asked_for(step):
    example, recipe = Example(None, START, BOUNDS), Recipe("spkv", steps=100, quality=0.1)  # type: ignore[arg-type]
    raws = [mx.array(x) for x in drawn(0)]
    outside = [1 / (1 + np.exp(-np.array(x)[:, 4:-12].astype(np.float64))) for x in raws]  # no sinks, no window
    expected = np.concatenate([x.reshape(-1) for x in outside]).mean()
    assert spkv.written_beyond(raws, example, recipe, step).item() == pytest.approx(expected, rel=1e-5)


def test_spkv_draws_its_gates_where_a_quality_is_asked_for():
    """Each with its chance, at the end by the threshold; and what is dropped learns as if it had a share of the attention."""
    recipe = Recipe("spkv", steps=100, quality=0.1)
    raws = [mx.full((4, 500), x) for x in (-1.0, 0.5)]
    for step in (0, 60):
        found = [np.array(x).round(6) for x in spkv.drawn(raws, recipe, step)]
        assert all(set(np.unique(x)) == {0.0, 1.0} for x in found)
        assert [x.mean() for x in found] == pytest.approx([1 / (1 + math.e), 1 / (1 + math.exp(-0.5))], abs=0.04)
    assert [set(np.unique(np.array(x).round(6))) for x in spkv.drawn(raws, recipe, 100)] == [{0.0}, {1.0}]
    logits, values = mx.array([1.0, 0.3, -0.2]), mx.array([2.0, -1.0, 0.5])
    shares = mx.array([0.0, 1.0, 1.0])
    read = lambda x: (mx.softmax(logits + mx.log(x + spkv.EPS)) * values).sum()
    weights = np.exp(np.array(logits)) * np.array([1.0, 1.0, 1.0]) / np.exp(np.array(logits))[1:].sum()
    mean = float(read(shares).item())
    np.testing.assert_allclose(np.array(mx.grad(read)(shares)), weights * (np.array(values) - mean), rtol=1e-3)
    below = mx.full((1, 192), -1.0)
    pulled = mx.grad(lambda raw: mx.log(spkv.drawn([raw], recipe, 100)[0] + spkv.EPS).sum())(below)
    assert (np.array(pulled) > 0).all()


def test_spkv_gates_are_hard_at_the_end():
    raw, recipe = mx.array([[-2.0, -0.1, 0.1, 2.0]]), Recipe("spkv", steps=100)
    soft, hard = (np.array(spkv.written(raw, recipe, step))[0] for step in (75, 100))
    np.testing.assert_allclose(soft, np.array(mx.sigmoid(raw))[0], rtol=1e-6)
    assert hard == pytest.approx([0, 0, 1, 1], abs=1e-6)


@pytest.mark.parametrize("odd", [np.nan, 60.0, -60.0])
def test_gates_that_no_level_helps_stay(odd):
    """A number that is none, and heads that keep everything or nothing whatever is added."""
    raws = [mx.full((3, 512), odd), mx.zeros((0, 512))]
    assert level([raws], Recipe(target="decay")) == Level()
    assert abs(level([[mx.full((3, 512), 6.0)]], Recipe(target="decay")).added) > 0.5


def test_a_fifth_is_written_where_lifetimes_are_the_start():
    """Of both texts and all heads together, those that live longest; gates of its own stay."""
    rng = np.random.default_rng(0)
    raws = [[mx.array(rng.normal(5, 1.7, (heads, length))) for heads in (1, 3)] for length in (256, 512)]
    found = spkv.level(raws, Recipe("spkv"), "retention")
    numbers = np.concatenate([np.array(raw)[:, 4:].reshape(-1) for some in raws for raw in some])
    written = found.scale * numbers + found.added >= 0
    assert written.mean() == pytest.approx(0.2, abs=0.001)
    assert numbers[written].min() > numbers[~written].max()
    assert spkv.level([[mx.full((2, 64), np.nan)]], Recipe("spkv"), "retention") == Level()
    assert spkv.level(raws, Recipe("spkv"), "spkv") == spkv.level(raws, Recipe("spkv"), "") == Level()
